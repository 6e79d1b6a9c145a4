"""Recorded data comes back as it was, and other people's data in the policy's units."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces

from unipo.episodes import Episodes
from unipo.sources.acting.collector import Collector
from unipo.sources.acting.environments import Environments, make_environment
from unipo.sources.acting.recordings import MinariRecorder, flattened, load_minari, load_recorded, record_minari
from unipo.sources.acting.spaces import ActionSpec
from unipo.sources.acting.transitions import TransitionReplay

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
CARTPOLE = partial(make_environment, "CartPole-v1")
PENDULUM = partial(make_environment, "Pendulum-v1")


def collector(make: Any, num: int = 2) -> Collector:
    return Collector(Environments(make, num, seed=0), 1)


def ended(fragments: list[Episodes]) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """Whole episodes of a list of batches, by (env, number)."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    along = ("observation", "action", "reward")
    for batch in fragments:
        for i in range(len(batch)):
            one = batch.select(torch.tensor([i]))
            key = (int(one["env"]), int(one["episode_number"]))
            before = found.get(key, {})
            found[key] = {n: torch.cat([before[n], one[n]]) if n in before else one[n] for n in along}
            found[key] |= {n: one[n] for n in ("final_observation", "terminated", "unfinished")}
    return {key: episode for key, episode in found.items() if not episode["unfinished"]}


def match(loaded: Episodes, expected: dict[tuple[int, int], dict[str, torch.Tensor]]) -> bool:
    """The same episodes, in any order."""
    ours = [loaded.select(torch.tensor([i])) for i in range(len(loaded))]
    names = ("observation", "action", "reward", "final_observation", "terminated")
    left = [tuple(json.dumps(e[n].tolist()) for n in names) for e in ours]
    right = [tuple(json.dumps(e[n].tolist()) for n in names) for e in expected.values()]
    return sorted(left) == sorted(right)


@pytest.mark.parametrize(("make", "steps"), [(CARTPOLE, 33), (PENDULUM, 130)])
def test_what_is_recorded_is_read_again(tmp_path: Path, make: Any, steps: int) -> None:
    """Episodes span batches; actions of a box are kept unclipped, in the policy's units."""
    actor = collector(make)

    def act(observation: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        action, logp = actor.random_act(observation, noise)
        return (1.5 * action if action.is_floating_point() else action), logp

    batches = [actor.collect(steps, act, 3) for _ in range(4)]
    recorder = MinariRecorder(tmp_path / "toy-v0", make)
    for batch in batches:
        recorder.add(batch)
    loaded = load_recorded(tmp_path / "toy-v0")
    assert len(loaded) > 1
    assert match(loaded, ended(batches))
    assert loaded.category("kind", "rollout").all()
    assert loaded.category("source", "toy-v0").all()
    assert loaded["truncated"].equal(~loaded["terminated"])
    assert loaded["policy_version"].tolist() == [3] * len(loaded)
    assert loaded["behavior_logp"].isfinite().all()


def test_minari_reads_it_in_the_units_of_the_environment(tmp_path: Path, monkeypatch) -> None:
    actor = collector(PENDULUM)
    batch = actor.collect(200, lambda o, n: (torch.full((2, 1), 0.25), torch.zeros(2)), 0)
    record_minari(tmp_path / "swing-v1", PENDULUM, batch, algorithm="constant")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset = minari.load_dataset("swing-v1")
    assert dataset.total_episodes == 2
    assert dataset.total_steps == 400
    episode = dataset[0]
    assert episode.observations.shape == (201, 3)
    assert (episode.actions == 0.5).all()  # torque in [-2, 2]
    assert episode.truncations.tolist() == [False] * 199 + [True]
    assert dataset.recover_environment().spec.id == "Pendulum-v1"
    assert match(load_minari("swing-v1"), ended([batch]))


def test_steps_are_recorded_like_batches(tmp_path: Path) -> None:
    stepped, batched = collector(CARTPOLE), collector(CARTPOLE)
    recorder = MinariRecorder(tmp_path / "a", CARTPOLE)
    for _ in range(60):
        recorder.add_rows(stepped.step(stepped.random_act, 0))
    batch = batched.collect(60, batched.random_act, 0)
    assert match(load_minari(tmp_path / "a"), ended([batch]))


def test_a_resumed_run_records_every_episode_once(tmp_path: Path) -> None:
    """Saved after batch 2, killed after batch 4, resumed and run to batch 6: as without the accident."""
    first = collector(CARTPOLE)
    recorder = MinariRecorder(tmp_path / "a", CARTPOLE)
    batches = []
    for i in range(4):
        batches.append(first.collect(30, first.random_act, 0))
        recorder.add(batches[-1])
        if i == 1:
            state = json.loads(json.dumps([first.state_dict(), recorder.state_dict()]))
    again = collector(CARTPOLE)
    again.load_state_dict(state[0])
    resumed = MinariRecorder(tmp_path / "a", CARTPOLE)
    resumed.load_state_dict(state[1])
    batches = batches[:2]
    for _ in range(4):
        batches.append(again.collect(30, again.random_act, 0))
        resumed.add(batches[-1])
    assert match(load_minari(tmp_path / "a"), ended(batches))
    MinariRecorder(tmp_path / "a", CARTPOLE, run="another").add(batches[0])
    assert len(load_minari(tmp_path / "a")) == len(ended(batches)) + len(ended(batches[:1]))


def test_other_peoples_data_in_the_policys_units(tmp_path: Path, monkeypatch) -> None:
    """No log-probs, nested observations, actions of a box in [0, 4]."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    nested = spaces.Dict(b=spaces.Box(-9, 9, (2,)), a=spaces.Discrete(3, start=1))
    seen = {"a": np.array([1, 2, 3]), "b": np.array([[0.0, 1], [2, 3], [4, 5]], np.float32)}
    torque, box = np.array([[0.0], [3.0]], np.float32), spaces.Box(0, 4, (1,))
    buffer = minari.data_collector.EpisodeBuffer(None, None, None, seen, torque, [1.0, 2.0], [False] * 2, [False] * 2)
    minari.create_dataset_from_buffers("theirs/old-v0", [buffer] * 2, observation_space=nested, action_space=box)
    loaded = load_minari("theirs/old-v0")
    assert loaded["observation"].tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 2, 3]] * 2
    assert loaded["final_observation"].tolist() == [[0, 0, 1, 4, 5]] * 2
    assert loaded["action"].tolist() == [[-1.0], [0.5]] * 2
    assert loaded["behavior_logp"].isnan().all()
    assert loaded["truncated"].tolist() == [True, True]  # it stops without an end: bootstrap
    assert loaded["policy_version"].tolist() == [-1, -1]
    replay = TransitionReplay(10, 0, gamma=0.5, n_step=2)
    replay.add(loaded)
    batch = replay.sample(50, 0)
    first = batch["observation"][:, 0] == 1
    assert batch["reward"].tolist() == torch.where(first, 2.0, 2.0).tolist()  # 1 + 2 / 2, and 2 alone
    assert batch["discount"].equal(torch.where(first, 0.25, 0.5))
    assert batch["truncated"].all()


def test_a_folder_of_episodes_is_read(tmp_path: Path) -> None:
    actor = collector(CARTPOLE)
    batches = [actor.collect(20, actor.random_act, i) for i in range(2)]
    for i, batch in enumerate(batches):
        batch.save(tmp_path / f"step_{i}.parquet")
    loaded = load_recorded(tmp_path)
    assert loaded["observation"].equal(torch.cat([b["observation"] for b in batches]))
    assert load_recorded(tmp_path / "step_1.parquet")["reward"].equal(batches[1]["reward"])


def test_normalised_undoes_native() -> None:
    choices = np.array([[0, 1], [1, 4]])
    for space, action in [
        (spaces.Discrete(5, start=-2), choices[:, 1]),
        (spaces.MultiDiscrete([2, 5], start=[1, 7]), choices),
        (spaces.Box(-3, 5, (1, 2)), np.array([[0.25, -1], [1, 0.5]], np.float32)),
        (spaces.Box(-np.inf, np.inf, (2,)), np.array([[25, -1], [1, 0.5]], np.float32)),
    ]:
        spec = ActionSpec.of(space)
        back = spec.normalised(spec.native(action))
        assert back.dtype == action.dtype
        np.testing.assert_array_equal(back, action)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict(
            b=spaces.MultiDiscrete([2, 3], start=[1, 1]), a=spaces.Tuple([spaces.Discrete(2), spaces.MultiBinary(2)])
        ),
        spaces.Box(-1, 1, (2, 2)),
    ],
    ids=str,
)
def test_many_observations_are_flattened_as_gymnasium_flattens_one(space: spaces.Space[Any]) -> None:
    space.seed(0)
    several = [space.sample() for _ in range(5)]
    one_by_one = np.stack([spaces.flatten(space, x) for x in several])
    stacked = gym.vector.utils.concatenate(space, several, gym.vector.utils.create_empty_array(space, 5))
    np.testing.assert_array_equal(flattened(space, stacked, 5), one_by_one)


def test_bad_input(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"neither a folder of \.parquet episodes.*local ids: none"):
        load_recorded("nothing/here-v0")
    with pytest.raises(ValueError, match="no file"):
        load_recorded(tmp_path / "gone.parquet")
    with pytest.raises(ValueError, match="cannot be the name"):
        MinariRecorder(tmp_path / "two words", CARTPOLE)
    Episodes.build([[1, 2]], reward=[1.0]).save(tmp_path / "words.parquet")
    with pytest.raises(ValueError, match="no columns observation, action"):
        load_recorded(tmp_path / "words.parquet")
    MinariRecorder(tmp_path / "empty", CARTPOLE)
    with pytest.raises(ValueError, match="no steps"):
        load_minari(tmp_path / "empty")
