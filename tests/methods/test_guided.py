"""Identity tests of guide-grpo, pope, ampo, tempsamp and arpo-replay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.learner import annotate
from unipo.learner.coefficients import coefficients
from unipo.methods.catalog import build, find
from unipo.objectives import (
    AdvantageMask,
    AffineOutcome,
    ClipMask,
    EpisodeSum,
    Normalised,
    Plain,
    answers,
)
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.sources.stages.guidance import ShortestUseful
from unipo.sources.text.tabular import TabularPrompts, tabular_rollouts
from unipo.tasks.tabular import TabularTask

TOLERANCE = {"atol": 1e-12, "rtol": 1e-9}


def recipe(slug: str, **settings: Any) -> Recipe:
    return find(slug).build(**settings)


def source(task: TabularTask, policy: TabularPolicy, made: Recipe, columns: Mapping[str, Any] | None = None,
           shown: Mapping[int, Sequence[int]] | None = None, ask: int = 0) -> Any:  # fmt: skip
    """Rollouts of the first `ask` prompts (0: all), each with the same `columns`."""
    asked = TabularTask(ask or task.prompts, task.vocabulary, task.length, task.reward, task.end)
    prompts = TabularPrompts(asked, shown or {}, {q: columns or {} for q in range(asked.prompts)})
    return tabular_rollouts(task, policy, made.rollouts, 0, prompts, asked.prompts)


def slopes(made: Recipe, batch: Episodes, policy: TabularPolicy) -> Tensor:
    """dL / dlogp [N], with the policy itself before the update and as reference."""
    batch = annotate(batch, made.needs, {"old": policy, "reference": policy}, 1 << 30)
    signals = {k: v.detach() for k, v in policy.signals(batch, sorted(made.needs.signals)).items()}
    return coefficients(made.objective, batch, signals).total["logp"]


def digits(prompts: int = 3, wanted: int = 0) -> tuple[TabularTask, TabularPolicy]:
    """Right with a chance of about one in three; `wanted` = -1: never."""
    task = TabularTask(prompts, 3, 3, lambda q, tokens: float(sum(tokens) % 3 == wanted))
    return task, TabularPolicy.random(prompts, 3, 3)


# ---- Guide -------------------------------------------------------------------------------------------------------------
PLAIN_GRPO = {"low": 0.2, "high": 0.28}


@pytest.mark.parametrize(("threshold", "wanted"), [(-1.0, 0), (0.0, 0)])
def test_guide_without_a_trigger_is_grpo(threshold: float, wanted: int) -> None:
    task, policy = digits(wanted=wanted)
    made = recipe("guide-grpo", group=16, threshold=threshold, form="{hint}")
    base = build("grpo", {"grpo": {"group": 16}}).but(mask=ClipMask(**PLAIN_GRPO))
    batch = source(task, policy, made, {"hint": "0"}).draw(0, 0)
    plain = source(task, policy, base).draw(0, 0)
    assert torch.equal(batch["token"], plain["token"])
    assert slopes(base, plain, policy).any()
    assert torch.equal(slopes(made, batch, policy), slopes(base, plain, policy))


def test_guide_with_an_empty_hint_is_grpo_with_twice_the_samples() -> None:
    task, policy = digits()
    made = recipe("guide-grpo", group=8, threshold=1.0, form="{prompt}")
    batch = source(task, policy, made, {"hint": ""}).draw(0, 0)
    assert batch.lengths("group", "episode").tolist() == [16] * 3
    logp = policy.signals(batch, ["logp"])["logp"]
    R = batch["reward"]
    group = batch.index("group", "episode")
    z = torch.stack(
        [(R[i] - R[group == group[i]].mean()) / (R[group == group[i]].std() + 1e-6) for i in range(len(batch))]
    )
    (expected,) = torch.autograd.grad(-(batch.reduce(logp, how="mean") * z).mean(), logp)
    torch.testing.assert_close(slopes(made, batch, policy), expected, atol=1e-9, rtol=1e-6)


def expected_gradient(made: Recipe, policy: TabularPolicy, task: TabularTask) -> Tensor:
    """E over answers y ~ pi(. | hinted) of the gradient for the plain prompt 0; the hinted prompt is number 1."""
    length = range(len(task.sequences))
    rows = Episodes.build(task.sequences, [[0]] * len(length), list(length), kind=["rollout"] * len(length))
    hinted = policy.signals(rows.with_context("score", [[1]] * len(length)), ["logp"])["logp"].detach()
    rows = rows.with_columns("episode", reward=task.rewards[0]).with_columns("step", behavior_logp=hinted)
    found = torch.autograd.grad(
        -(slopes(made, rows, policy) * policy.signals(rows, ["logp"])["logp"] * len(length)
          * rows.expand(rows.reduce(hinted).exp())).sum(), policy.logits,
    )  # fmt: skip
    return found[0]


def affine(made: Recipe, mean: float, std: float) -> Recipe:
    """Fixed advantages (R - mean) / std, sums over answers, no clip."""
    return made.but(advantage=Plain(AffineOutcome(1 / std, -mean / std)), mask=AdvantageMask(), aggregate=EpisodeSum())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sequence_ratio_takes_the_hint_out_of_the_expectation(seed: int) -> None:
    """Whatever the hinted policy: E[w A grad log pi] = grad P(right) / std."""
    task = TabularTask(1, 3, 3, lambda q, tokens: float(sum(tokens) % 3 == 1))
    policy = TabularPolicy.random(2, 3, 3, seed)
    exact = torch.autograd.grad((task.log_probability(policy)[0].exp() * task.rewards[0]).sum(), policy.logits)[0]
    found = expected_gradient(affine(recipe("guide-grpo", ratio="sequence"), 0.3, 0.4), policy, task)
    torch.testing.assert_close(found, exact / 0.4, **TOLERANCE)
    other = expected_gradient(affine(recipe("guide-grpo"), 0.3, 0.4), policy, task)
    assert not torch.allclose(other, exact / 0.4, atol=1e-3), "the token ratio is no exact correction"


@pytest.mark.parametrize(("ratio", "first", "second"),
                         [("sequence", 0.02375, 0.0125), ("token", 0.02375, 0.225), ("none", 0.4275, 0.225)])  # fmt: skip
def test_the_token_ratio_damps_what_the_hint_reveals(ratio: str, first: float, second: float) -> None:
    """Token 1 is right with .05, or .9 with the hint, token 2 with .5 either way; the reward is for both."""
    task = TabularTask(1, 2, 2, lambda q, tokens: float(tokens == (1, 1)))
    logits = torch.zeros(2, 2, 3, 2, dtype=torch.float64)
    logits[0, 0, :, 1], logits[1, 0, :, 1] = math.log(0.05 / 0.95), math.log(0.9 / 0.1)
    found = expected_gradient(affine(recipe("guide-grpo", ratio=ratio), 0.0, 1.0), TabularPolicy(logits), task)
    assert float(found[0, 0, 2, 1]) == pytest.approx(first)
    assert float(found[0, 1, 1, 1]) == pytest.approx(second)


def test_either_grouping_has_one_direction() -> None:
    """Pooled with failures of a pass rate near 0, or alone: means and stds differ, the expected direction does not."""
    task = TabularTask(1, 3, 3, lambda q, tokens: float(sum(tokens) % 3 == 1))
    policy, made = TabularPolicy.random(2, 3, 3), recipe("guide-grpo", ratio="sequence")
    pooled, alone = (expected_gradient(affine(made, p, math.sqrt(p * (1 - p))), policy, task) for p in (0.1, 0.2))
    cosine = torch.nn.functional.cosine_similarity(pooled.flatten(), alone.flatten(), 0)
    assert float(cosine) == pytest.approx(1.0)
    task, policy = digits(prompts=6, wanted=1)
    batch = source(
        task, policy, recipe("guide-grpo", threshold=1.0, form="{hint}", pooled=False), {"hint": "4"}, ask=2
    ).draw(0, 0)
    assert batch.lengths("group", "episode").tolist() == [8] * 4
    assert batch["prompt_id"].reshape(4, 8)[:, 0].tolist() == [0, 1, 0, 1]


def test_hinted_rows_are_scored_on_the_plain_prompt() -> None:
    """All fail: the hinted rows' log-probs at sampling are those behind the hint, their context that of the plain prompt."""
    task = TabularTask(4, 3, 3, lambda q, tokens: 0.0)
    policy = TabularPolicy.random(4, 3, 3)
    batch = source(task, policy, recipe("guide-grpo", form="{hint}"), {"hint": "3"}, ask=2).draw(0, 0)
    assert batch.context("score").values.tolist() == [0] * 16 + [1] * 16
    assert batch.context("sample").values.tolist() == [0] * 8 + [3] * 8 + [1] * 8 + [3] * 8
    seen = batch.with_context("score", batch.context("sample").values[:, None].tolist())
    torch.testing.assert_close(
        batch["behavior_logp"].double(), policy.signals(seen, ["logp"])["logp"].detach(), atol=1e-5, rtol=0
    )
    plain = policy.signals(batch, ["logp"])["logp"].detach()
    assert not torch.allclose(batch["behavior_logp"].double(), plain, atol=0.1)


# ---- POPE --------------------------------------------------------------------------------------------------------------
def test_pope_with_an_empty_prefix_is_grpo_with_duplicated_prompts() -> None:
    task, policy = digits()
    made, base = recipe("pope", most=0.0, grid=1, begin="answer"), build("grpo", {})
    batch = source(task, policy, made, {"solution": "0 0 0"}).draw(0, 0)
    assert batch.lengths("group", "episode").tolist() == [8] * 6
    assert batch.context("score").values.tolist() == [q for q in (0, 1, 2, 0, 1, 2) for _ in range(8)]
    halves = [batch.select(torch.arange(6) // 3 == half, "group") for half in (0, 1)]
    assert torch.equal(halves[0]["token"], source(task, policy, base).draw(0, 0)["token"])
    found = slopes(made, batch, policy)
    assert found.any()
    torch.testing.assert_close(found, torch.cat([slopes(base, half, policy) for half in halves]) / 2, **TOLERANCE)


def solved_by(prompts: int, length: int = 3) -> TabularTask:
    """Right: 1 in the first places, whatever the last token."""
    return TabularTask(prompts, 3, length, lambda q, tokens: float(set(tokens[:-1]) == {1}))


def test_a_whole_solution_teaches_nothing() -> None:
    """Of all its tokens but one: every guided answer is right, the group has no gradient."""
    task, policy = solved_by(3), TabularPolicy(torch.zeros(3, 3, 4, 3).double())
    made = recipe("pope", group=32, most=1.0, grid=1, begin="answer")
    batch = source(task, policy, made, {"solution": "1 1 1"}).draw(0, 0)
    found = slopes(made, batch, policy)
    assert batch["reward"][96:].tolist() == [1.0] * 96
    assert found[batch.index("group") < 3].any()
    assert not found[batch.index("group") >= 3].any()


def test_a_prefix_is_context() -> None:
    """No step, and so no gradient, where the prefix is; the reward is of the whole answer."""
    task, policy = solved_by(3), TabularPolicy.random(3, 3, 3)
    made = recipe("pope", most=0.3, grid=1, begin="answer")
    batch = source(task, policy, made, {"solution": "1 1 1"}).draw(0, 0)
    guided = batch.select(torch.arange(6) >= 3, "group")
    assert guided.lengths().unique().tolist() == [2]
    assert torch.equal(guided["reward"], (guided["token"][::2] == 1).double())
    loss = (slopes(made, guided, policy) * policy.signals(guided, ["logp"])["logp"]).sum()
    (found,) = torch.autograd.grad(loss, policy.logits)
    assert not found[:, 0].any()
    assert found[:, 1].any()


def test_guided_gradient_is_that_of_another_start() -> None:
    """E over what follows the prefix of R grad log pi = the gradient of P(right | prefix), by enumeration."""
    task, policy = solved_by(1), TabularPolicy.random(1, 3, 3)
    rest = [(a, b) for a in range(3) for b in range(3)]
    rows = Episodes.build(rest, [[0, 1]] * 9, list(range(9)), kind=["rollout"] * 9)
    logp = policy.signals(rows, ["logp"])["logp"]
    reward = torch.tensor([task.reward(0, (1, *tokens)) for tokens in rest], dtype=torch.float64)
    rows = rows.with_columns("episode", reward=reward).with_columns("step", behavior_logp=logp.detach())
    made = recipe("pope").but(advantage=Plain(), mask=AdvantageMask(), aggregate=EpisodeSum())
    weight = 9 * rows.expand(rows.reduce(logp.detach()).exp())
    (found,) = torch.autograd.grad(
        -(slopes(made, rows, policy) * logp * weight).sum(), policy.logits, retain_graph=True
    )
    (exact,) = torch.autograd.grad((rows.reduce(logp).exp() * reward).sum(), policy.logits)
    torch.testing.assert_close(found, exact, **TOLERANCE)


def locks(chances: Sequence[float], prompts: int = 2) -> tuple[TabularTask, TabularPolicy]:
    """The right token, always 1 of 0 and 1, has the probability chances[t]."""
    p = torch.tensor(chances, dtype=torch.float64)
    logits = torch.stack([1 - p, p], 1).log()[None, :, None].expand(prompts, -1, 3, -1)
    return TabularTask(prompts, 2, len(chances), lambda q, tokens: float(0 not in tokens)), TabularPolicy(logits)


def test_the_shortest_useful_prefix_is_found() -> None:
    """Three hard tokens, then certain ones: the beginning of three of eight. It is remembered; else it is the longest."""
    task, policy = locks([1e-9] * 3 + [1 - 1e-12] * 5)
    made = recipe("pope", most=1.0, begin="answer")
    rollouts = source(task, policy, made, {"solution": "1 1 1 1 1 1 1 1"})
    batch = rollouts.draw(0, 0)
    assert rollouts.kept["shares"]["share"].tolist() == [3 / 8, 3 / 8]
    assert batch.lengths("episode").tolist() == [8] * 16 + [5] * 16
    before = rollouts.tokens_sampled
    rollouts.draw(1, 1)
    assert rollouts.tokens_sampled - before == 2 * 8 * (8 + 5)
    short = source(task, policy, recipe("pope", begin="answer"), {"solution": "1 1 1 1 1 1 1 1"})
    short.draw(0, 0)
    assert short.kept["shares"]["share"].tolist() == [0.25, 0.25]
    searched = 2 * 16 * (7 + 6) + 2 * 8 * (8 + 6)
    assert short.tokens_sampled == searched, "beginnings of equal length are tried once"


def test_a_prefix_is_kept_with_the_chance_of_a_success() -> None:
    """1 - (1 - p)^n with p = .1 and n = 16 is .815."""
    task, policy = locks([1e-9, 0.1, 1 - 1e-12], prompts=400)
    made = recipe("pope", most=2 / 3, grid=2, begin="answer", group=2)
    rollouts = source(task, policy, made, {"solution": "1 1 1"})
    rollouts.draw(0, 0)
    kept = (rollouts.kept["shares"]["share"] < 0.5).double().mean()
    assert float(kept) == pytest.approx(1 - 0.9**16, abs=0.06)
    assert ShortestUseful().samples == 16


def test_scoring_on_the_plain_prompt_is_another_gradient() -> None:
    task, policy = solved_by(3), TabularPolicy.random(3, 3, 3)
    made = recipe("pope", most=0.3, grid=1, begin="answer")
    batch = source(task, policy, made, {"solution": "1 1 1"}).draw(0, 0).select(torch.arange(6) >= 3, "group")
    plain = batch.with_context("score", batch["prompt_id"][:, None].tolist())
    gradients = [
        torch.autograd.grad((slopes(made, b, policy) * policy.signals(b, ["logp"])["logp"]).sum(), policy.logits)[0]
        for b in (batch, plain)
    ]
    assert not torch.allclose(*gradients, atol=1e-4)


# ---- AMPO --------------------------------------------------------------------------------------------------------------
TEACHERS = {"teachers": ["1 1 0", "2 2 0", "0 1 0", "1 2 0"], "answer": "0"}


def taught(q: int, tokens: tuple[int, ...]) -> float:
    return float(tokens in ((1, 1, 0), (2, 2, 0), (0, 1, 0), (1, 2, 0)))


def test_ampo_with_any_success_is_dr_grpo() -> None:
    task, policy = digits()
    made, base = recipe("ampo", group=16), build("dr-grpo", {"dr-grpo": {"group": 16, "entropy": 0.001}})
    batch, plain = source(task, policy, made, TEACHERS).draw(0, 0), source(task, policy, base).draw(0, 0)
    assert torch.equal(batch["token"], plain["token"])
    assert torch.equal(slopes(made, batch, policy), slopes(base, plain, policy))


def test_ampo_without_teachers_is_dr_grpo() -> None:
    task, policy = digits(wanted=-1)
    made, base = recipe("ampo", teachers=0), build("dr-grpo", {"dr-grpo": {"entropy": 0.001}})
    batch, plain = source(task, policy, made, TEACHERS).draw(0, 0), source(task, policy, base).draw(0, 0)
    assert torch.equal(batch["token"], plain["token"])
    assert not slopes(made, batch, policy).any()


def unlikely() -> tuple[TabularTask, TabularPolicy]:
    """Teachers' answers are right, and never sampled."""
    logits = torch.zeros(2, 3, 4, 3, dtype=torch.float64)
    logits[:, 0, 3] = torch.tensor([0.0, -40.0, -40.0])
    logits[:, 1, 0] = torch.tensor([-40.0, -40.0, 0.0])
    return TabularTask(2, 3, 3, taught), TabularPolicy(logits)


def test_advantages_of_inserted_answers() -> None:
    """All fail, two of eight rows are replaced: 1 - k/G and -k/G."""
    task, policy = unlikely()
    made = recipe("ampo")
    batch = source(task, policy, made, TEACHERS).draw(0, 0)
    assert batch.lengths("group", "episode").tolist() == [8, 8]
    shown = batch.category("kind", "demo")
    assert shown.reshape(2, 8).sum(1).tolist() == [2, 2]
    assert bool(answers(batch).all())
    advantage = batch.reduce(Normalised()(batch, {}), how="mean")
    torch.testing.assert_close(advantage[shown], torch.full((4,), 0.75, dtype=advantage.dtype))
    torch.testing.assert_close(advantage[~shown], torch.full((12,), -0.25, dtype=advantage.dtype))


def test_the_gradient_of_teachers_is_shaped() -> None:
    """A gamma pi / (pi + gamma)^2: 10 pi for small ones, .25 at pi = gamma, .0826 at 1; that of A pi / (pi + gamma)."""
    assert F.shaped_slope(torch.tensor([1e-9]).double().log(), 0.1).item() == pytest.approx(1e-8, rel=1e-6)
    assert F.shaped_slope(torch.tensor([0.1]).double().log(), 0.1).item() == pytest.approx(0.25)
    assert F.shaped_slope(torch.zeros(1).double(), 0.1).item() == pytest.approx(0.1 / 1.21)
    task, policy = digits(wanted=-1)
    made = recipe("ampo", budget=5.0, entropy=0.0)
    batch = source(task, policy, made, TEACHERS).draw(0, 0)
    shown = batch.expand(batch.category("kind", "demo"))
    logp = policy.signals(batch, ["logp"])["logp"].detach().requires_grad_()
    p = logp.exp()
    (expected,) = torch.autograd.grad(-(0.75 * p / (p + 0.1)).sum() / 5 / len(batch), logp)
    torch.testing.assert_close(slopes(made, batch, policy)[shown], expected[shown], **TOLERANCE)
    own = slopes(made, batch, policy)[~shown]
    torch.testing.assert_close(own, torch.full_like(own, 0.25 / 5 / len(batch)))


def test_one_teacher_always_is_luffy_without_the_std() -> None:
    """By autograd of its loss: shaped probabilities on the teacher's row, clipped ratios on the others."""
    task, policy = digits(wanted=1)
    made = recipe("ampo", teachers=1, pick="given", always=True, budget=4.0, entropy=0.0)
    batch = source(task, policy, made, {"teachers": ["1 0 0"], "answer": "0"}).draw(0, 0)
    shown = batch.category("kind", "demo")
    assert shown.reshape(3, 8).sum(1).tolist() == [1, 1, 1]
    R = batch["reward"]
    A = batch.expand(R - batch.reduce(R, to="group", how="mean", level="episode")[batch.index("group", "episode")])
    logp = policy.signals(batch, ["logp"])["logp"]
    ratio = (logp - torch.where(batch.expand(shown), 0.0, batch["behavior_logp"])).exp()
    own = torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    theirs = A * logp.exp() / (logp.exp() + 0.1)
    loss = -torch.where(batch.expand(shown), theirs, own).sum() / 4 / len(batch)
    (expected,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(slopes(made, batch, policy), expected, atol=1e-9, rtol=1e-5)


def test_the_best_understood_teacher_is_taken() -> None:
    """Behind the reasoning of one teacher the right answer has probability .9, behind the others 1/3 and less."""
    logits = torch.zeros(2, 3, 4, 3, dtype=torch.float64)
    logits[:, 2, 2] = torch.tensor([0.9, 0.05, 0.05]).double().log()
    logits[:, 2, 0] = torch.tensor([0.01, 0.01, 0.98]).double().log()
    task, policy = TabularTask(2, 3, 3, lambda q, tokens: 0.0), TabularPolicy(logits)
    columns = {"teachers": ["1 1 0", "1 0 0", "1 2 0"], "answer": "0"}
    for count, wanted in ((1, {(1, 2, 0)}), (2, {(1, 2, 0), (1, 1, 0)})):
        batch = source(task, policy, recipe("ampo", teachers=count), columns).draw(0, 0)
        shown = batch.select(batch.category("kind", "demo"))
        assert {tuple(x.tolist()) for x in shown["token"].split(3)} == wanted
        assert shown["reward"].tolist() == [1.0] * 2 * count, "at least 1, whatever the verifier says"


# ---- TempSamp-R1 -------------------------------------------------------------------------------------------------------
def test_softened_rewards_by_hand() -> None:
    R = torch.tensor([-1.0, 0.0, 0.5, 0.8, 1.0], dtype=torch.float64, requires_grad=True)
    soft = F.softened(R, 0.8, 0.01, 1.0)
    torch.testing.assert_close(soft, torch.tensor([-2.139, 0.0868, 0.5964, 0.8, 0.8018]).double(), atol=5e-4, rtol=0)
    grid = torch.linspace(-1, 1.5, 400, dtype=torch.float64)
    assert (F.softened(grid, 0.8, 0.01, 1.0).diff() > 0).all()
    h = 1e-6
    near = F.softened(torch.tensor([0.8 - h, 0.8, 0.8 + h]).double(), 0.8, 0.01, 1.0).diff() / h
    torch.testing.assert_close(near, torch.tensor([0.582, 0.01]).double(), atol=1e-3, rtol=0)


def shown_group(rewards: Sequence[float]) -> Episodes:
    """A group of one-token answers, the last of which is the demonstration."""
    n = len(rewards)
    batch = Episodes.build([[0]] * n, [[0]] * n, [0] * n, kind=["rollout"] * (n - 1) + ["demo"])
    return batch.with_columns("episode", reward=torch.tensor(rewards, dtype=torch.float64))


def advantages(correction: str, rewards: Sequence[float]) -> Tensor:
    objective = recipe("tempsamp", correction=correction, kl=0.0).objective
    return objective.advantage(shown_group(rewards), {})  # type: ignore[attr-defined]


@pytest.mark.parametrize(("correction", "shown", "wanted"), [
    ("none", 1.0, (-0.46, 0.0, -0.93, 1.39)), ("soft", 1.0, (-0.35, 0.42, -1.20, 1.13)),
    ("downscaled", 0.8, (-0.39, 0.39, -1.16, 1.16)), ("anchored", 1.0, (0.0, 1.0, -1.0, 1.2))])  # fmt: skip
def test_corrections_of_the_card(correction: str, shown: float, wanted: Sequence[float]) -> None:
    found = advantages(correction, [0.6, 0.7, 0.5, shown])
    torch.testing.assert_close(found, torch.tensor(wanted).double(), atol=6e-3, rtol=0)
    stage = recipe("tempsamp", correction=correction).rollouts.augment[0]
    assert stage.scale == shown  # type: ignore[attr-defined]


def test_one_better_answer_among_equals() -> None:
    """(G - 1) / sqrt(G) and -1 / sqrt(G), softened or not; nothing where it is anchored."""
    wanted = torch.tensor([-0.5, -0.5, -0.5, 1.5], dtype=torch.float64)
    for correction in ("none", "soft"):
        torch.testing.assert_close(advantages(correction, [0.2, 0.2, 0.2, 1.0]), wanted, atol=1e-5, rtol=0)
    assert not advantages("anchored", [0.2, 0.2, 0.2, 1.0]).any()


def test_tempsamp_without_a_demonstration_is_grpo() -> None:
    """Of an on-policy batch, without softening."""
    task, policy = digits()
    base = build("grpo", {"grpo": {"group": 8, "kl": 0.04}})
    made = recipe("tempsamp", correction="none")
    batch = source(task, policy, base).draw(0, 0)
    batch = batch.with_columns("step", behavior_logp=policy.signals(batch, ["logp"])["logp"].detach())
    assert torch.equal(slopes(made, batch, policy), slopes(base, batch, policy))
    joined = source(task, policy, made, shown=dict.fromkeys(range(3), (0, 0, 0))).draw(0, 0)
    assert joined.lengths("group", "episode").tolist() == [4] * 3
    assert joined["reward"][joined.category("kind", "demo")].tolist() == [1.0] * 3
    assert slopes(made, joined, policy)[joined.expand(joined.category("kind", "demo"))].any()


# ---- ARPO --------------------------------------------------------------------------------------------------------------
def base_of_arpo() -> Recipe:
    return recipe("arpo-replay").but(augment=())


def test_arpo_with_an_empty_memory_is_grpo() -> None:
    """And with the policy's own ratio, token means and its bounds, it is GRPO: z-scores and min(r A, clip(r) A) by autograd."""
    task, policy = TabularTask(3, 3, 3, lambda q, tokens: float(sum(tokens) % 3 == 0), end=0), digits()[1]
    made = recipe("arpo-replay")
    batch = source(task, policy, made).draw(0, 0)
    assert torch.equal(batch["token"], source(task, policy, base_of_arpo()).draw(0, 0)["token"])
    R, group = batch["reward"], batch.index("group", "episode")
    z = torch.stack(
        [(R[i] - R[group == group[i]].mean()) / (R[group == group[i]].std() + 1e-6) for i in range(len(batch))]
    )
    logp = policy.signals(batch, ["logp"])["logp"]
    (expected,) = torch.autograd.grad(-(batch.expand(z) * logp).mean(), logp)
    torch.testing.assert_close(slopes(made, batch, policy), expected, atol=1e-9, rtol=1e-6)


def test_arpo_with_a_success_is_grpo() -> None:
    """A full memory, and groups that have a success of their own: nothing is recalled."""
    task, policy = digits()
    made = recipe("arpo-replay", group=16)
    rollouts, plain = source(task, policy, made), source(task, policy, base_of_arpo().but(group=16))
    for step in range(3):
        batch, base = rollouts.draw(step, step), plain.draw(step, step)
        assert (batch.reduce("reward", to="group", how="max") == 1).all()
        assert torch.equal(batch["token"], base["token"])
        assert torch.equal(slopes(made, batch, policy), slopes(base_of_arpo(), base, policy))
    assert len(rollouts.kept["successes"]) == 24


def failing_later(made: Recipe) -> tuple[Episodes, TabularPolicy]:
    """A step with successes, then one whose answers all fail."""
    won = [True]
    task = TabularTask(2, 3, 3, lambda q, tokens: float(won[0] and sum(tokens) % 3 == 0))
    policy = TabularPolicy.random(2, 3, 3)
    rollouts = source(task, policy, made)
    rollouts.draw(0, 0)
    won[0] = False
    return rollouts.draw(1, 1), policy


def test_advantages_with_one_recalled() -> None:
    """(G - 1) / sqrt(G) = 2.475 for the recalled one, -0.354 for the others; the first row made room for it."""
    made = recipe("arpo-replay")
    batch, policy = failing_later(made)
    assert batch.lengths("group", "episode").tolist() == [8, 8]
    recalled = batch["policy_version"] == 0
    assert recalled.nonzero().flatten().tolist() == [7, 15]
    advantage = batch.reduce(made.objective.advantage(batch, {}), how="mean")  # type: ignore[attr-defined]
    torch.testing.assert_close(advantage[recalled], torch.full((2,), 7 / math.sqrt(8)).to(advantage), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        advantage[~recalled], torch.full((14,), -1 / math.sqrt(8)).to(advantage), atol=1e-4, rtol=0
    )
    fresh = source(TabularTask(2, 3, 3, lambda q, t: 0.0), policy, base_of_arpo()).draw(1, 1)
    tokens = [x.tolist() for x in batch["token"].split(3)]
    plain = [x.tolist() for x in fresh["token"].split(3)]
    assert tokens[:7] == plain[1:8]
    assert tokens[8:15] == plain[9:16]


def test_the_memory_is_a_bounded_queue() -> None:
    """Eight of each prompt, the newest; only outcomes above .1; what was recalled is not remembered again."""
    task = TabularTask(2, 3, 3, lambda q, tokens: 0.05 if tokens[0] == 0 else float(tokens[0] == 1))
    policy = TabularPolicy(torch.zeros(2, 3, 4, 3).double())
    made = recipe("arpo-replay")
    rollouts, own = source(task, policy, made), {0: [], 1: []}
    for step in range(12):
        batch = rollouts.draw(step, step)
        fresh = batch.select((batch["policy_version"] == step) & (batch["reward"] > 0.1))
        for q, tokens in zip(fresh["prompt_id"].tolist(), fresh["token"].reshape(-1, 3).tolist(), strict=True):
            own[q].append(tokens)
        memory = rollouts.kept["successes"]
        assert (memory["reward"] > 0.1).all()
        for q in own:
            kept = memory.select(memory["prompt_id"] == q)
            assert kept["token"].reshape(-1, 3).tolist() == own[q][-8:]
    assert len(rollouts.kept["successes"]) == 16


def test_recalled_answers_count_as_fresh() -> None:
    """r to the policy before the update is 1 for every row; to who wrote it, it is that of the policies apart."""
    made, exact = recipe("arpo-replay"), recipe("arpo-replay", to="behavior")
    batch, policy = failing_later(made)
    moved = TabularPolicy(policy.logits * 1.1)
    n, A = batch.count("step"), batch.expand(made.objective.advantage(batch, {}), level="step")  # type: ignore[attr-defined]
    torch.testing.assert_close(slopes(made, batch, moved), -A / n, **TOLERANCE)
    logp = moved.signals(batch, ["logp"])["logp"].detach()
    ratio = (logp - batch["behavior_logp"]).exp()
    kept = ~(((A > 0) & (ratio > 1.3)) | ((A < 0) & ((ratio < 0.8) | (ratio > 3))))
    torch.testing.assert_close(slopes(exact, batch, moved), -(kept * ratio * A) / n, atol=1e-9, rtol=1e-5)


def test_settings_that_do_not_exist_are_named() -> None:
    for slug, setting in (("guide-grpo", "ratio"), ("ampo", "pick"), ("tempsamp", "correction"), ("pope", "begin")):
        with pytest.raises(ValueError, match=f"{setting} is 'x': expected one of"):
            recipe(slug, **{setting: "x"})
