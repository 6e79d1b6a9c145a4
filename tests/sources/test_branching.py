"""Completions behind prefixes, trees of segments, step candidates, and answers that are written over several steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unipo.episodes import Episodes
from unipo.objectives import GroupStd
from unipo.policies.tabular import TabularPolicy
from unipo.reproduce.network import NetworkPolicy
from unipo.sources.companions.step_critic import FittedCritic
from unipo.sources.spec import RolloutSpec
from unipo.sources.stages.augment import Augment
from unipo.sources.stages.branching import (
    ADVANTAGE,
    After,
    Cut,
    Every,
    MaskLikely,
    SegmentValues,
    StepCandidates,
    Unlikely,
    balanced,
)
from unipo.sources.stages.trees import SegmentTree
from unipo.sources.text.filters import MixedOutcomes
from unipo.sources.text.rollouts import Rollouts
from unipo.sources.text.tabular import NumberTokenizer, tabular_rollouts
from unipo.tasks.tabular import TabularTask

TOKENIZER = NumberTokenizer()


def made(end: int | None = None, length: int = 4) -> tuple[TabularTask, TabularPolicy]:
    task = TabularTask(2, 3, length, lambda prompt, tokens: float(sum(tokens) % 3 == prompt), end)
    return task, TabularPolicy.random(2, length, 3)


def source(*stages: Augment, group: int = 4, end: int | None = None, seed: int = 0, length: int = 4) -> Rollouts:
    task, policy = made(end, length)
    return tabular_rollouts(task, policy, RolloutSpec(group=group, augment=stages), seed)


def exact_value(task: TabularTask, policy: TabularPolicy, prompt: int, written: tuple[int, ...]) -> float:
    """Expected reward behind a prefix, by enumeration."""
    logp = task.log_probability(policy)[prompt].detach()
    fits = torch.tensor([s[: len(written)] == written for s in task.sequences])
    weight = logp[fits].exp()
    return float((weight * task.rewards[prompt][fits]).sum() / weight.sum())


def answers(tokens: list[list[int]], logp: list[list[float]] | None = None) -> Episodes:
    probability = logp or [[0.5] * len(t) for t in tokens]
    log = [torch.tensor(p, dtype=torch.float64).log() for p in probability]
    return Episodes.build(tokens, [[0]] * len(tokens), behavior_logp=log)


# ---- cuts --------------------------------------------------------------------------------------------------------------
def test_cuts_by_hand() -> None:
    rows = answers([[1, 2, 3, 2, 5], [2, 2, 7]], [[0.95, 0.5, 0.2, 0.99, 0.6], [0.1, 0.9, 0.4]])
    assert Cut()(rows, TOKENIZER).tolist() == [0, 5]
    assert Every(2)(rows, TOKENIZER).tolist() == [0, 2, 4, 5, 7]
    assert Unlikely(0.9, 1)(rows, TOKENIZER).tolist() == [1, 2, 4, 5, 7]
    assert Unlikely(0.9, 2)(rows, TOKENIZER).tolist() == [1, 4, 5]
    assert Unlikely(1.0, 3)(rows, TOKENIZER).tolist() == [0, 3, 5]
    assert After("2")(rows, TOKENIZER).tolist() == [0, 2, 4, 5, 6, 7]


def test_likely_steps_are_masked() -> None:
    rows = source(SegmentValues(Unlikely(), 1), MaskLikely(0.6)).draw(0, 0)
    assert torch.equal(rows["mask"], rows["behavior_logp"].double().exp() < 0.6)
    assert 0 < int(rows["mask"].sum()) < rows.count("step")


# ---- values ------------------------------------------------------------------------------------------------------------
def test_segment_values_are_those_of_enumeration() -> None:
    """With many completions every step's A is V(next boundary) - V(own boundary), and along an answer they telescope."""
    rollouts = source(SegmentValues(Every(2), 3000), group=2)
    task, policy = made()
    rows = rollouts.draw(0, 0)
    parts = rows[ADVANTAGE].split(rows.lengths().tolist())
    for i, tokens in enumerate(rows["token"].split(rows.lengths().tolist())):
        prompt, written = int(rows["prompt_id"][i]), tuple(tokens.tolist())
        value = [exact_value(task, policy, prompt, written[:n]) for n in (0, 2)]
        reward = float(rows["reward"][i])
        exact = torch.tensor([value[1] - value[0]] * 2 + [reward - value[1]] * 2).double()
        torch.testing.assert_close(parts[i], exact, atol=0.04, rtol=0)


def test_all_tokens_are_counted_and_equal_prefixes_are_completed_once() -> None:
    """Two prompts, each with the prefixes () and those after two tokens that differ; 5 completions of 4 and of 2 tokens."""
    rollouts = source(SegmentValues(Every(2), 5), group=6)
    rows = rollouts.draw(0, 0)
    halves = {(int(q), *t[:2].tolist()) for q, t in zip(rows["prompt_id"], rows["token"].split(4), strict=True)}
    assert 2 < len(halves) < 12
    assert rollouts.tokens_sampled == 12 * 4 + 2 * 5 * 4 + len(halves) * 5 * 2
    assert rollouts.metrics["rollouts"] == 12


def test_boundaries_without_a_value_are_none() -> None:
    """A reward that fails for everything but whole first rollouts leaves no boundary: no advantage at all."""
    rollouts = source(SegmentValues(Every(2), 2))
    whole, calls = rollouts.reward, []

    def failing(prompts, completions, columns):  # type: ignore[no-untyped-def]
        calls.append(1)
        scored = whole(prompts, completions, columns)
        return scored if len(calls) == 1 else type(scored)(scored.reward, torch.zeros_like(scored.kept))

    rollouts.reward = failing
    assert rollouts.draw(0, 0)[ADVANTAGE].abs().max() == 0


def test_no_uncertain_token_means_no_segment() -> None:
    rollouts = source(SegmentValues(Unlikely(1e-9), 2))
    assert rollouts.draw(0, 0)[ADVANTAGE].tolist() == [0.0] * 32
    assert rollouts.tokens_sampled == 32


# ---- trees -------------------------------------------------------------------------------------------------------------
def edges_of(tree: SegmentTree, end: int | None = None, seed: int = 0, length: int = 6) -> tuple[Episodes, Rollouts]:
    rollouts = source(tree, group=tree.branching[0], end=end, seed=seed, length=length)
    return rollouts.draw(0, 3), rollouts


@pytest.mark.parametrize("end", [None, 0])
def test_siblings_add_up_to_zero_and_values_are_means_of_children(end: int | None) -> None:
    """All edges of one tree: over the children of a node sum A = 0; an inner node is worth the mean of its children."""
    tree = SegmentTree((4, 3, 2), tokens=2)
    task, policy = made(end, 6)
    rollouts = tabular_rollouts(task, policy, RolloutSpec(group=4), 0)
    seen: list[Episodes] = []

    class Looking(SegmentTree):
        def edges(self, groups, drawn):  # type: ignore[no-untyped-def]
            seen.append(super().edges(groups, drawn))
            return seen[-1]

    rollouts.spec = RolloutSpec(group=4, augment=(Looking(tree.branching, tree.tokens),))
    rollouts.draw(0, 0)
    edges = seen[0]
    total = edges.reduce(edges["advantage"], to="group", level="episode")
    assert float(total.abs().max()) < 1e-12
    value = edges.reduce(edges["reward"], to="group", how="mean", level="episode")
    contexts = edges.context().values.split(edges.context().offsets.diff().tolist())  # type: ignore[union-attr]
    first = [c.tolist() for c in contexts]
    group = edges.index("group", "episode").tolist()
    checked = 0
    for i, tokens in enumerate(edges["token"].split(edges.lengths().tolist())):
        below = [g for j, g in enumerate(group) if first[j] == [*first[i], *tokens.tolist()]]
        if below and len(set(below)) == 1:
            assert float(edges["reward"][i]) == pytest.approx(float(value[below[0]]), abs=1e-12)
            checked += 1
    assert checked > 3


def test_a_tree_of_one_level_is_its_group() -> None:
    edges, rollouts = edges_of(SegmentTree((5,), tokens=2))
    plain = source(group=5, length=6).draw(0, 3)
    live = plain.reduce("reward", to="group", how="max") > plain.reduce("reward", to="group", how="min")
    mean = plain.reduce("reward", to="group", how="mean")[plain.index("group", "episode")]
    expected = (plain["reward"] - mean)[plain.expand(live, to="episode", level="group")]
    torch.testing.assert_close(edges[ADVANTAGE].split(6)[0][0], expected[0])
    assert edges["reward"].tolist() == plain["reward"][plain.expand(live, to="episode", level="group")].tolist()
    assert rollouts.tokens_sampled == 10 * 6


def test_every_token_of_a_tree_is_in_one_edge() -> None:
    tree = SegmentTree((3, 2, 2), tokens=2, most=1000, batch=1000, scale=GroupStd(eps=0.0))
    rollouts = source(tree, group=3, length=6)
    rows = rollouts.draw(0, 0)
    assert rollouts.tokens_sampled == 2 * (3 * 6 + 3 * 4 + 6 * 2)
    assert set(rows.lengths().tolist()) == {2}
    assert rows.count("step") <= rollouts.tokens_sampled
    assert not rows["truncated"].any()
    policy = made(length=6)[1]
    logp = policy.signals(rows, ["logp"])["logp"].detach()
    torch.testing.assert_close(rows["behavior_logp"].double(), logp, atol=1e-5, rtol=0)


def test_edges_wait_for_later_steps_and_grow_old(tmp_path: Path) -> None:
    rollouts = source(SegmentTree((4, 4), tokens=2, most=3, batch=100, keep=2), group=4)
    first = rollouts.draw(0, 0)
    assert first.lengths("group", "episode").max() <= 3
    waiting = rollouts.kept["edges"]
    assert set(waiting["begun"].tolist()) == {0}
    rollouts.save(tmp_path)
    again = source(SegmentTree((4, 4), tokens=2, most=3, batch=100, keep=2), group=4)
    again.load(tmp_path)
    again.load_state_dict(rollouts.state_dict())
    later = rollouts.draw(1, 1)
    assert torch.equal(again.draw(1, 1)["token"], later["token"])
    assert set(later["policy_version"].tolist()) == {0, 1}
    rollouts.draw(2, 2)
    assert 0 not in rollouts.kept["edges"]["begun"].tolist(), "two steps old: forgotten"


# ---- candidates of steps -----------------------------------------------------------------------------------------------
def test_candidates_are_first_steps_with_their_values() -> None:
    """Steps of one token: every state's group has 2000 candidates; q and their mean are those of enumeration."""
    rollouts = source(StepCandidates(Every(1), solutions=1, completions=2000, values=0), group=2, length=3)
    task, policy = made(length=3)
    rows = rollouts.draw(0, 0)
    assert rows.count("group") == 6
    assert rows.lengths().unique().tolist() == [1]
    contexts = rows.context().values.split(rows.context().offsets.diff().tolist())  # type: ignore[union-attr]
    for i in (0, 2500, 5000, 11999):
        prompt, *written = contexts[i].tolist()
        exact = exact_value(task, policy, prompt, (*written, int(rows["token"][i])))
        assert float(rows["reward"][i]) == pytest.approx(exact, abs=0.06)
    index = rows.index("group", "episode")
    mean = rows.reduce(rows["reward"], to="group", how="mean", level="episode")
    advantage = rows["reward"] - mean[index]
    assert float(rows.reduce(advantage, to="group", level="episode").abs().max()) < 1e-9


def test_values_of_candidates_can_be_sampled_anew_and_ends_keep_their_reward() -> None:
    rollouts = source(StepCandidates(Every(2), solutions=2, completions=4, values=400), group=4)
    task, policy = made()
    rows = rollouts.draw(0, 0)
    contexts = rows.context().values.split(rows.context().offsets.diff().tolist())  # type: ignore[union-attr]
    for i, tokens in enumerate(rows["token"].split(rows.lengths().tolist())):
        prompt, *written = contexts[i].tolist()
        exact = exact_value(task, policy, prompt, (*written, *tokens.tolist()))
        assert float(rows["reward"][i]) == pytest.approx(exact, abs=0.0 if len(written) == 2 else 0.1)


def test_balanced_answers() -> None:
    rows = answers([[0]] * 10).with_columns("episode", reward=torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, 0, 1]))
    groups = rows.grouped(torch.tensor([0] * 5 + [1] * 5))
    assert balanced(groups, 4).tolist() == [0, 1, 2, 4, 5, 6, 7, 9]
    assert balanced(groups, 2).tolist() == [0, 4, 5, 9]


# ---- partial rollouts --------------------------------------------------------------------------------------------------
def windowed(window: float, end: int | None = None, group: int = 2) -> Rollouts:
    task, policy = made(end, 6)
    return tabular_rollouts(task, policy, RolloutSpec(group=group, window=window), 0)


def test_a_window_of_the_whole_answer_gives_plain_rollouts() -> None:
    whole, task = windowed(1.0).draw(0, 5), made(None, 6)
    plain = tabular_rollouts(*task, RolloutSpec(group=2), 0).draw(0, 5)
    for name in ("token", "behavior_logp", "reward", "truncated", "prompt_id", "policy_version", "kind"):
        assert torch.equal(whole[name], plain[name]), name
    assert whole["current"].all()
    assert whole["finished"].all()


@pytest.mark.parametrize("end", [None, 0])
def test_answers_go_on_where_they_were_cut(end: int | None) -> None:
    """Windows of 2 of 6: every row begins with what it was, each token keeps its log-prob, and slots are never empty."""
    rollouts = windowed(1 / 3, end)
    before: dict[int, list[int]] = {}
    for step in range(6):
        rows = rollouts.draw(step, 10 + step)
        assert len(rows) == 4
        parts = zip(rows["token"].split(rows.lengths().tolist()), rows["finished"].tolist(), strict=True)
        tokens = [(t.tolist(), done) for t, done in parts]
        carried = [t for t, _ in tokens if len(t) > 2]
        assert all(any(t[: len(b)] == b for b in before.values()) for t in carried)
        current = rows.reduce(rows["current"].long())
        assert int(current.max()) <= 2
        assert torch.equal(rows["current"], rows["token_version"] == 10 + step)
        for (t, done), cut, reward in zip(tokens, rows["truncated"].tolist(), rows["reward"].tolist(), strict=True):
            ended = len(t) == 6 or (end is not None and t[-1] == end)
            assert done == ended != cut
            assert done or reward == 0.0
        logp = made(end, 6)[1].signals(rows, ["logp"])["logp"].detach()
        torch.testing.assert_close(rows["behavior_logp"].double(), logp, atol=1e-5, rtol=0)
        before = {i: t for i, (t, done) in enumerate(tokens) if not done}
    assert rollouts.position > 4


def test_windows_have_the_policys_distribution() -> None:
    """Finished answers of windows are distributed as whole ones, and so is their reward."""
    task, policy = made(0, 6)
    rollouts = tabular_rollouts(task, policy, RolloutSpec(group=1500, window=1 / 3), 0)
    done = [rows.select(rows["finished"]) for rows in (rollouts.draw(step, step) for step in range(6))]
    rows = Episodes.cat(done)
    rows = rows.select(torch.argsort(rows["prompt_id"], stable=True))
    for prompt, exact in enumerate(task.success(policy).tolist()):
        own = rows["reward"][rows["prompt_id"] == prompt]
        assert float(own.mean()) == pytest.approx(exact, abs=0.04)


def test_unfinished_answers_survive_a_checkpoint(tmp_path: Path) -> None:
    rollouts = windowed(1 / 3, 0)
    for step in range(3):
        rollouts.draw(step, step)
    rollouts.save(tmp_path)
    state = rollouts.state_dict()
    again = windowed(1 / 3, 0)
    again.load(tmp_path)
    again.load_state_dict(state)
    for step in range(3, 6):
        a, b = rollouts.draw(step, step), again.draw(step, step)
        for name in a.columns:
            assert torch.equal(a[name], b[name]), name


def test_metrics_are_of_finished_answers() -> None:
    rollouts = windowed(1 / 3)
    rollouts.draw(0, 0)
    assert rollouts.metrics["rollouts"] == 0.0
    assert rollouts.metrics["reward"] != rollouts.metrics["reward"], "nothing is finished: nothing is known"
    rollouts.draw(1, 1)
    rows = rollouts.draw(2, 2)
    assert rollouts.metrics["reward"] == pytest.approx(float(rows["reward"].mean()))
    assert rollouts.tokens_sampled == 3 * 4 * 2


def test_answers_without_a_reward_leave_their_slot() -> None:
    rollouts = windowed(1.0)
    whole = rollouts.reward

    def failing(prompts, completions, columns):  # type: ignore[no-untyped-def]
        scored = whole(prompts, completions, columns)
        return type(scored)(scored.reward, torch.arange(len(prompts)) > 0)

    rollouts.reward = failing
    assert len(rollouts.draw(0, 0)) == 3
    assert rollouts.dropped["no reward"] == 1


def test_what_windows_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window is 1\.5"):
        RolloutSpec(window=1.5)
    with pytest.raises(ValueError, match="cannot be chosen by group"):
        RolloutSpec(window=0.5, keep=MixedOutcomes())


def test_a_critic_of_steps_is_fitted_to_success_rates() -> None:
    """Twelve updates do little, many reach the rates it was fitted to; a state without a token cannot be read."""
    task, _ = made()
    policy = NetworkPolicy(task, 0)
    states = [(0, (0,), ()), (0, (0,), (1,)), (0, (0,), (1, 2)), (1, (1,), (0,))]
    rates = torch.tensor([0.5, 0.9, 0.1, 0.3], dtype=torch.float64)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    found = FittedCritic(400, 0.03)(states, rates, states[1:], policy)
    assert found.tolist() == pytest.approx(rates[1:].tolist(), abs=0.02)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters()), "a copy is fitted"
    assert not torch.allclose(FittedCritic(1, 0.03)(states, rates, states[1:], policy), rates[1:], atol=0.1)
    assert bool(FittedCritic()(states[:1], rates[:1], states, policy).isnan().all())


def test_a_critic_in_the_place_of_values_samples_nothing_more() -> None:
    """Steps that end an answer keep their reward; the others have the critic's value; completions are all that is sampled."""
    task, _ = made()
    stage = StepCandidates(Every(2), solutions=2, completions=8, critic=FittedCritic(50, 0.03))
    rollouts = tabular_rollouts(task, NetworkPolicy(task, 0), RolloutSpec(group=4, augment=(stage,)), 0)
    batch = rollouts.draw(0, 0)
    context = [len(c) for c in batch.context().values.split(batch.context().offsets.diff().tolist())]
    ends = torch.tensor([n == 3 for n in context])
    assert set(batch["reward"][ends].tolist()) <= {0.0, 1.0}
    assert bool(((batch["reward"][~ends] > 0) & (batch["reward"][~ends] < 1)).all())
    states = batch.count("group")
    assert rollouts.tokens_sampled <= 2 * 4 * 4 + states * 8 * 4
