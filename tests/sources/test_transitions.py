"""Replay of transitions: what is drawn is what was added, with the right neighbours, discounts and probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unipo.episodes import Column, Episodes
from unipo.sources.acting.sum_tree import SumTree
from unipo.sources.acting.transitions import TOGETHER, Prioritised, TransitionReplay, rows_of


def row(
    time: int, env: int = 0, terminated: bool = False, truncated: bool = False, **extra: float
) -> dict[str, np.ndarray]:
    """The step from state `time` to `time + 1`, paid 10^time."""
    return {
        "observation": np.array([[time, env]], dtype=np.float32),
        "action": np.array([time % 3]),
        "reward": np.array([10.0**time], dtype=np.float32),
        "behavior_logp": np.array([-0.5], dtype=np.float32),
        "next_observation": np.array([[time + 1, env]], dtype=np.float32),
        "terminated": np.array([terminated]),
        "truncated": np.array([truncated]),
        "env": np.array([env]),
        "episode_number": np.array([0]),
        "policy_version": np.array([time + 100]),
        **{name: np.array([value], dtype=np.float32) for name, value in extra.items()},
    }


def filled(replay: TransitionReplay, times: range, **ends: int) -> TransitionReplay:
    for t in times:
        replay.add_rows(row(t, terminated=t == ends.get("terminated"), truncated=t == ends.get("truncated")))
    return replay


def by_time(batch: Episodes) -> dict[int, int]:
    """A position in the batch for every time that it holds."""
    return {int(t): i for i, t in enumerate(batch["observation"][:, 0])}


def test_a_drawn_transition_is_the_one_added() -> None:
    batch = filled(TransitionReplay(5, seed=0, gamma=0.9), range(4), terminated=2).sample(200, step=1)
    time = batch["observation"][:, 0]
    assert set(time.tolist()) == {0, 1, 2, 3}
    assert batch["reward"].allclose(10.0**time)
    assert batch["final_observation"][:, 0].equal(time + 1)
    assert batch["action"].equal(time.long() % 3)
    assert batch["policy_version"].equal(time.long() + 100)
    assert batch["terminated"].equal(time == 2)
    assert not batch["truncated"].any()
    assert batch["discount"].allclose(torch.tensor(0.9))
    assert batch.category("kind", "rollout").all()
    assert (batch.count("step"), batch.count("group"), len(batch)) == (200, 200, 200)


def test_the_oldest_make_room_and_all_others_are_drawn_equally() -> None:
    batch = filled(TransitionReplay(4, seed=0), range(7)).sample(40_000, step=0)
    share = torch.bincount(batch["observation"][:, 0].long(), minlength=7) / 40_000
    assert share[:3].sum() == 0
    assert share[3:].allclose(torch.tensor(0.25), atol=0.01)  # four standard deviations


def test_draws_depend_on_step_and_index_alone() -> None:
    replay = filled(TransitionReplay(50, seed=3, noise={"noise": (2,), "z": ()}), range(20))
    first, again = replay.sample(16, 4, 1), replay.sample(16, 4, 1)
    assert all(first[name].equal(again[name]) for name in first.columns)
    assert first["noise"].shape == (16, 2)
    assert first["z"].shape == (16,)
    for other in (replay.sample(16, 4, 2), replay.sample(16, 5, 1)):
        assert not first["noise"].equal(other["noise"])
        assert not first["observation"].equal(other["observation"])


def test_batches_that_are_gathered_together_are_batches() -> None:
    """Different ones, of whole rows, the same again; where priorities are told in between, one after the other."""
    replay = filled(TransitionReplay(50, 3, noise={"noise": (2,)}), range(9), terminated=8)
    drawn, again = list(replay.samples(16, 4, TOGETHER + 2)), replay.samples(16, 4, TOGETHER + 2)
    assert len(drawn) == TOGETHER + 2
    assert all(same(a, b) for a, b in zip(drawn, again, strict=True))
    assert len({tuple(b["observation"][:, 0].tolist()) for b in drawn}) == len(drawn)
    for batch in drawn:
        assert batch.is_flat
        assert len(batch) == 16
        assert torch.equal(batch["final_observation"], batch["observation"] + torch.tensor([1.0, 0.0]))
        assert torch.equal(batch["terminated"], batch["observation"][:, 0] == 8)
    ranked = filled(TransitionReplay(50, 3, prioritised=Prioritised()), range(9))
    batches = ranked.samples(16, 4, 2)
    ranked.update_priorities(next(batches)["replay_index"], torch.zeros(16))
    assert same(next(batches), ranked.sample(16, 4, 1))


def test_noise_is_standard_normal() -> None:
    drawn = filled(TransitionReplay(9, 0, noise={"noise": (3,), "next_noise": (3,)}), range(3)).sample(20_000, 0)
    for name in ("noise", "next_noise"):
        assert drawn[name].mean(0).abs().max() < 0.03
        assert (drawn[name].var(0) - 1).abs().max() < 0.05
    assert abs(float((drawn["noise"] * drawn["next_noise"]).mean())) < 0.03


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_n_step_returns_stop_at_the_end_of_the_episode(end: str) -> None:
    """gamma = 1/2, n = 3, an episode of steps 0..3, then one of steps 4..6 that is still running."""
    replay = filled(TransitionReplay(20, 0, gamma=0.5, n_step=3), range(7), **{end: 3})
    batch = replay.sample(300, 0)
    at = by_time(batch)
    expected = {  # reward, where it led to, discount, ended
        0: (1 + 10 / 2 + 100 / 4, 3, 1 / 8, False),
        1: (10 + 100 / 2 + 1000 / 4, 4, 1 / 8, True),
        2: (100 + 1000 / 2, 4, 1 / 4, True),
        3: (1000, 4, 1 / 2, True),
        4: (1e4 + 1e5 / 2 + 1e6 / 4, 7, 1 / 8, False),
        5: (1e5 + 1e6 / 2, 7, 1 / 4, False),  # the newest row: fewer steps, not an end
        6: (1e6, 7, 1 / 2, False),
    }
    other = "truncated" if end == "terminated" else "terminated"
    for time, (reward, led_to, discount, ended) in expected.items():
        i = at[time]
        assert batch["reward"][i] == pytest.approx(reward)
        assert batch["final_observation"][i, 0] == led_to
        assert batch["discount"][i] == discount
        assert bool(batch[end][i]) is ended
        assert not batch[other][i]
        assert batch["policy_version"][i] == time + 100


def test_n_step_follows_its_own_environment_and_the_ring() -> None:
    """Two environments in turns; the ring is overwritten twice over."""
    replay = TransitionReplay(7, 0, gamma=0.5, n_step=2)
    for time in range(8):
        for env in (0, 1):
            replay.add_rows(row(time, env))
    batch = replay.sample(200, 0)
    for i, (time, env) in enumerate(batch["observation"].tolist()):
        steps = 2 if time < 7 else 1
        assert batch["final_observation"][i].tolist() == [time + steps, env]
        assert batch["discount"][i] == 0.5**steps
        assert batch["reward"][i] == pytest.approx(10**time + (10 ** (time + 1) / 2 if steps == 2 else 0))
    assert {4.0, 5.0, 6.0, 7.0} == set(batch["observation"][:, 0].tolist())


def fragments(
    lengths: list[int], *, env: list[int], first: list[int], terminated: list[bool], unfinished: list[bool]
) -> Episodes:
    """Fragments of an environment that counts."""
    times = [t for start, n in zip(first, lengths, strict=True) for t in range(start, start + n)]
    owner = [e for e, n in zip(env, lengths, strict=True) for _ in range(n)]
    ends = torch.tensor([[s + n, e] for s, n, e in zip(first, lengths, env, strict=True)], dtype=torch.float32)
    one = torch.arange(len(lengths) + 1)
    over = torch.tensor(terminated)
    columns = {
        "observation": Column(torch.tensor([times, owner], dtype=torch.float32).T.contiguous(), "step"),
        "action": Column(torch.tensor(times) % 3, "step"),
        "reward": Column(10.0 ** torch.tensor(times), "step"),
        "behavior_logp": Column(torch.zeros(len(times)), "step"),
        "terminated": Column(over, "episode"),
        "truncated": Column(~over, "episode"),
        "unfinished": Column(torch.tensor(unfinished), "episode"),
        "final_observation": Column(ends, "episode"),
        "env": Column(torch.tensor(env), "episode"),
        "policy_version": Column(torch.tensor(env), "episode"),
    }
    turn = torch.tensor([0, *np.cumsum(lengths).tolist()])
    return Episodes({"turn": turn, "episode": one, "group": one}, columns)


def test_fragments_go_on_in_the_next_batch() -> None:
    """A fragment cut by the batch is no end: its n-step return reaches into the next one of its environment."""
    replay = TransitionReplay(20, 0, gamma=0.5, n_step=3)
    replay.add(fragments([2, 2], env=[0, 1], first=[0, 0], terminated=[False, False], unfinished=[True, False]))
    replay.add(fragments([2, 1], env=[0, 1], first=[2, 5], terminated=[True, False], unfinished=[False, True]))
    batch = replay.sample(300, 0)
    at = {(int(t), int(e)): i for i, (t, e) in enumerate(batch["observation"].tolist())}
    assert batch["final_observation"][at[0, 0]].tolist() == [3, 0]
    assert batch["final_observation"][at[1, 0]].tolist() == [4, 0]
    assert batch["terminated"][at[1, 0]]
    assert not batch["truncated"][at[1, 0]]
    assert batch["final_observation"][at[0, 1]].tolist() == [2, 1]
    assert batch["truncated"][at[0, 1]]  # the time limit came after two steps
    assert batch["discount"][at[0, 1]] == 0.25
    assert not batch["truncated"][at[5, 1]]


def test_rows_of_fragments() -> None:
    rows = rows_of(fragments([2, 1], env=[0, 1], first=[0, 7], terminated=[True, False], unfinished=[False, True]))
    assert rows["next_observation"].tolist() == [[1, 0], [2, 0], [8, 1]]
    assert rows["terminated"].tolist() == [False, True, False]
    assert rows["truncated"].tolist() == [False, False, False]
    assert rows["env"].tolist() == [0, 0, 1]


# ---- priorities ----------------------------------------------------------------------------------------------------
def test_sum_tree_finds_the_leaf_that_owns_the_mass() -> None:
    tree = SumTree(5)
    tree[np.arange(5)] = np.array([1.0, 0.0, 2.0, 4.0, 1.0])
    assert tree.total == 8
    assert tree.find(np.array([0, 0.99, 1, 2.99, 3, 6.99, 7, 7.99])).tolist() == [0, 0, 2, 2, 3, 3, 4, 4]
    tree[np.array([3])] = 0.0
    assert tree.total == 4
    assert tree.find(np.array([3.5])).tolist() == [4]
    assert SumTree(1).depth == 1


def test_a_large_sum_tree_draws_what_a_search_in_all_leaves_would() -> None:
    """Deeper than the level that is searched at once; every fourth priority is 0."""
    generator = np.random.default_rng(0)
    priorities = generator.integers(0, 4, 20_000).astype(float)  # whole: sums are exact
    tree = SumTree(20_000)
    tree[np.arange(20_000)] = 9.0
    for part in np.array_split(generator.permutation(20_000), 7):
        tree[part] = priorities[part]
    assert tree.total == priorities.sum()
    mass = generator.random(5000) * tree.total
    assert tree.find(mass).tolist() == np.searchsorted(priorities.cumsum(), mass, side="right").tolist()


def test_rounding_never_finds_a_leaf_of_priority_zero() -> None:
    generator = np.random.default_rng(1)
    tree = SumTree(9000)
    tree[np.arange(9000)] = np.where(generator.random(9000) < 0.3, generator.random(9000) ** 9, 0.0)
    for mass in (
        generator.random(4000) * tree.total,
        np.full(3, np.nextafter(tree.total, 0)),
        np.full(3, tree.total * 2),
    ):
        assert (tree[tree.find(mass)] > 0).all()


def test_priorities_are_probabilities_and_weights_undo_them() -> None:
    replay = filled(TransitionReplay(8, 0, prioritised=Prioritised(alpha=0.5, beta=1.0, eps=0.0)), range(4))
    errors = torch.tensor([1.0, 4.0, 9.0, 16.0])  # probabilities .1 .2 .3 .4
    replay.update_priorities(torch.arange(4), -errors)
    batch = replay.sample(20_000, 0)
    time = batch["observation"][:, 0].long()
    assert batch["replay_index"].equal(time)
    share = torch.bincount(time, minlength=4) / 20_000
    assert share.allclose(torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=1e-3)  # stratified: almost no variance
    weight = batch["replay_weight"]
    assert weight.max() == 1
    assert weight.allclose(1 / (time + 1))  # (4 P)^-1, divided by the largest: .1 / P
    assert (weight * batch["reward"]).mean() / weight.mean() == pytest.approx(1111 / 4, rel=1e-3)


def test_new_rows_have_the_largest_priority_and_old_ones_none() -> None:
    replay = filled(TransitionReplay(4, 0, prioritised=Prioritised(alpha=1.0, eps=0.0)), range(4))
    replay.update_priorities(torch.arange(4), torch.tensor([1.0, 1.0, 1.0, 5.0]))
    filled(replay, range(4, 5))  # row 0 leaves, row 4 has priority 5
    replay.update_priorities(torch.tensor([0]), torch.tensor([1000.0]))  # of the row that left
    share = torch.bincount(replay.sample(12_000, 0)["replay_index"], minlength=5) / 12_000
    assert share.allclose(torch.tensor([0, 1 / 12, 1 / 12, 5 / 12, 5 / 12]), atol=1e-3)


def test_the_correction_rises_to_one() -> None:
    rule = Prioritised(beta=0.4, beta_steps=10)
    assert [rule.correction(s) for s in (0, 5, 10, 99)] == pytest.approx([0.4, 0.7, 1.0, 1.0])
    assert Prioritised(beta=0.4).correction(10**9) == 0.4


# ---- disk ----------------------------------------------------------------------------------------------------------
def same(a: Episodes, b: Episodes) -> bool:
    return a.columns.keys() == b.columns.keys() and all(a[name].equal(b[name]) for name in a.columns)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("prioritised", [None, Prioritised()])
def test_resume_is_exact(tmp_path, mapped: bool, prioritised: Prioritised | None) -> None:
    """Saved after 13 rows; five more are added before the crash. The resumed draws as the saved did, and goes on as it did."""

    def made() -> TransitionReplay:
        folder = tmp_path / "rows" if mapped else None
        return TransitionReplay(
            6, 1, 0.5, n_step=3, noise={"noise": (1,)}, prioritised=prioritised, folder=folder, slack=5
        )

    first = filled(made(), range(13))
    if prioritised:
        first.update_priorities(torch.tensor([8, 9, 11]), torch.tensor([3.0, 0.5, 7.0]))
    first.save(tmp_path)
    then = first.sample(64, 0)
    later = filled(first, range(13, 18)).sample(64, 1)
    resumed = made()
    resumed.load(tmp_path)
    assert len(resumed) == 6
    assert same(resumed.sample(64, 0), then)
    assert same(filled(resumed, range(13, 18)).sample(64, 1), later)


def test_a_file_that_went_too_far_is_told(tmp_path) -> None:
    first = filled(TransitionReplay(6, 1, folder=tmp_path / "rows", slack=5), range(13))
    first.save(tmp_path)
    filled(first, range(13, 20))
    with pytest.raises(ValueError, match=r"2 transitions that the checkpoint needs were overwritten.*slack"):
        TransitionReplay(6, 1, folder=tmp_path / "rows", slack=5).load(tmp_path)
    with pytest.raises(ValueError, match="holds 11 rows, expected 12"):
        TransitionReplay(7, 1, folder=tmp_path / "rows", slack=5).load(tmp_path)


def test_slack_rows_are_not_drawn(tmp_path) -> None:
    replay = filled(TransitionReplay(4, 0, folder=tmp_path, slack=3), range(12))
    assert set(replay.sample(500, 0)["observation"][:, 0].tolist()) == {8, 9, 10, 11}
    ranked = filled(TransitionReplay(4, 0, prioritised=Prioritised(), folder=tmp_path / "b", slack=3), range(12))
    assert set(ranked.sample(500, 0)["replay_index"].tolist()) == {8, 9, 10, 11}


# ---- bad input -----------------------------------------------------------------------------------------------------
def test_bad_input() -> None:
    with pytest.raises(ValueError, match="empty"):
        TransitionReplay(4, 0).sample(1, 0)
    with pytest.raises(ValueError, match="expected at least 1"):
        TransitionReplay(0, 0)
    replay = filled(TransitionReplay(4, 0), range(2))
    with pytest.raises(ValueError, match="do not fit"):
        replay.add_rows({**row(2), "observation": np.zeros((1, 5), dtype=np.float32)})
    with pytest.raises(ValueError, match="do not fit"):
        replay.add_rows({k: v for k, v in row(2).items() if k != "behavior_logp"})


def test_a_million_rows_of_halfcheetah_need_less_than_400_mb() -> None:
    """By the size of a row: observation and next 17, action 6."""
    rows = {k: v for k, v in row(0).items() if k not in ("observation", "next_observation", "action")}
    wide = {"observation": 17, "next_observation": 17, "action": 6}
    replay = TransitionReplay(1000, 0)
    replay.add_rows({**rows, **{name: np.zeros((1, n), dtype=np.float32) for name, n in wide.items()}})
    assert replay.nbytes * 1000 <= 200e6
