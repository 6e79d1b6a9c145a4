"""Corrected, explained and begun answers: what they equal, weights and phases by hand, and where they lead."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.toys import ToyPolicy, gradient, toy_batch
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings, coefficients
from unipo.methods.edited_answers import drpo_reset, opa_dpo, rationale_po
from unipo.methods.policy_gradients import ppo
from unipo.methods.preferences import dpo, orpo
from unipo.objectives import LogRatioScore, Outcome, Pairwise, Rescaled, with_settings
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.reproduce.training import train
from unipo.rewards import RewardError
from unipo.sources.companions.companion import torch_generator
from unipo.sources.data.comparisons import comparison_episodes
from unipo.sources.data.preferences import PairRow
from unipo.sources.data.problems import Where
from unipo.sources.spec import RolloutSpec
from unipo.sources.stages.beginnings import Reset
from unipo.sources.stages.editing import Corrected, Edit, EditViews, masked_pairs, stretches, weighted_edits
from unipo.sources.stages.explained import Explained
from unipo.sources.text.tabular import NumberTokenizer, TabularPrompts, tabular_rollouts
from unipo.tasks.tabular import TabularTask

AFTER = {"align": 0.0}
BARE = {"context": 0.0, "anchor": 0.0, "align": 0}


def plain_batch() -> tuple[Episodes, Tensor]:
    """A batch of every kind whose changed tokens count 1, and log-probs [N]."""
    batch = toy_batch()
    ones = torch.ones(batch.count("step"), dtype=torch.float64)
    logp = ToyPolicy(1).signals(batch, ["logp"])["logp"].detach()
    return batch.with_columns("step", edit_weight=ones), logp


def pair(first: Sequence[int], second: Sequence[int], prompt: int = 0) -> Episodes:
    return Episodes.build([first, second], [[prompt]] * 2, [0, 0], kind=["pair"] * 2, chosen=[True, False],
                          prompt_id=[prompt] * 2, source=["pairs"] * 2, truncated=[False] * 2)  # fmt: skip


# ---- opa-dpo -----------------------------------------------------------------------------------------------------------
def test_opa_dpo_without_its_parts_is_dpo() -> None:
    batch, logp = plain_batch()
    against = dpo().but(score=LogRatioScore(0.1, "aligned"))
    mine = gradient(opa_dpo(**BARE).objective, batch, logp, AFTER)
    assert torch.equal(mine, gradient(against.objective, batch, logp))
    assert float(mine.abs().sum()) > 0


def test_without_alignment_the_reference_is_the_start() -> None:
    """The very parameters that DPO trains, step by step."""
    start = TabularPolicy.random(2, 2, 3, seed=3)
    rows = Episodes.cat([pair([0, 1], [2, 2]), pair([1, 1], [1, 0], 1)])
    trained = [copy.deepcopy(start), copy.deepcopy(start)]
    for policy, recipe in zip(trained, (opa_dpo(**BARE), dpo()), strict=True):
        train((recipe,), policy, lambda step: rows, steps=5, rate=0.1, reference=copy.deepcopy(start))
    assert torch.equal(trained[0].logits, trained[1].logits)
    assert not torch.equal(trained[0].logits, start.logits)


def test_at_the_reference_a_step_moves_by_half_of_its_weight() -> None:
    rows = weighted_edits(pair([0, 1, 2], [0, 3, 2]), severity=1.0)
    assert rows["edit_weight"].tolist() == [1.0, 2.5, 1.0, 1.0, 2.5, 1.0]
    logp = torch.full((6,), -1.0, dtype=torch.float64)
    rows = rows.with_columns("step", aligned_logp=logp)
    found = gradient(opa_dpo(beta=0.2, **BARE).objective, rows, logp, AFTER)
    torch.testing.assert_close(-found, 0.1 * torch.tensor([1, 2.5, 1, -1, -2.5, -1], dtype=torch.float64))


def bandit(reference: Tensor, reward: Tensor, beta: float, policy: Tensor) -> Tensor:
    """dL/dlogits of population DPO, all pairs of actions labelled with their Bradley-Terry odds, at log-probs `policy`."""
    first, second = torch.triu_indices(len(reward), len(reward), 1)
    better = torch.where(reward[first] >= reward[second], first, second)
    worse = first + second - better
    tokens = torch.stack([better, worse], 1).flatten().tolist()
    group = [i for i in range(len(better)) for _ in (0, 1)]
    rows = Episodes.build([[t] for t in tokens], [[0]] * len(tokens), group, kind=["pair"] * len(tokens),
                          chosen=[True, False] * len(better))  # fmt: skip
    sure = torch.sigmoid(reward[better] - reward[worse]).repeat_interleave(2)
    rows = rows.with_columns("episode", confidence=sure).with_columns("step", reference_logp=reference[tokens])
    table = TabularPolicy(policy.expand(1, 1, len(reward) + 1, -1))
    loss = Pairwise(score=LogRatioScore(beta), confidence=Outcome("confidence"))
    loss(rows, table.signals(rows, ["logp"])).backward()
    assert table.logits.grad is not None
    return table.logits.grad[0, 0, -1]


@pytest.mark.parametrize("mass", [0.0, 1e-3])
def test_the_optimum_of_dpo_has_the_support_of_its_reference(mass: float) -> None:
    """pi = ref exp(r / beta) / Z: what the reference says with probability e^-60 stays there; a mass m that SFT gave does not."""
    reward, beta = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64), 0.1
    reference = torch.tensor([0.6 - mass, 0.4, max(mass, math.exp(-60))], dtype=torch.float64).log().log_softmax(0)
    optimum = (reference + reward / beta).log_softmax(0)
    assert float(bandit(reference, reward, beta, optimum).abs().max()) < 1e-12
    assert float(bandit(reference, reward, beta, reference).abs().max()) > 1e-3
    assert float(optimum[2].exp()) < 1e-20 if not mass else float(optimum[2].exp()) > 0.7


def test_an_unmasked_prompt_teaches_nothing() -> None:
    batch = weighted_edits(toy_batch(), 4.0)
    batch = batch.select(batch.category("kind", "pair"))
    shown = masked_pairs(batch, 0.0, torch_generator("x"))
    hidden = masked_pairs(batch, 1.0, torch_generator("x"))
    term = next(t for _, t in opa_dpo().objective.terms() if t.title == "edited, masked")
    for rows, moved in ((shown, False), (hidden, True)):
        assert rows is not None
        assert rows.category("kind", "context").all()
        policy = ToyPolicy()
        rows = rows.with_columns("step", aligned_logp=policy.signals(rows, ["logp"])["logp"].detach())
        other = ToyPolicy(1)
        update = Learner({"policy": other}, LearnerSettings()).gradient(rows, term)
        norm = sum(float(p.grad.norm()) for _, p in other.named_parameters() if p.grad is not None)
        value = float(term(rows, policy.signals(rows, ["logp"])))
        assert value == pytest.approx(math.log(2), abs=1e-12)
        assert (norm > 1e-6) == moved
        assert update.passes >= 1


def test_the_anchor_pushes_the_sides_apart() -> None:
    """ls(r(w)) + ls(-r(l)), mean over pairs: by hand."""
    batch, logp = plain_batch()
    term = next((c, t) for c, t in opa_dpo(beta=0.3, anchor=1.0).objective.terms() if t.title == "edited, anchor")
    of_pairs = batch.category("kind", "pair") & (
        batch.lengths("group", "episode")[batch.index("group", "episode")] == 2
    )
    rows, steps = batch.select(of_pairs), batch.step_index(of_pairs.nonzero().squeeze(1))
    r = 0.3 * rows.reduce(logp[steps] - rows["aligned_logp"])
    won = rows["chosen"]
    by_hand = torch.nn.functional.softplus(-r[won]).mean() + torch.nn.functional.softplus(r[~won]).mean()
    found = 2.0 * term[1](rows, {"logp": logp[steps]})
    torch.testing.assert_close(found, by_hand)


def test_changed_stretches_and_what_they_count() -> None:
    assert stretches([1, 2, 3, 4], [1, 9, 3, 4, 5]) == ([-1, 0, -1, -1], [-1, 0, -1, -1, 1], 2)
    (after, before), (read, _) = Edit([1, 9, 3, 4, 5], (1.0, 3.0), misread=True).weights([1, 2, 3, 4], focus=3.0)
    assert after == [1.0, 2.5, 1.0, 1.0, 1.5]
    assert before == [1.0, 2.5, 1.0, 1.0]
    assert read == [1.0, 3.0, 1.0, 1.0, 3.0]
    weights = [Edit([9], (s,)).weights([1], 1.0)[0][0][0] for s in (1.0, 2.0, 3.0, 4.0)]
    assert weights == [2.5, 2.0, 1.5, 1.0]
    with pytest.raises(RewardError, match="2 severities for 1 changed"):
        Edit([9], (1.0, 2.0)).weights([1], 1.0)


def correct(prompts: Sequence[str], answers: Sequence[str], **columns: Any) -> list[Any]:
    """The last digit is the prompt's number; an answer that ends so is left alone."""
    return [
        None if a.split()[-1] == q else {"completion": f"{a.split()[0]} {q}", "severity": 2}
        for q, a in zip(prompts, answers, strict=True)
    ]


TASK = TabularTask(3, 3, 2, lambda q, t: float(t[-1] == q))


def test_corrections_make_pairs() -> None:
    spec = RolloutSpec(group=4, augment=(Corrected(correct),))
    made = tabular_rollouts(TASK, TabularPolicy.random(3, 2, 3), spec, 0, TabularPrompts(TASK, {0: [2, 0]})).draw(0, 0)
    plain = tabular_rollouts(TASK, TabularPolicy.random(3, 2, 3), RolloutSpec(group=4), 0).draw(0, 0)
    wrong = int((plain["reward"] == 0).sum())
    edited = made.category("made", "edited")
    assert int(edited.sum()) == 2 * wrong
    assert made.category("kind", "pair").all()
    assert made["chosen"].tolist() == [True, False] * made.count("group")
    assert made["reward"][edited].tolist() == [1.0, 0.0] * wrong
    own = made.select(edited)
    assert torch.equal(own["edit_weight"], torch.where(own.position() == 1, 2.0, 1.0))
    given = made.select(~edited)
    tokens = given["token"].reshape(-1, 2, 2).tolist()
    assert tokens
    assert all(t[0] == [2, 0] and t[1] != [2, 0] for t in tokens)
    assert (given["prompt_id"] == 0).all()
    assert own.select(own["chosen"])["behavior_logp"].isnan().all()


def test_an_editor_that_leaves_everything_alone_adds_nothing() -> None:
    spec = RolloutSpec(group=4, augment=(Corrected(lambda prompts, answers, **_: [None] * len(answers)),))
    made = tabular_rollouts(TASK, TabularPolicy.random(3, 2, 3), spec, 0).draw(0, 0)
    made = EditViews().build(None, 0).annotate(made.with_columns("episode", source="fresh"), 0)
    logp = torch.full((made.count("step"),), -1.0)
    made = made.with_columns("step", aligned_logp=logp - 0.1)
    assert float(gradient(opa_dpo(editor=correct).objective, made, logp, {"align": 0.5}).abs().sum()) == 0


@pytest.mark.parametrize(("said", "message"), [
    ([7], "expected None, the corrected text"), ([{"completion": "1 1", "severity": 9}], "numbers from 1"), ([], "one for each"),
])  # fmt: skip
def test_what_an_editor_may_say(said: list[Any], message: str) -> None:
    spec = RolloutSpec(group=1, augment=(Corrected(lambda prompts, answers, **_: said * len(answers)),))
    with pytest.raises(RewardError, match=message):
        tabular_rollouts(TASK, TabularPolicy.random(3, 2, 3), spec, 0).draw(0, 0)


def test_phases_of_opa_dpo() -> None:
    """Two steps of likelihood, whose result is the reference of the others."""
    rows, path = pair([0, 1], [2, 2]), list[list[Tensor]]()

    def trained(recipe: Recipe) -> list[Tensor]:
        policy, seen = TabularPolicy.random(1, 2, 3, seed=1), list[Tensor]()
        train((recipe,), policy, lambda step: rows, steps=4, rate=0.05,
              watch=lambda step: seen.append(policy.logits.detach().clone()))  # fmt: skip
        return seen

    recipe = opa_dpo(align=2, context=0.0)
    path = [trained(recipe), trained(opa_dpo(align=100, context=0.0))]
    assert torch.equal(path[0][1], path[1][1])
    assert not torch.equal(path[0][2], path[1][2])
    assert [recipe.snapshots["aligned"].due(step) for step in range(4)] == [False, False, True, False]


# ---- rationale-po ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("base", "recipe"), [("dpo", dpo()), ("orpo", orpo())])
def test_without_gamma_it_is_its_base(base: str, recipe: Recipe) -> None:
    assert rationale_po(base=base, gamma=0.0) == recipe
    batch, logp = plain_batch()
    rows = batch.category("kind", "rationale")
    both = gradient(rationale_po(base=base).objective, batch, logp)
    alone = gradient(recipe.objective, batch, logp)
    assert torch.equal(torch.where(batch.expand(rows), alone, both), alone)
    assert torch.equal(both[batch.expand(rows)], torch.full((3,), -0.1, dtype=torch.float64))


@pytest.mark.parametrize("logp", [-40.0, -4.0, -1e-6])
def test_the_released_form_is_the_likelihood_of_long_rationales(logp: float) -> None:
    """gamma sig(-gamma lp) against gamma: apart by gamma e^(gamma lp) at most; half of it for a certain one."""
    batch, _ = plain_batch()
    rows = batch.select(batch.category("kind", "rationale"))
    each = torch.full((3,), logp / 3, dtype=torch.float64)
    gamma = 0.5
    terms = [rationale_po(gamma=gamma, loss=loss).objective.terms()[1] for loss in ("sum", "sigmoid")]
    found = [float(gradient(c * t, rows, each)[0]) for c, t in terms]  # type: ignore[operator]
    assert found[0] == -gamma
    assert found[1] == pytest.approx(-gamma / (1 + math.exp(gamma * logp)), rel=1e-12)
    assert abs(found[1] - found[0]) <= gamma * math.exp(gamma * logp)


def test_a_rationale_never_enters_the_margin() -> None:
    rows = toy_batch()
    rows = rows.select(rows.category("kind", "pair") | rows.category("kind", "rationale"))
    logp = ToyPolicy(1).signals(rows, ["logp"])["logp"].detach()
    moved = torch.where(rows.expand(rows.category("kind", "rationale")), logp - 3.0, logp)
    terms = rationale_po().objective
    found = [coefficients(terms, rows, {"logp": x}).terms[0] for x in (logp, moved)]
    assert torch.equal(found[0].loss, found[1].loss)
    assert torch.equal(found[0].gradient["logp"], found[1].gradient["logp"])


class Letters(NumberTokenizer):
    """Characters as numbers, and an end."""

    eos_token_id, eos_token = 0, "$"  # type: ignore[assignment]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(t) for t in tokens if t)


def test_rationales_stand_behind_both_answers_in_random_order() -> None:
    letters, parts = Letters(), []
    for i in range(40):
        rows = Episodes.build([[ord("y"), 0], [ord("n"), 0]], [[ord("q")]] * 2, [0, 0], kind=["pair"] * 2, chosen=[True, False],
                              prompt_id=[i] * 2, policy_version=[-1] * 2, truncated=[False] * 2)  # fmt: skip
        why = [ord(c) for c in "{chosen}>{rejected}"]
        parts.append(rows.with_context("rationale", [why, why]))
    made = Explained("({first}|{second})")(Episodes.cat(parts), letters)
    reasons = made.select(made.category("kind", "rationale"))
    context = reasons.context("score")
    assert context.offsets is not None
    shown = [letters.decode(t.tolist()) for t in context.values.split(context.offsets.diff().tolist())]
    said = [letters.decode(t.tolist()) for t in reasons["token"].split(reasons.lengths().tolist())]
    assert set(zip(shown, said, strict=True)) == {("q(y|n)", "A>B"), ("q(n|y)", "B>A")}
    assert 8 < shown.count("q(y|n)") < 32
    assert made.lengths("group", "episode").tolist() == [3] * 40
    assert reasons["token"][-1] == 0
    with pytest.raises(ValueError, match="a column 'rationale'"):
        Explained()(pair([1], [2]), letters)
    with pytest.raises(ValueError, match="expected a text with"):
        Explained("{second}{first}")


def test_reasons_and_severities_come_with_the_data() -> None:
    rows = [PairRow(prompt="q", chosen="abc", rejected="axc", columns={"rationale": f"{{chosen}}{i}", "severity": 1 + i},
                    where=Where("here", i)) for i in range(2)]  # fmt: skip
    made = comparison_episodes(Letters(), rows)
    reasons = Explained()(made, Letters())
    said = reasons.select(reasons.category("kind", "rationale"))
    texts = [Letters().decode(t.tolist()) for t in said["token"].split(said.lengths().tolist())]
    assert [t[1:] for t in texts] == ["0", "1"]
    assert {t[0] for t in texts} <= {"A", "B"}
    weight = weighted_edits(made, 4.0)["edit_weight"].reshape(4, 4)
    assert weight[:, 1].tolist() == [2.5, 2.5, 2.0, 2.0]
    assert (weight[:, [0, 2, 3]] == 1).all()


# ---- drpo-reset --------------------------------------------------------------------------------------------------------
LOCK = TabularTask(2, 3, 4, lambda q, t: float(t == (q, 1, 2, 0)))
DEMOS = {q: [q, 1, 2, 0] for q in range(2)}


def drawn(recipe: Recipe, policy: TabularPolicy, step: int = 0, seed: int = 0) -> Episodes:
    spec = recipe.but(group=8).rollouts
    rows = tabular_rollouts(LOCK, policy, spec, seed, TabularPrompts(LOCK, DEMOS)).draw(step, 0)
    values = policy.signals(rows, ["value", "logp"])
    return rows.with_columns("step", old_value=values["value"].detach(), old_logp=values["logp"].detach(),
                             reference_logp=values["logp"].detach() - 0.1)  # fmt: skip


def test_without_resets_it_is_ppo() -> None:
    policy = TabularPolicy.random(2, 4, 3, seed=2)
    recipe = drpo_reset(mix=0.0, kl=0.0, rewards="plain")
    mine, theirs = drawn(recipe, policy), drawn(ppo(), policy)
    assert torch.equal(mine["token"], theirs["token"])
    assert torch.equal(mine["behavior_logp"], theirs["behavior_logp"])
    other = TabularPolicy.random(2, 4, 3, seed=3)
    signals = other.signals(mine, ["logp", "value"])
    found = [coefficients(r.objective, rows, signals).total for r, rows in ((recipe, mine), (ppo(), theirs))]
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("logp", "value"))


def test_what_a_demonstration_wrote_has_no_policy_gradient() -> None:
    policy = TabularPolicy.random(2, 4, 3, seed=2)
    rows = drawn(drpo_reset(mix=1.0), policy)
    assert not rows["generated"][rows.position() == 0].any()
    assert rows["generated"][rows.position() == 3].all()
    torch.testing.assert_close(rows["behavior_logp"], policy.signals(rows, ["logp"])["logp"].detach().float())
    found = coefficients(drpo_reset().objective, rows, policy.signals(rows, ["logp", "value"])).total
    assert (found["logp"][~rows["generated"]] == 0).all()
    assert (found["logp"][rows["generated"]] != 0).all()
    assert (found["value"][~rows["generated"]] != 0).all()
    written = [[t for t, own in zip(*pair, strict=True) if not own] for pair in zip(
        rows["token"].reshape(-1, 4).tolist(), rows["generated"].reshape(-1, 4).tolist(), strict=True)]  # fmt: skip
    assert all(w == DEMOS[int(q)][: len(w)] for w, q in zip(written, rows["prompt_id"], strict=True))


def test_behind_all_but_the_last_token_it_is_a_bandit() -> None:
    """Without a critic and with demonstrations of two tokens: the gradient is that of R - mean on the last token alone."""
    task = TabularTask(1, 3, 2, lambda q, t: float(t == (1, 2)))
    policy = TabularPolicy.random(1, 2, 3, seed=5)
    recipe = drpo_reset(mix=1.0, kl=0.0, rewards="plain", value=0.0, lam=1.0)
    rollouts = tabular_rollouts(task, policy, recipe.but(group=16).rollouts, 0, TabularPrompts(task, {0: [1, 2]}))
    rows = rollouts.draw(0, 0)
    rows = rows.with_columns("step", old_value=torch.zeros(rows.count("step"), dtype=torch.float64))
    signals = policy.signals(rows, ["logp"])
    found = coefficients(recipe.objective, rows, signals).total["logp"].reshape(16, 2)
    reward = rows["reward"].repeat_interleave(2)
    advantage = ((reward - reward.mean()) / (reward.std() + 1e-6)).reshape(16, 2)[:, 1]
    assert (found[:, 0] == 0).all()
    torch.testing.assert_close(found[:, 1], -advantage / 16)


def test_starts_are_a_mixture() -> None:
    """(1 - mix) of the answers begin at the start, the others after 1, 2 or 3 tokens, equally often."""
    policy, counts = TabularPolicy.random(2, 4, 3), torch.zeros(4)
    for step in range(100):
        rows = drawn(drpo_reset(mix=0.4), policy, step)
        counts += torch.bincount((~rows["generated"]).reshape(-1, 4).sum(1), minlength=4)
    share = counts / counts.sum()
    expected = torch.tensor([0.6, *[0.4 / 3] * 3])
    assert float((share - expected).abs().max()) < 4 * (0.25 / 1600) ** 0.5
    assert torch.equal(drawn(drpo_reset(mix=0.4), policy, 7)["token"], drawn(drpo_reset(mix=0.4), policy, 7)["token"])


def test_short_demonstrations_never_reset() -> None:
    spec = RolloutSpec(group=4, begin=Reset(1.0))
    rollouts = tabular_rollouts(LOCK, TabularPolicy.random(2, 4, 3), spec, 0, TabularPrompts(LOCK, {0: [1], 1: [1, 2]}))
    rows = rollouts.draw(0, 0)
    assert (~rows["generated"]).reshape(-1, 4).sum(1).tolist() == [0] * 4 + [1] * 4


def test_the_divergence_is_paid_by_every_token_and_rewards_are_rescaled() -> None:
    policy = TabularPolicy.random(2, 4, 3, seed=2)
    rows = drawn(drpo_reset(mix=0.5), policy)
    cost = torch.linspace(-1, 1, rows.count("step"), dtype=torch.float64)
    rows = rows.with_columns("step", reference_logp=rows["behavior_logp"] - cost)
    gradient_term = drpo_reset(kl=0.3).objective.terms()[0][1]
    reward: Rescaled = gradient_term.advantage.reward  # type: ignore[attr-defined]
    plain = torch.where(rows.position() == 3, rows.expand("reward"), 0.0) - 0.3 * cost
    torch.testing.assert_close(reward.reward(rows, {}), plain, check_dtype=False)
    scaled = (plain - plain.mean()) / (plain.var() + 1e-8).sqrt() + plain.mean()
    torch.testing.assert_close(reward(rows, {}), scaled, check_dtype=False)
    assert with_settings(reward, {}) is reward
