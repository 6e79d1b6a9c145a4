"""Games of language policies: expectations by enumeration, minimisers, fixed points, judges, opponents and pairs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.policies.models import saved
from tests.toys import gradient
from unipo.episodes import Episodes
from unipo.methods.preference_games import apo, dno, inpo, nash_ema, nash_md, nash_mp, online_dpo, spo, sppo
from unipo.methods.preferences import dpo, ipo
from unipo.objectives import (
    Constant,
    EpisodeSum,
    LeaveOneOut,
    Link,
    LogRatioScore,
    LogRatioToGo,
    Normalised,
    Objective,
    Outcome,
    Pairwise,
    Plain,
    Plus,
    PolicyGradient,
    ShapedOutcome,
    Zero,
    rollouts,
)
from unipo.objectives.advantages import Advantage
from unipo.policies import load_policy
from unipo.policies.tabular import TabularPolicy
from unipo.reproduce.training import FreshAndReplayed, train
from unipo.rewards import RewardError
from unipo.sources.keyed import keyed_generator
from unipo.sources.spec import RolloutSpec
from unipo.sources.stages.augment import Drawn
from unipo.sources.stages.preferences import (
    Answers,
    Choice,
    Compared,
    Disjoint,
    Extremes,
    FarApart,
    FunctionJudge,
    Judge,
    Opponents,
    Paired,
    Recent,
    Sampled,
    ScoreJudge,
    Verdicts,
    judge_of,
)
from unipo.sources.text.sampler import Sampler, SamplerSettings
from unipo.sources.text.tabular import TabularPrompts, tabular_rollouts
from unipo.tabular.game_solvers import geometric_mixture, multiplicative_weights
from unipo.tabular.game_solvers import inpo as inpo_step
from unipo.tabular.games import PreferenceGame, RegularisedGame, mirror_step
from unipo.tasks.tabular import TabularTask
from unipo.training.loop import renew

ARMS = 3
GAME = PreferenceGame.random(ARMS, keyed_generator(3, "game"), 2.0)


def arms(n: int = ARMS, prompts: int = 1) -> TabularTask:
    return TabularTask(prompts, n, 1, lambda prompt, tokens: float(tokens[0]))


def judged(game: PreferenceGame) -> Judge:
    """The game's table as a judge of answers that are numbers."""

    def rate(prompts: Sequence[Any], answers: Sequence[str], others: Sequence[str], **columns: Any) -> Tensor:
        return torch.stack([game.preference[int(a), int(b)] for a, b in zip(answers, others, strict=True)])

    return FunctionJudge(rate)


def logits(seed: int, n: int = ARMS) -> Tensor:
    return torch.from_numpy(keyed_generator(seed, "policy").normal(size=n)).log_softmax(0)


def table(logp: Tensor) -> TabularPolicy:
    """A policy over single tokens."""
    return TabularPolicy(logp.expand(1, 1, len(logp) + 1, len(logp)))


def drawn_of(task: TabularTask, policy: TabularPolicy, step: int = 0) -> Drawn:
    source = tabular_rollouts(task, policy, RolloutSpec(), 0)
    return Drawn({i: source.prompts[i] for i in range(task.prompts)}, source, 0, step, step)  # type: ignore[index]


def groups_of(answers: Sequence[Sequence[int]], **policies: Tensor) -> Episodes:
    """A group per tuple of single-token answers, with `<name>_logp` of log-probabilities over them."""
    flat = [y for group in answers for y in group]
    made = Episodes.build(
        [[y] for y in flat], [[0]] * len(flat), [g for g, group in enumerate(answers) for _ in group],
        kind=["rollout"] * len(flat), prompt_id=[0] * len(flat), truncated=[False] * len(flat),
    )  # fmt: skip
    token = torch.tensor(flat)
    columns = {f"{name}_logp": logp[token] for name, logp in policies.items()}
    return made.with_columns("episode", reward=token.double()).with_columns("step", **columns)


def compared(answers: Sequence[Sequence[int]], **policies: Tensor) -> Episodes:
    """The same as comparisons: pairs that a stage made of them."""
    return groups_of(answers, **policies).with_columns("episode", kind="pair")


def expected(objective: Objective, logp: Tensor, size: int, judge: Judge | None = None, **policies: Tensor) -> Tensor:
    """- dE[L]/dlogits [A]: the ascent direction, exactly, over all groups of `size` independent answers."""
    tuples = list(itertools.product(range(len(logp)), repeat=size))
    batch = groups_of(tuples, behavior=logp, old=logp, **policies)
    if judge is not None:
        batch = Compared(judge)(batch, drawn_of(arms(len(logp)), table(logp)))
    slope = gradient(objective, batch, logp[batch["token"]]) * len(tuples)
    chance = logp.exp()[torch.tensor(tuples)].prod(1).repeat_interleave(size)
    score = torch.nn.functional.one_hot(batch["token"], len(logp)) - logp.exp()
    return -(chance * slope) @ score


def exact(value: Any, logp: Tensor) -> Tensor:
    """d value(softmax(l)) / dl."""
    level = logp.clone().requires_grad_()
    return torch.autograd.grad(value(level.log_softmax(0)), level)[0]


def same(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---- SPO -------------------------------------------------------------------------------------------------------------
def test_win_rates_among_a_group_sum_to_half() -> None:
    """By hand, and the sum of 2 w - 1 is exactly 0; a group of one is at 1/2."""
    batch = groups_of([(0, 1, 2), (2, 2, 0), (1,)])
    rated = Compared(judged(GAME))(batch, drawn_of(arms(), table(logits(0))))["win_rate"]
    P = GAME.preference
    assert float(rated[0]) == pytest.approx(float(P[0, 1] + P[0, 2]) / 2)
    assert float(rated[3]) == pytest.approx(float(0.5 + P[2, 0]) / 2)
    assert rated[:3].sum() == pytest.approx(1.5)
    assert rated[3:6].sum() == pytest.approx(1.5)
    assert float(rated[6]) == 0.5
    own = Compared(judged(GAME), Opponents(itself=1.0))(batch, drawn_of(arms(), table(logits(0))))["win_rate"]
    same(own[:3] - 0.5, (rated[:3] - 0.5) * 2 / 3)
    same(own[:3], P.mean(1))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_spo_gradient_is_that_of_the_win_rate(size: int) -> None:
    """E = grad of 2 P(pi > sg pi), for every size of the group; a leave-one-out mean multiplies it by K / (K - 1)."""
    logp = logits(0)
    found = expected(spo().objective, logp, size, judged(GAME))
    same(found, exact(lambda p: 2 * p.exp() @ GAME.against(logp.exp()), logp))
    centred = PolicyGradient(advantage=Normalised(outcome=Outcome("win_rate")), aggregate=EpisodeSum())
    again = PolicyGradient(
        advantage=Normalised(center=Constant(0.5), outcome=Outcome("win_rate")), aggregate=EpisodeSum()
    )
    same(expected(centred, logp, size, judged(GAME)), expected(again, logp, size, judged(GAME)))
    twice = PolicyGradient(
        advantage=Normalised(center=LeaveOneOut(), outcome=Outcome("win_rate")), aggregate=EpisodeSum()
    )
    same(2 * expected(twice, logp, size, judged(GAME)), found * size / (size - 1))


def test_recent_answers_are_the_opponents() -> None:
    """The first group meets itself, the second meets the first; only the last `most` answers to a prompt are remembered."""
    policy, task = table(logits(0)), arms()
    drawn, stage = drawn_of(task, policy), Compared(judged(GAME), Recent(most=4))
    first = stage(groups_of([(0, 1, 1)]), drawn)
    same(first["win_rate"], Compared(judged(GAME))(groups_of([(0, 1, 1)]), drawn)["win_rate"])
    second = stage(groups_of([(2, 0)]), drawn)
    P = GAME.preference
    same(second["win_rate"], torch.stack([(P[2, 0] + 2 * P[2, 1]) / 3, (P[0, 0] + 2 * P[0, 1]) / 3]))
    third = stage(groups_of([(1,)]), drawn)
    same(third["win_rate"], (2 * P[1, 1] + P[1, 2] + P[1, 0])[None] / 4)
    assert len(drawn.source.kept["opponents"]) == 4


# ---- Nash-MD ---------------------------------------------------------------------------------------------------------
MU = logits(7)


def with_win_rate(batch: Episodes, rate: Tensor) -> Episodes:
    return batch.with_columns("episode", win_rate=rate[batch["token"]])


@pytest.mark.parametrize("mixture", [0.0, 0.25, 1.0])
def test_nash_md_gradient(mixture: float) -> None:
    """E = grad[ P(pi > sg pi^mix) - tau KL(pi || mu) ]: at 0 self-play, at 1 against the reference."""
    logp, tau = logits(1), 0.3
    mixed = geometric_mixture(logp, MU, mixture)
    batch = with_win_rate(groups_of([(y,) for y in range(ARMS)], reference=MU), GAME.against(mixed.exp()))
    slope = gradient(nash_md(tau=tau, mixture=mixture).objective, batch, logp) * ARMS
    found = -(logp.exp() * slope) @ (torch.eye(ARMS, dtype=torch.float64) - logp.exp())

    def value(p: Tensor) -> Tensor:
        return p.exp() @ GAME.against(mixed.exp()) - tau * (p.exp() * (p - MU)).sum()

    same(found, exact(value, logp))
    if mixture == 0.0:
        same(found, expected(nash_md(tau=tau, mixture=0.0).objective, logp, 3, judged(GAME), reference=MU))


def test_a_half_less_changes_no_expectation() -> None:
    logp = logits(1)
    plain, less = (
        PolicyGradient(advantage=Normalised(center=Constant(c), outcome=Outcome("win_rate")), aggregate=EpisodeSum())
        for c in (0.0, 0.5)
    )
    same(expected(plain, logp, 3, judged(GAME)), expected(less, logp, 3, judged(GAME)))


def test_the_divergence_to_the_mixture_is_a_share_of_that_to_the_reference() -> None:
    """grad KL(pi || sg mixture(pi)) = share * grad KL(pi || mu)."""
    logp, share = logits(1), 0.3
    mixed = geometric_mixture(logp, MU, share)
    to_mixture = exact(lambda p: (p.exp() * (p - mixed)).sum(), logp)
    same(to_mixture, share * exact(lambda p: (p.exp() * (p - MU)).sum(), logp))


class OwnStepOnly(Advantage):
    """- log(pi / ref) of the step alone: what a public trainer has."""

    def own_needs(self) -> Any:
        return LogRatioToGo().own_needs()

    def __call__(self, episodes: Episodes, signals: Any) -> Tensor:
        return -(signals["logp"].detach() - episodes["reference_logp"])


def test_the_divergence_of_tokens() -> None:
    """Whole log-ratio and what is to come have the gradient of -KL, the latter with less variance; the own step's has not."""
    task = TabularTask(1, 3, 3, lambda q, y: 0.0)
    policy, other = TabularPolicy.random(1, 3, 3, 0), TabularPolicy.random(1, 3, 3, 1)
    batch = task.episodes()
    with torch.no_grad():
        reference = other.signals(batch, ["logp"])["logp"]
    batch = batch.with_columns("step", reference_logp=reference)
    exact_kl = (task.log_probability(policy).exp() * (task.log_probability(policy) - task.log_probability(other))).sum()
    truth = -torch.autograd.grad(exact_kl, policy.logits)[0].flatten()
    chance = task.log_probability(policy).exp()[0].detach()
    signals = policy.signals(batch, ["logp"])["logp"]

    def moments(advantage: Advantage) -> tuple[Tensor, float]:
        term = PolicyGradient(advantage=advantage, aggregate=EpisodeSum())
        coefficient = -gradient(term, batch, signals.detach()) * len(batch)
        each = []
        for i in range(len(batch)):
            steps = batch.index("episode") == i
            each.append(
                torch.autograd.grad((coefficient * signals)[steps].sum(), policy.logits, retain_graph=True)[0].flatten()
            )
        rows = torch.stack(each)
        mean = chance @ rows
        return mean, float(chance @ (rows - mean).square().sum(1))

    whole, whole_variance = moments(Plain(ShapedOutcome(1.0, "reference", Zero())))
    togo, togo_variance = moments(LogRatioToGo(1.0))
    own, _ = moments(OwnStepOnly())
    same(whole, truth, 1e-12)
    same(togo, truth, 1e-12)
    assert togo_variance < 0.9 * whole_variance
    assert float((own - truth).norm() / truth.norm()) > 0.05


def test_opponents_are_drawn_from_the_mixture() -> None:
    policy, reference = table(logits(1)), table(MU)
    rollouts_of = tabular_rollouts(arms(), policy, nash_md(judge=judged(GAME), samples=4000, mixture=0.4).rollouts, 0)
    rollouts_of.players = {"reference": type(rollouts_of.sampler)(arms(), reference)}  # type: ignore[call-arg]
    batch = rollouts_of.draw(0, 0)
    exactly = GAME.against(geometric_mixture(logits(1), MU, 0.4).exp())
    torch.testing.assert_close(batch["win_rate"], exactly[batch["token"]], atol=0.03, rtol=0)
    assert len(batch) == 4
    with pytest.raises(ValueError, match="no other player"):
        tabular_rollouts(arms(), policy, nash_md(judge=judged(GAME)).rollouts, 0).draw(0, 0)


def test_a_model_and_its_reference_are_mixed_token_by_token(tmp_path: Path) -> None:
    """Log-probs of what was sampled are those of softmax((1 - share) l + share l'), computed from the two models apart."""
    first, second = (load_policy(str(saved("qwen3", tmp_path))) for _ in range(2))
    with torch.no_grad():
        for p in second.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    samplers = [Sampler(p.model, p.tokenizer, SamplerSettings(max_tokens=5)) for p in (first, second)]
    prompts = [[5, 6, 7], [8, 9]]
    made = samplers[0].mixed(samplers[1], 0.3).sample(prompts, torch.tensor([[0, 1], [0, 2]]))
    for prompt, completion in zip(prompts, made, strict=True):
        for t, (token, logp) in enumerate(zip(completion.tokens, completion.logp, strict=True)):
            ids = torch.tensor([[*prompt, *completion.tokens[:t]]])
            with torch.no_grad():
                own, other = (p.model(input_ids=ids).logits[0, -1].double().log_softmax(-1) for p in (first, second))
            mixed = (0.7 * own + 0.3 * other).log_softmax(-1)
            assert logp == pytest.approx(float(mixed[token]), abs=1e-4)
            assert abs(float(own[token] - mixed[token])) > 1e-4
    alone = samplers[0].mixed(samplers[1], 0.0).sample(prompts, torch.tensor([[0, 1], [0, 2]]))
    assert [c.tokens for c in alone] == [c.tokens for c in samplers[0].sample(prompts, torch.tensor([[0, 1], [0, 2]]))]


def test_nash_ema_between_its_limits() -> None:
    """average 0: the opponent is the policy itself; 1: the start, for ever."""
    assert nash_ema(average=0.0).snapshots["average"].tau == 1.0
    start, now = table(MU), table(logits(1))
    for average, expected_logits in ((1.0, MU), (0.0, logits(1)), (0.25, 0.25 * MU + 0.75 * logits(1))):
        copy = table(MU)
        snapshot = nash_ema(average=average).snapshots["average"]
        renew(copy, now, snapshot.tau, snapshot.beyond)
        same(copy.logits[0, 0, 0].detach(), expected_logits)
    assert torch.equal(start.logits[0, 0, 0], MU)


# ---- Nash Prox -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [2, 3])
def test_nash_mp_rests_at_the_equilibrium(size: int) -> None:
    """At ref exp(P(. > pi*) / beta) with the anchor there too, the expected gradient is 0, for any size of the group."""
    beta = 0.3
    soft = RegularisedGame(GAME, MU, beta)
    found = expected(
        nash_mp(beta=beta).objective, soft.solution, size, judged(GAME), reference=MU, anchor=soft.solution
    )
    same(found, torch.zeros(ARMS, dtype=torch.float64))
    elsewhere = expected(nash_mp(beta=beta).objective, MU, size, judged(GAME), reference=MU, anchor=MU)
    assert float(elsewhere.norm()) > 1e-3


@pytest.mark.parametrize("size", [2, 3])
def test_a_second_baseline_moves_the_fixed_point(size: int) -> None:
    """With a leave-one-out mean under the win rate too: ref exp( K / (K - 1) P / beta )."""
    beta = 0.3
    pull = Normalised(center=LeaveOneOut(), outcome=ShapedOutcome(beta, "reference", Zero()))
    wrong = PolicyGradient(
        advantage=Plus((Normalised(center=LeaveOneOut(), outcome=Outcome("win_rate")), pull)), aggregate=EpisodeSum()
    )
    moved = RegularisedGame(GAME, MU, beta * (size - 1) / size).solution
    same(expected(wrong, moved, size, judged(GAME), reference=MU), torch.zeros(ARMS, dtype=torch.float64))
    right = RegularisedGame(GAME, MU, beta).solution
    assert float(expected(wrong, right, size, judged(GAME), reference=MU).norm()) > 1e-3


def test_at_the_anchor_nash_mp_is_regularised_self_play() -> None:
    """The anchor's term has gradient 0 where the policy is the anchor: grad[ P(pi > sg pi) - beta KL(pi || ref) ], any eta."""
    logp, beta = logits(2), 0.2
    for eta in (0.05, 1e9):
        found = expected(nash_mp(beta=beta, eta=eta).objective, logp, 3, judged(GAME), reference=MU, anchor=logp)
        same(found, exact(lambda p: p.exp() @ GAME.against(logp.exp()) - beta * (p.exp() * (p - MU)).sum(), logp))


def test_nash_mp_gradient_away_from_the_anchor() -> None:
    logp, anchor, beta, eta = logits(2), logits(4), 0.2, 0.5
    found = expected(nash_mp(beta=beta, eta=eta).objective, logp, 3, judged(GAME), reference=MU, anchor=anchor)

    def value(p: Tensor) -> Tensor:
        near = (p.exp() * (p - anchor)).sum()
        return p.exp() @ GAME.against(logp.exp()) - beta * (p.exp() * (p - MU)).sum() - beta / eta * near

    same(found, exact(value, logp))


# ---- INPO ------------------------------------------------------------------------------------------------------------
def pair_slope(objective: Objective, at: Tensor, weight: Tensor, label: Tensor, **policies: Tensor) -> Tensor:
    """d/dlog pi(y) of the population loss over pairs (y, y'), weighted [A, A], y preferred with probability label [A, A]."""
    pairs = list(itertools.product(range(len(at)), repeat=2))
    batch = compared(pairs, **policies)
    sure = torch.stack([label[y, z] for y, z in pairs]).repeat_interleave(2)
    batch = batch.with_columns("episode", chosen=torch.arange(len(batch)) % 2 == 0, confidence=sure)
    slope = gradient(objective, batch, at[batch["token"]]) * len(pairs)
    own = torch.stack([weight[y, z] for y, z in pairs]).repeat_interleave(2)
    return torch.zeros(len(at), dtype=torch.float64).index_add(0, batch["token"], own * slope)


def test_inpo_minimiser_is_the_mirror_step() -> None:
    """Over pairs drawn from pi_t x pi_t; elsewhere, or with other sampling, the slope is not 0."""
    soft, current, eta = RegularisedGame(GAME, MU, 0.1), logits(5), 0.4
    new, objective = inpo_step(soft, current, eta), inpo(tau=0.1, eta=eta).objective
    own = current.exp()[:, None] * current.exp()[None, :]
    known = {"reference": MU, "old": current}
    same(pair_slope(objective, new, own, GAME.preference, **known), torch.zeros(ARMS, dtype=torch.float64))
    assert float(pair_slope(objective, current, own, GAME.preference, **known).norm()) > 1e-2
    uniform = torch.full_like(own, 1 / 9)
    assert float(pair_slope(objective, new, uniform, GAME.preference, **known).norm()) > 1e-3


def test_inpo_at_equal_rates_is_ipo_on_its_own_pairs() -> None:
    batch = compared([(0, 1), (2, 1), (0, 2)], reference=MU, old=logits(5))
    blank = torch.ones(6, dtype=torch.float64)
    batch = batch.with_columns("episode", chosen=torch.arange(6) % 2 == 0, confidence=blank)
    logp = logits(6)[batch["token"]]
    same(gradient(inpo(tau=0.2, eta=0.2).objective, batch, logp),
         gradient(ipo(beta=0.2).objective, batch, logp))  # fmt: skip


def test_inpo_gradient_as_advantages() -> None:
    """A_w = -2 (h - 1 / (2 eta)) = -A_l."""
    current, tau, eta = logits(5), 0.1, 0.4
    batch = compared([(0, 1)], reference=MU, old=current)
    batch = batch.with_columns("episode", chosen=torch.tensor([True, False]), confidence=torch.ones(2).double())
    at = logits(6)
    ratio = tau / eta * (at - MU) + (1 - tau / eta) * (at - current)
    advantage = -2 * (ratio[0] - ratio[1] - 0.5 / eta)
    same(gradient(inpo(tau=tau, eta=eta).objective, batch, at[:2]), torch.stack([-advantage, advantage]))


def test_expected_labels_have_the_mean_gradient_of_drawn_ones() -> None:
    """For a square: the gradient of (h - c (2 p - 1))^2."""
    current, p = logits(5), 0.8
    objective = inpo(tau=0.0, eta=0.5).objective
    batch = compared([(0, 1)], reference=MU, old=current)
    won, at = torch.tensor([True, False]), logits(6)[:2]

    def slope(chosen: Tensor, confidence: float) -> Tensor:
        sure = torch.full((2,), confidence, dtype=torch.float64)
        return gradient(objective, batch.with_columns("episode", chosen=chosen, confidence=sure), at)

    soft = slope(won, p)
    same(soft, p * slope(won, 1.0) + (1 - p) * slope(~won, 1.0))
    margin = (at - current[:2])[0] - (at - current[:2])[1]
    same(soft, 2 * (margin - 1.0 * (2 * p - 1)) * torch.tensor([1.0, -1.0]).double())


def test_inpo_without_a_reference_is_the_exponential_weights() -> None:
    """tau = 0: the minimiser is SPPO's and DNO's population step with rate 1 / eta."""
    current = logits(5)
    own = current.exp()[:, None] * current.exp()[None, :]
    new = multiplicative_weights(GAME, current, 1 / 0.4)
    slope = pair_slope(inpo(tau=0.0, eta=0.4).objective, new, own, GAME.preference, reference=MU, old=current)
    same(slope, torch.zeros(ARMS, dtype=torch.float64))


# ---- SPPO ------------------------------------------------------------------------------------------------------------
def test_sppo_minimiser_is_the_exponential_weights_step() -> None:
    """E_pi_t P(y > pi_t) = 1/2, the free minimiser is eta (P - 1/2), and normalised it is the exact step."""
    current, eta = logits(5), 0.7
    rate = GAME.against(current.exp())
    assert float(current.exp() @ rate) == pytest.approx(0.5)
    target = current + eta * (rate - 0.5)
    batch = with_win_rate(groups_of([(y,) for y in range(ARMS)], old=current), rate)
    objective = sppo(eta=eta, answers="all").objective
    same(gradient(objective, batch, target), torch.zeros(ARMS, dtype=torch.float64))
    same(target.log_softmax(0), multiplicative_weights(GAME, current, eta))
    slope = gradient(objective, batch, current)
    same(slope, -2 * eta * (rate - 0.5) / ARMS)


def test_sppo_of_five_answers_by_hand() -> None:
    """P = sigmoid(s_i - s_j), win rates over all five, and half the sum of (lr - 1/b (p - 1/2))^2 over winner and loser."""
    score = torch.tensor([0.2, 1.5, -0.3, 1.5, -2.0], dtype=torch.float64)
    batch, eta = groups_of([(0, 1, 2, 3, 4)], old=logits(5, 5)).with_columns("episode", reward=score), 1000.0
    drawn = drawn_of(arms(5), table(logits(5, 5)))
    for stage in sppo(eta=eta).rollouts.augment:
        batch = stage(batch, drawn)
    assert batch["token"].tolist() == [1, 4]
    P = torch.sigmoid(score[:, None] - score[None, :])
    same(batch["win_rate"], P.mean(1)[[1, 4]])
    at = logits(6, 5)[[1, 4]]
    error = at - logits(5, 5)[[1, 4]] - eta * (P.mean(1)[[1, 4]] - 0.5)
    same(sppo(eta=eta).objective(batch, {"logp": at}), 0.5 * error.square().sum(), 1e-6)
    hard = at - logits(5, 5)[[1, 4]] - torch.tensor([eta / 2, -eta / 2]).double()
    same(sppo(eta=eta, labels="hard").objective(batch, {"logp": at}), 0.5 * hard.square().sum(), 1e-6)


def test_sppo_skips_groups_whose_scores_are_equal() -> None:
    batch = groups_of([(0, 1), (1, 2)]).with_columns("episode", reward=torch.tensor([1.0, 1.0, 0.0, 2.0]).double())
    for stage in sppo().rollouts.augment:
        batch = stage(batch, drawn_of(arms(), table(MU)))
    assert batch["token"].tolist() == [2, 1]


def test_the_difference_of_sppo_targets_is_inpos() -> None:
    """eta (P(w) - P(l)) = the target that a square on the margin with tau = 0 has in expectation; hard: eta."""
    current, eta = logits(5), 0.7
    rate = GAME.against(current.exp())
    batch = with_win_rate(groups_of([(0, 2)], old=current), rate).with_columns(
        "episode", chosen=torch.tensor([True, False])
    )
    slope = gradient(sppo(eta=eta, answers="all").objective, batch, current[[0, 2]])
    same(-(slope[0] - slope[1]), eta * (rate[0] - rate[2]))
    best_and_worst = batch.with_columns("episode", kind="pair")
    hard = gradient(sppo(eta=eta, labels="hard").objective, best_and_worst, current[[0, 2]])
    same(-(hard[0] - hard[1]), torch.tensor(eta).double(), 1e-7)


def test_sppo_raises_the_winner_whatever_the_loser_does() -> None:
    """Unlike DPO's, its gradient in the winner's log-ratio does not depend on the loser's, and is not invariant to a shift."""
    current = logits(5)
    batch = groups_of([(0, 2)], old=current).with_columns("episode", win_rate=torch.tensor([0.8, 0.3]).double())
    batch = batch.with_columns("episode", chosen=torch.tensor([True, False]), confidence=torch.ones(2).double())
    objective = sppo(eta=1.0, answers="all").objective
    at = current[[0, 2]]
    for loser in (0.0, 5.0, -5.0):
        slope = gradient(objective, batch, at + torch.tensor([0.0, loser]).double())
        assert float(slope[0]) == pytest.approx(-0.3)
    assert float(gradient(objective, batch, at)[1]) > 0
    moved = gradient(objective, batch, at + 0.5)
    assert float(moved[0]) == pytest.approx(0.2)
    dpo_slopes = [gradient(online_dpo().objective, batch, at + s) for s in (0.0, 0.5)]
    same(*dpo_slopes)


# ---- DNO and online DPO ------------------------------------------------------------------------------------------------
def test_dno_is_dpo_against_the_iterate() -> None:
    """q = 1: DPO whose reference is pi_t; q < 1: conservative DPO with eps = 1 - q; q = 1/2 pulls the margin to 0."""
    current = logits(5)
    batch = compared([(0, 1), (2, 0)], old=current, reference=current)
    batch = batch.with_columns("episode", chosen=torch.arange(4) % 2 == 0)
    at = logits(6)[batch["token"]]
    for q in (1.0, 0.7, 0.5):
        labelled = batch.with_columns("episode", confidence=torch.full((4,), q, dtype=torch.float64))
        plain = dpo(beta=0.3, label_smoothing=1 - q).objective
        same(gradient(dno(beta=0.3).objective, labelled, at), gradient(plain, labelled, at))
    even = batch.with_columns("episode", confidence=torch.full((4,), 0.5, dtype=torch.float64))
    same(gradient(dno(beta=0.3).objective, even, current[batch["token"]]), torch.zeros(4, dtype=torch.float64))
    margin = (at - current[batch["token"]])[0] - (at - current[batch["token"]])[1]
    assert float(gradient(dno(beta=0.3).objective, even, at)[0]) * float(margin) > 0


def test_dno_population_minimiser() -> None:
    """With labels sigmoid(c (r - r')) it is pi_t exp(c r / beta), for pairs sampled in any way."""
    current, beta, c = logits(5), 0.3, 2.0
    rate = GAME.against(current.exp())
    label = torch.sigmoid(c * (rate[:, None] - rate[None, :]))
    new = mirror_step(rate, ((beta / c, current),))
    weights = torch.rand((ARMS, ARMS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for weight in (weights, torch.ones_like(weights)):
        slope = pair_slope(dno(beta=beta).objective, new, weight, label, old=current)
        same(slope, torch.zeros(ARMS, dtype=torch.float64))
        assert float(pair_slope(dno(beta=beta).objective, current, weight, label, old=current).norm()) > 1e-3


def test_dno_pairs_of_students_and_teacher() -> None:
    """The teacher's answer is judged with the group; only pairs far apart are made; without it no demonstration is in a pair."""
    task, policy = arms(4), table(logits(3, 4))
    game = PreferenceGame.bradley_terry(torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64))
    shown = TabularPrompts(task, {0: [3]})
    recipe = dno(group=6, judge=judged(game), gap=0.15)
    batch = tabular_rollouts(task, policy, recipe.rollouts, 0, shown).draw(0, 0)
    taught = batch["behavior_logp"].isnan()
    assert bool(taught.any())
    assert bool(batch["chosen"][taught].all())
    win, chosen = batch["win_rate"], batch["chosen"]
    assert float((win[chosen] - win[~chosen]).min()) >= 0.15
    assert float(win[chosen].min()) >= 0.5
    assert set(batch["confidence"].tolist()) == {1.0}
    alone = tabular_rollouts(task, policy, dno(group=6, judge=judged(game), teacher=0, gap=0.15).rollouts, 0).draw(0, 0)
    assert not bool(alone["behavior_logp"].isnan().any())


# ---- APO -------------------------------------------------------------------------------------------------------------
def test_extrapolated_parameters_are_extrapolated_logits() -> None:
    """theta + alpha (theta - made before) of a table is made (made / made before)^alpha; the snapshot keeps what was made."""
    now, before = table(logits(1)), table(MU)
    renew(before, now, 1.0, 0.4)
    same(now.logits[0, 0, 0].detach().log_softmax(0), geometric_mixture(logits(1), MU, -0.4))
    same(before.logits[0, 0, 0].detach(), logits(1))
    rest, copy = table(MU), table(MU)
    renew(copy, rest, 1.0, 0.9)
    same(rest.logits[0, 0, 0].detach(), MU)


def test_without_momentum_apo_is_its_base() -> None:
    for base, built in (("online-dpo", online_dpo), ("sppo", sppo), ("inpo", inpo)):
        plain = built(every=7, group=5, epochs=1)
        assert apo(base=base, alpha=0.0, every=7) == plain
        assert apo(base=base, alpha=0.3, every=7).but(snapshots=plain.snapshots) == plain
    assert list(apo().snapshots) == ["made", "previous"]
    with pytest.raises(ValueError, match="base is 'dpo'"):
        apo(base="dpo")


def test_a_run_extrapolates_before_it_samples_and_renews_its_reference() -> None:
    """With a rate of 0 but a policy moved by hand: after an iteration policy, momentum and reference are as in the paper."""
    task, policy = arms(), table(MU)
    recipe = apo(alpha=0.5, every=2, judge=judged(GAME))
    seen: list[Tensor] = []

    def watch(step: int) -> None:
        seen.append(policy.logits[0, 0, 0].detach().clone())
        if step == 1:
            with torch.no_grad():
                policy.logits.add_(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64))

    source = FreshAndReplayed(tabular_rollouts(task, policy, recipe.rollouts, 0), 0)
    train((recipe,), policy, source, steps=5, rate=0.0, watch=watch)
    move = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    same(seen[1], MU + move)
    same(seen[2], MU + 1.5 * move)
    same(seen[4], MU + 1.5 * move + 0.25 * move)


# ---- judges and pairs ------------------------------------------------------------------------------------------------
def answers_of(score: Sequence[float]) -> Answers:
    drawn = drawn_of(arms(), table(MU))
    values = torch.tensor(score, dtype=torch.float64)
    return Answers([drawn.prompts[0]] * len(score), [[0]] * len(score), {"reward": values})


def test_judges_of_scores() -> None:
    drawn, first, second = drawn_of(arms(), table(MU)), answers_of([1.0, 0.0, 2.0]), answers_of([0.0, 0.0, 3.0])
    same(ScoreJudge(0.5)(first, second, drawn), torch.sigmoid(torch.tensor([2.0, 0.0, -2.0])).double(), 1e-7)
    assert ScoreJudge(0.0)(first, second, drawn).tolist() == [1.0, 0.5, 0.0]
    many = Verdicts(ScoreJudge(0.5))(answers_of([1.0] * 4000), answers_of([0.0] * 4000), drawn)
    assert float(many.mean()) == pytest.approx(0.8808, abs=0.02)
    assert set(many.tolist()) == {0.0, 1.0}
    assert torch.equal(many, Verdicts(ScoreJudge(0.5))(answers_of([1.0] * 4000), answers_of([0.0] * 4000), drawn))


def test_a_function_is_made_symmetric_and_checked() -> None:
    drawn, first = drawn_of(arms(), table(MU)), answers_of([0.0, 0.0])
    lopsided = FunctionJudge(lambda prompts, answers, others, **columns: [0.9, 0.6, 0.3, 0.6])
    same(lopsided(first, first, drawn), torch.tensor([0.8, 0.5], dtype=torch.float64), 1e-12)
    with pytest.raises(RewardError, match="3 values for 4 pairs"):
        FunctionJudge(lambda *a, **k: [0.5] * 3)(first, first, drawn)
    with pytest.raises(RewardError, match=r"returned 1.5 for pair 1"):
        FunctionJudge(lambda *a, **k: [0.5, 1.5, 0.5, 0.5])(first, first, drawn)
    with pytest.raises(ValueError, match="expected reward, model"):
        judge_of("best", 1.0)
    assert judge_of("reward", 0.3) == ScoreJudge(0.3)


def test_pairs_of_groups() -> None:
    batch = groups_of([(0, 1, 2), (2,), (1, 0)]).with_columns(
        "episode", win_rate=torch.tensor([0.2, 0.9, 0.9, 0.5, 0.5, 0.5]).double()
    )
    assert Choice()(batch).T.tolist() == [[0, 1], [0, 2], [1, 2], [4, 5]]
    assert Disjoint()(batch).T.tolist() == [[0, 1], [4, 5]]
    assert Extremes()(batch).T.tolist() == [[1, 0]]
    assert FarApart("win_rate", 0.5, 0.5)(batch).T.tolist() == [[1, 0], [2, 0]]
    drawn = drawn_of(arms(), table(MU))
    made = Paired(ScoreJudge(1.0))(batch, drawn)
    assert made.lengths("group", "episode").tolist() == [2] * 4
    assert made["token"].tolist() == [1, 0, 2, 0, 2, 1, 1, 0]
    assert made["chosen"].tolist() == [True, False] * 4
    same(made["confidence"][::2], torch.sigmoid(torch.tensor([1.0, 2.0, 1.0, 1.0])).double(), 1e-7)
    nothing = Paired(ScoreJudge(1.0), FarApart(gap=9.0))(batch, drawn)
    assert not bool(nothing["chosen"].any())
    assert float(Pairwise(score=LogRatioScore(0.1, "old"), link=Link(), rows=rollouts)(
        nothing.with_columns("step", old_logp=torch.zeros(nothing.count("step")).double()),
        {"logp": torch.zeros(nothing.count("step")).double()})) == 0.0  # fmt: skip


def test_settings_that_cannot_be_are_told() -> None:
    with pytest.raises(ValueError, match="0 <= tau <= eta"):
        inpo(tau=1.0, eta=0.5)
    with pytest.raises(ValueError, match="at least one step"):
        sppo(every=0)
    with pytest.raises(ValueError, match="hard for the best and the worst"):
        sppo(labels="hard", answers="all")
    with pytest.raises(ValueError, match="pairs is 'best'"):
        inpo(pairs="best")
    assert Sampled(share=0.0).players == frozenset()
