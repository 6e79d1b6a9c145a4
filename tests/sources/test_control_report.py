"""What `unipo data check` says of recorded control data: numbers by hand, and everything that can be wrong named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from unipo.episodes import Column, Episodes
from unipo.sources.acting.control_report import check_control, finite_episodes, is_control_data
from unipo.sources.acting.recordings import load_recorded

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


def episodes(rewards: list[list[float]], observed: list[float], actions: list[int], terminated: list[bool]) -> Episodes:
    """Episodes of a world of one number and two actions, as a run would have written them."""
    lengths, n = torch.tensor([len(r) for r in rewards]), len(rewards)
    flat = torch.tensor([r for part in rewards for r in part])
    step = {"observation": torch.tensor(observed)[:, None], "action": torch.tensor(actions), "reward": flat,
            "behavior_logp": torch.full_like(flat, float("nan"))}  # fmt: skip
    ended = torch.tensor(terminated)
    episode = {"terminated": ended, "truncated": ~ended, "final_observation": torch.zeros(n, 1)}
    columns = {k: Column(v, "step") for k, v in step.items()} | {k: Column(v, "episode") for k, v in episode.items()}
    columns["kind"] = Column(torch.zeros(n, dtype=torch.long), "episode", None, ("rollout",))
    one, turn = torch.arange(n + 1), torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return Episodes({"turn": turn, "episode": one, "group": one}, columns)


def saved(path: Path, *args: Any) -> Path:
    episodes(*args).save(path / "data.parquet")
    return path


GOOD = ([[1.0, 1.0], [1.0, 1.0, 1.0], [5.0]], [0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [0, 1, 0, 1, 0, 1], [True, False, True])


def test_the_numbers(tmp_path: Path) -> None:
    """Returns 2, 3, 5; pairs (0,0) three times, (1,1) twice, (0,1) once: three distinct."""
    found = check_control(saved(tmp_path, *GOOD), bins=10)
    assert (found.episodes, found.steps, found.terminated) == (3, 6, 2)
    r = found.returns
    assert (r.mean, r.min, r.q1, r.median, r.q3, r.max) == (10 / 3, 2, 2.5, 3, 4, 5)
    assert (found.lengths.min, found.lengths.max) == (1, 3)
    assert found.coverage is not None
    assert found.coverage.distinct == 3
    share = np.array([3, 2, 1]) / 6
    assert found.coverage.evenness == pytest.approx(np.exp(-(share * np.log(share)).sum()) / 3)
    assert found.coverage.quality == pytest.approx((10 / 3 - 2) / 3)
    assert found.ok
    assert found.kind == "categorical"
    text = str(found)
    assert "3 episodes, 6 steps" in text
    assert "2 terminated, 1 truncated" in text
    assert "TQ            0.444" in text
    assert "no problems" in text


def test_a_reference_gives_the_limits_and_the_pairs(tmp_path: Path) -> None:
    """SACo 3 / 4, and TQ between the worst and the best return of the reference."""
    data = saved(tmp_path / "data", *GOOD)
    wide = ([[0.0, 0.0, 0.0, 0.0], [10.0]], [0.0, 0.0, 1.0, 1.0, 1.0], [0, 1, 0, 1, 1], [True, True])
    found = check_control(data, saved(tmp_path / "reference", *wide), bins=2).coverage
    assert found is not None
    assert found.coverage == pytest.approx(3 / 4)
    assert found.quality == pytest.approx(10 / 3 / 10)


def test_numbers_that_are_none_are_located(tmp_path: Path) -> None:
    data = episodes(*GOOD)
    data["reward"][3] = float("nan")
    data["observation"][5] = float("inf")
    data["final_observation"][0] = float("nan")
    data.save(tmp_path / "bad.parquet")
    found = check_control(tmp_path)
    assert not found.ok
    assert {(p.row, p.column) for p in found.problems} == {(1, "reward"), (2, "observation"), (0, "final_observation")}
    assert "at step 1" in next(p.found for p in found.problems if p.column == "reward")
    assert len(finite_episodes(load_recorded(tmp_path))) == 0
    assert found.coverage is None
    assert "3 problems" in str(found)


def test_rewards_that_say_nothing_are_told(tmp_path: Path) -> None:
    same = ([[0.0], [0.0]], [0.0, 1.0], [0, 1], [True, True])
    found = check_control(saved(tmp_path, *same))
    assert found.ok
    assert "nothing to prefer" in found.warnings[0]
    assert "TQ            nan" in str(found)


def minari_folder(folder: Path, box: spaces.Box, *parts: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    storage = MinariStorage.new(folder / "data", spaces.Box(-9, 9, (1,), np.float32), box, gym.spec("Pendulum-v1"))
    storage.update_metadata({"dataset_id": folder.name, "minari_version": minari.__version__})
    storage.update_episodes([EpisodeBuffer(**part) for part in parts])
    return folder


def part(steps: int, observations: int | None = None, **changed: Any) -> dict[str, Any]:
    ends = [False] * (steps - 1) + [True]
    seen = np.zeros((steps + 1 if observations is None else observations, 1), np.float32)
    plain = {"observations": seen, "actions": np.zeros((steps, 1), np.float32), "rewards": [1.0] * steps,
             "terminations": [False] * steps, "truncations": ends}  # fmt: skip
    return {**plain, **changed}


def test_malformed_episodes_of_other_people_are_listed(tmp_path: Path) -> None:
    box = spaces.Box(-2, 2, (1,), np.float32)
    early = [True, False, False]
    folder = minari_folder(tmp_path / "theirs-v0", box, part(4), part(5, observations=5), part(3, terminations=early),
                           part(2, actions=np.array([[1.0], [3.0]], np.float32)))  # fmt: skip
    assert is_control_data(folder)
    found = check_control(folder)
    assert found.environment == "Pendulum-v1"
    assert "Box(-2.0, 2.0, (1,), float32)" in found.actions
    assert found.episodes == 2
    told = {p.row: str(p) for p in found.problems}
    assert "5 observations for 5 steps -> record the state after the last step too" in told[1]
    assert "ends before its last step" in told[2]
    assert any("1 action(s) outside the action space" in str(p) for p in found.problems)
    with pytest.raises(ValueError, match="unipo data check"):
        load_recorded(folder)


def test_what_is_control_data(tmp_path: Path) -> None:
    text = tmp_path / "rows.jsonl"
    text.write_text('{"prompt": "1"}\n')
    assert not is_control_data(text)
    assert not is_control_data(tmp_path / "nothing")
    assert is_control_data(saved(tmp_path / "ours", *GOOD))
    assert is_control_data(tmp_path / "ours" / "data.parquet")


def test_an_unusable_reference(tmp_path: Path) -> None:
    data = saved(tmp_path / "data", *GOOD)
    other = minari_folder(tmp_path / "other-v0", spaces.Box(-2, 2, (1,), np.float32), part(4))
    two = episodes(*GOOD)
    wide = two.with_columns("step", observation=two["observation"].expand(-1, 2).contiguous())
    wide = wide.with_columns("episode", final_observation=torch.zeros(3, 2))
    wide.save(tmp_path / "wide" / "data.parquet")
    with pytest.raises(ValueError, match="the same environment"):
        check_control(data, tmp_path / "wide")
    with pytest.raises(ValueError, match="the same environment"):
        check_control(data, other)
    with pytest.raises(ValueError, match="neither a folder"):
        check_control(tmp_path / "gone")
    with pytest.raises(ValueError, match="at least 2"):
        check_control(data, bins=1)
