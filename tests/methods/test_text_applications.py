"""Q-Insight, RLPT and SOPHIA are the sums that they say: exact in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.toys import gradient, rollouts_of
from unipo.episodes import Episodes
from unipo.methods.catalog import build, find
from unipo.objectives import EpisodeMean, KLPenalty, Likelihood, Probability
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.rewards import Formatted, ForTask, RewardSet, Within, WordByWord
from unipo.sources.prompts import Prompt
from unipo.sources.text.rollouts import Scored
from unipo.sources.text.tabular import NumberTokenizer
from unipo.sources.text.two_stage import (
    DescribeThenReason,
    chosen,
    describe_then_reason,
    description_values,
    selected,
)
from unipo.tasks.tabular import TabularTask


# ---- Q-Insight -------------------------------------------------------------------------------------------------------
def rated(width: float) -> list[list[float]]:
    """Rewards of two prompts by a router: scores of 3.0 within a tolerance, and classes; all of the right form."""
    rewards = RewardSet((
        ("score", ForTask("score", Within(width)), 1.0), ("damage", ForTask("damage", WordByWord()), 1.0),
        ("form", Formatted(), 1.0)))  # fmt: skip
    said = ["3.1", "2.9", "4.0", "3.5", "noise 1", "noise 2", "blur 1", "blur 2"]
    columns = {"task": ["score"] * 4 + ["damage"] * 4, "answer": ["3.0"] * 4 + ["noise 2"] * 4,
               "form": [r"\d\.\d"] * 4 + [r"\w+ \d"] * 4}  # fmt: skip
    total, _, _ = rewards(["p"] * 8, said, columns)
    return [total[:4], total[4:]]


LENGTHS = [[1, 2, 3, 2], [2, 4, 1, 3]]


def test_rewards_of_two_tasks_are_routed_and_summed() -> None:
    assert rated(0.35) == [[2.0, 2.0, 1.0, 1.0], [1.25, 2.0, 1.0, 1.0]]


def test_q_insight_with_a_tolerance_without_end_is_its_kl_term() -> None:
    """Every score is right, every advantage 0; what is left is kl * SEQ(k3)."""
    episodes, logp = rollouts_of([rated(math.inf)[0]] * 2, LENGTHS, drift=0.3)
    found = gradient(find("q-insight").build().objective, episodes, logp)
    penalty = 0.001 * KLPenalty(aggregate=EpisodeMean())
    assert torch.equal(found, gradient(penalty, episodes, logp))
    length = episodes.expand(episodes.lengths())
    by_hand = 0.001 * (1 - torch.exp(episodes["reference_logp"] - logp)) / (8 * length)
    assert torch.allclose(found, by_hand, atol=1e-15)


def test_q_insight_on_one_task_is_grpo() -> None:
    """And its gradient is that of the formula, written out for every token."""
    assert build("q-insight", {}) == build("grpo", {"grpo": {"eps": 1e-4, "kl": 0.001}})
    rewards = rated(0.35)[:1]
    episodes, logp = rollouts_of(rewards, LENGTHS[:1], drift=0.15)
    won = torch.tensor(rewards[0]).double()
    advantage, r = episodes.expand((won - 1.5) / (won.std() + 1e-4)), torch.exp(logp - episodes["behavior_logp"])
    inside = ~(((advantage > 0) & (r > 1.2)) | ((advantage < 0) & (r < 0.8)))
    share = 1 / (4 * episodes.expand(episodes.lengths()))
    pull = 0.001 * (1 - torch.exp(episodes["reference_logp"] - logp)) * share
    found = gradient(find("q-insight").build().objective, episodes, logp)
    assert torch.allclose(found, pull - inside * r * advantage * share, atol=1e-14)


@pytest.mark.parametrize(("eps", "tolerance"), [(0.0, 1e-15), (1e-4, 1e-3)])
def test_the_scale_of_one_tasks_rewards_does_not_reach_another(eps: float, tolerance: float) -> None:
    """Ten times the rewards of the first prompt: its z-scores stay (up to eps), the other prompt's gradient does exactly."""
    objective = build("q-insight", {"q-insight": {"eps": eps, "kl": 0.0}}).objective
    scores, classes = rated(0.35)
    plain, logp = rollouts_of([scores, classes], LENGTHS, drift=0.1)
    scaled = plain.with_columns("episode", reward=torch.tensor([[10 * r for r in scores], classes]).double().flatten())
    before, after = gradient(objective, plain, logp), gradient(objective, scaled, logp)
    first = plain.expand(plain.index("group", "episode")) == 0
    assert torch.equal(before[~first], after[~first])
    assert float(before[first].norm()) > 0
    assert float((before - after)[first].norm() / before[first].norm()) <= tolerance
    assert (eps == 0.0) or not torch.equal(before[first], after[first])


# ---- RLPT ------------------------------------------------------------------------------------------------------------
def expected_gradient(recipe: Recipe, task: TabularTask, policy: TabularPolicy, name: str) -> Tensor:
    """The gradient of the logits in expectation over all groups of two, on-policy."""
    probability = task.log_probability(policy).exp()[0].detach()
    total = torch.zeros_like(policy.logits)
    for (i, a), (j, b) in itertools.product(enumerate(task.sequences), repeat=2):
        pair = Episodes.build([a, b], [[0], [0]], [0, 0], kind=["rollout"] * 2, prompt_id=[0, 0], task=[name] * 2,
                              truncated=[False] * 2, reward=[task.reward(0, a), task.reward(0, b)])  # fmt: skip
        logp = policy.signals(pair, ["logp"])["logp"]
        pair = pair.with_columns("step", behavior_logp=logp.detach())
        loss = recipe.objective(pair, {"logp": logp})
        total += probability[i] * probability[j] * torch.autograd.grad(loss, policy.logits, allow_unused=True)[0]
    return total


TARGET = 1


def test_rlpt_of_one_token_has_the_gradient_of_next_token_accuracy() -> None:
    """-grad p(y) / sqrt 2 (the z-score of a pair of 0 and 1 doubles what leaving one out halves), which is DFT's direction."""
    task = TabularTask(1, 3, 1, lambda prompt, tokens: float(tokens[0] == TARGET))
    policy = TabularPolicy.random(1, 1, 3, seed=3)
    found = expected_gradient(build("rlpt", {"rlpt": {"group": 2}}), task, policy, "asr")
    accuracy = task.gradient(policy)
    assert torch.allclose(found, -accuracy / 2**0.5, rtol=1e-5, atol=1e-9)
    shown = Episodes.build([[TARGET]], [[0]], kind=["demo"], prompt_id=[0], truncated=[False])
    logp = policy.signals(shown, ["logp"])
    dft = torch.autograd.grad(Likelihood(weight=Probability())(shown, logp), policy.logits)[0]
    assert torch.allclose(dft, -accuracy, atol=1e-12)


def test_rlpt_with_a_thought_has_the_gradient_of_the_marginal_probability() -> None:
    """A thought z, then y: sum_z pi(z) pi(y | z), enumerated. Half of it, as each token is half of its episode."""
    task = TabularTask(1, 3, 2, lambda prompt, tokens: float(tokens[1] == TARGET))
    policy = TabularPolicy.random(1, 2, 3, seed=4)
    logits = policy.logits.detach().requires_grad_()
    thought, answer = logits[0, 0, 3].softmax(-1), logits[0, 1, :3].softmax(-1)[:, TARGET]
    marginal = torch.autograd.grad((thought * answer).sum(), logits)[0]
    assert torch.allclose(task.gradient(policy), marginal, atol=1e-12)
    found = expected_gradient(build("rlpt", {"rlpt": {"group": 2, "masked": 1.0}}), task, policy, "msr")
    assert torch.allclose(found, -marginal / (2 * 2**0.5), rtol=1e-5, atol=1e-9)


def reading(tasks: list[str], drift: float = 0.2) -> tuple[Episodes, Tensor]:
    rewards = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    episodes, logp = rollouts_of(rewards[: len(tasks)], ([[1, 2, 3, 2], [2, 4, 1, 3]] * 2)[: len(tasks)], drift=drift)
    return episodes.with_columns("episode", task=[t for t in tasks for _ in range(4)]), logp


def test_rlpt_without_lambda_is_asr_alone() -> None:
    episodes, logp = reading(["asr", "msr", "asr", "msr"])
    asr = episodes.category("task", "asr")
    steps = episodes.expand(asr)
    found = gradient(build("rlpt", {"rlpt": {"masked": 0.0}}).objective, episodes, logp)
    alone = gradient(build("grpo", {}).objective, episodes.select(asr), logp[steps])
    assert torch.equal(found[steps], alone)
    assert not found[~steps].any()


def test_rlpt_averages_each_task_over_its_own_episodes() -> None:
    """One ASR and three MSR prompts: neither loss notices how many there are of the other."""
    episodes, logp = reading(["msr", "asr", "msr", "msr"])
    found = gradient(build("rlpt", {}).objective, episodes, logp)
    for task, scale in (("asr", 1.0), ("msr", 0.5)):
        own = episodes.category("task", task)
        steps = episodes.expand(own)
        alone = gradient(build("grpo", {}).objective, episodes.select(own), logp[steps])
        assert float(alone.norm()) > 0
        assert torch.allclose(found[steps], scale * alone, atol=1e-15)


@pytest.mark.parametrize("reward", [0.0, 0.3, 1.0])
def test_rlpt_with_a_constant_judge_has_no_gradient(reward: float) -> None:
    episodes, logp = reading(["asr", "msr"])
    constant = episodes.with_columns("episode", reward=torch.full((8,), reward, dtype=torch.float64))
    assert not gradient(build("rlpt", {}).objective, constant, logp).any()


# ---- SOPHIA ----------------------------------------------------------------------------------------------------------
def traces_of(right: list[list[list[int]]], lengths: list[list[list[int]]] | None = None) -> Episodes:
    """`right[query][description][trace]`; every trace of one token where no `lengths` are given."""
    flat = [(q, f"{q}/{c}", r, (lengths[q][c][n] if lengths else 1)) for q, own in enumerate(right)
            for c, rs in enumerate(own) for n, r in enumerate(rs)]  # fmt: skip
    codes = {name: i for i, name in enumerate(dict.fromkeys(name for _, name, _, _ in flat))}
    return Episodes.build(
        [[0] * n for *_, n in flat], [[q] for q, *_ in flat], [q for q, *_ in flat], kind=["demo"] * len(flat),
        prompt_id=[q for q, *_ in flat], truncated=[False] * len(flat), description=[codes[c] for _, c, *_ in flat],
        reward=[float(r) for _, _, r, _ in flat],
    )  # fmt: skip


def picked(traces: Episodes, threshold: float = 0.75, keep: int = 1) -> list[int]:
    return selected(traces, threshold, keep).nonzero().flatten().tolist()


def test_selection_by_hand() -> None:
    """Query 0: its first description is worth 1/2, the second 1. Query 1: nothing passes. Query 2: all right, not dropped."""
    right = [[[1, 0], [1, 1]], [[1, 0], [0, 1]], [[1, 1], [1, 1]]]
    lengths = [[[1, 1], [5, 3]], [[1, 1], [1, 1]], [[4, 2], [2, 2]]]
    traces = traces_of(right, lengths)
    assert description_values(traces).tolist() == [0.5, 0.5, 1, 1, 0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1]
    assert picked(traces) == [3, 9], "the shortest; of equals the first of the first description"
    assert picked(traces, keep=2) == [2, 3, 9, 10]
    assert picked(traces, keep=99) == [2, 3, 8, 9, 10, 11]
    assert picked(traces, threshold=0.4) == [0, 4, 9], "an outcome filter alone"
    assert chosen(traces, DescribeThenReason()).lengths("group", "episode").tolist() == [1, 1]
    assert chosen(traces, DescribeThenReason())["prompt_id"].tolist() == [0, 2]


@pytest.mark.parametrize("threshold", [0.1, 0.75])
def test_one_trace_per_description_is_rejection_sampling(threshold: float) -> None:
    """N = 1: the description is worth what its trace is, so that the shortest right trace is kept (STaR with a teacher)."""
    right, lengths = [[[0], [1], [1]], [[0], [0], [0]]], [[[1], [4], [2]], [[1], [1], [1]]]
    assert picked(traces_of(right, lengths), threshold) == [2]
    assert picked(traces_of(right, lengths), threshold, keep=3) == [1, 2]


def test_the_share_of_descriptions_that_pass() -> None:
    """7 or 8 of 8, since 6/8 is not above .75: with probability 8 q^7 - 7 q^8."""
    passing = [k for k in range(9) if picked(traces_of([[[1] * k + [0] * (8 - k)]]))]
    assert passing == [7, 8]
    for q in (0.3, 0.8, 0.95):
        share = sum(math.comb(8, k) * q**k * (1 - q) ** (8 - k) for k in passing)
        assert share == pytest.approx(8 * q**7 - 7 * q**8, abs=1e-12)


def prompts(n: int) -> list[Prompt]:
    return [Prompt(id=i, text=str(i), columns={"describe_prompt": f"see {i}", "reason_prompt": f"ask {i} of {{description}}"})
            for i in range(n)]  # fmt: skip


def round_of(n: int, spec: DescribeThenReason, describe, reason):  # type: ignore[no-untyped-def]
    """A round over `n` prompts whose right answer is "1"."""

    def reward(texts, answers, columns) -> Scored:  # type: ignore[no-untyped-def]
        return Scored(
            torch.tensor([float(a.split()[-1] == "1") for a in answers]), torch.ones(len(answers), dtype=torch.bool)
        )

    return describe_then_reason(prompts(n), spec, describe, reason, reward, Ended(), 0)


class Ended(NumberTokenizer):
    """Numbers, and an end of 9."""

    eos_token_id = 9


def test_a_description_is_worth_its_probability_of_success() -> None:
    """E[R(c)] = P(right | c): over all outcomes of three traces, by their probability."""
    q, spec = 0.3, DescribeThenReason(descriptions=1, traces=3)
    expected = 0.0
    for outcome in itertools.product((0, 1), repeat=3):
        made = round_of(1, spec, lambda asked, keys: ["7"], lambda asked, keys, o=outcome: [str(x) for x in o])
        worth = description_values(made)
        assert worth.tolist() == pytest.approx([sum(outcome) / 3] * 3)
        expected += math.prod(q if x else 1 - q for x in outcome) * float(worth[0])
    assert expected == pytest.approx(q, abs=1e-12)


def test_the_policy_as_its_own_reasoner_is_rejection_sampling() -> None:
    """One description that says nothing and no rule about lengths: every right trace of the query is learned from."""
    said = ["1", "5 1", "0", "4", "1"]
    made = round_of(
        2, DescribeThenReason(descriptions=1, traces=5), lambda asked, keys: [""] * 2, lambda asked, keys: said * 2
    )
    kept = chosen(made, DescribeThenReason(descriptions=1, traces=5, threshold=0.0, keep=5))
    texts = [kept["token"][kept.step_index(torch.tensor([i]))].tolist() for i in range(len(kept))]
    assert texts == [[1, 9], [5, 1, 9], [1, 9]] * 2
    assert kept["prompt_id"].tolist() == [0, 0, 0, 1, 1, 1]


def test_each_stage_sees_what_it_may() -> None:
    """The describer no question, the reasoner no prompt; neither description nor question is in context or target."""
    seen: dict[str, list[str]] = {}

    def describe(asked, keys):  # type: ignore[no-untyped-def]
        seen["describe"] = list(asked)
        assert len({tuple(k) for k in keys.tolist()}) == len(asked)
        return [f" {i} " for i in range(len(asked))]

    def reason(asked, keys):  # type: ignore[no-untyped-def]
        seen["reason"] = list(asked)
        assert len({tuple(k) for k in keys.tolist()}) == len(asked)
        return ["1"] * len(asked)

    made = round_of(2, DescribeThenReason(descriptions=2, traces=2), describe, reason)
    assert seen["describe"] == ["see 0", "see 0", "see 1", "see 1"]
    assert seen["reason"] == ["ask 0 of 0"] * 2 + ["ask 0 of 1"] * 2 + ["ask 1 of 2"] * 2 + ["ask 1 of 3"] * 2
    assert made["prompt"].tolist() == [0] * 4 + [1] * 4
    assert made["token"].tolist() == [1, 9] * 8
    assert made["description"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert made.lengths("group", "episode").tolist() == [4, 4]


def test_sophia_is_likelihood_of_the_selected_traces() -> None:
    """The gradient of the mean cross-entropy of selected tokens, and nothing from the others."""
    right, lengths = [[[1, 1], [1, 0]], [[0, 1], [1, 1]]], [[[3, 2], [1, 1]], [[1, 1], [4, 5]]]
    kept = chosen(traces_of(right, lengths), find("sophia").build().round)  # type: ignore[arg-type]
    assert kept.lengths().tolist() == [2, 4]
    logp = -torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        gradient(find("sophia").build().objective, kept, logp), torch.full((6,), -1 / 6).double(), atol=1e-15
    )
    assert "reward" not in kept, "a trace's reward is not that of an answer of the policy"


@pytest.mark.parametrize("bad", [{"traces": 0}, {"descriptions": 0}, {"keep": 0}, {"queries": 0}])
def test_rounds_of_nothing_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        find("sophia").build(**bad)


def test_a_sum_keeps_the_round_of_its_terms() -> None:
    spec = find("sophia").build().round
    assert build("grpo+0.5*sophia", {}).round == build("sophia+grpo", {}).round == spec
    assert build("grpo+0.5*sophia", {}).kinds == ("rollout", "demo")
