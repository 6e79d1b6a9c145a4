"""Recorded control data: written as a Minari dataset, read from one or from a folder of our own episodes.

Minari holds whole episodes in the environment's own units. What a policy did in its units, and how probable that was, is
kept in an episode's infos, so that what is read is what was recorded, to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.dataset.episode_data import EpisodeData
from minari.dataset.minari_dataset import MinariDataset
from minari.dataset.minari_storage import MinariStorage
from numpy.typing import NDArray

from unipo.episodes import Column, Episodes
from unipo.sources.acting.spaces import ActionSpec, ObservationSpec
from unipo.sources.acting.transitions import rows_of
from unipo.sources.data.problems import Problem

Array = NDArray[Any]
_NEEDED = ("observation", "action", "reward", "terminated", "truncated", "final_observation")


# ---- writing -------------------------------------------------------------------------------------------------------
class MinariRecorder:
    """Writes episodes to the Minari dataset `folder` as they end; a dataset that is there already is added to.

    `minari.load_dataset(folder.name)` finds it when MINARI_DATASETS_PATH is the parent of `folder`. An episode is known by
    (run, env, episode_number): a resumed run, which goes through some of them again, records them once.

    Args:
        make: makes the environment, for its spaces and its id.
        algorithm: what acted.
        run: a name that a resumed run shares with its beginning, and with no other run that records here.
    """

    def __init__(self, folder: Path, make: Callable[[], gym.Env[Any, Any]], algorithm: str = "", run: str = "") -> None:
        env, self.run = make(), run
        self.actions = ActionSpec.of(env.action_space)
        folder = folder.resolve()  # Minari counts bytes from where it stands
        self._storage = _continued(folder, env) or _new(folder, env, algorithm)
        env.close()
        self._recorded = _recorded(self._storage)
        self._running: dict[int, list[Mapping[str, Array]]] = {}

    def add(self, fragments: Episodes) -> None:
        """Record what `Collector.collect` gave: episodes that ended are written, the others wait for their rest."""
        rows = rows_of(fragments)
        rows["episode_number"] = fragments["episode_number"][fragments.index("episode")].numpy()
        ends = fragments.lengths().cumsum(0).tolist()
        self._write([{name: v[a:b] for name, v in rows.items()} for a, b in zip([0, *ends], ends, strict=False)])

    def add_rows(self, rows: Mapping[str, Array]) -> None:
        """Record what `Collector.step` gave."""
        self._write([{name: v[i : i + 1] for name, v in rows.items()} for i in range(len(rows["env"]))])

    def _write(self, parts: Sequence[Mapping[str, Array]]) -> None:
        whole = []
        for part in parts:
            running = self._running.setdefault(int(part["env"][0]), [])
            running.append(part)
            if part["terminated"][-1] or part["truncated"][-1]:
                whole.append({name: np.concatenate([p[name] for p in running]) for name in part})
                running.clear()
        new = [rows for rows in whole if self._key(rows) not in self._recorded]
        self._recorded |= {self._key(rows) for rows in new}
        if new:
            self._storage.update_episodes([self._buffer(rows) for rows in new])

    def _key(self, rows: Mapping[str, Array]) -> tuple[str, int, int]:
        return self.run, int(rows["env"][0]), int(rows["episode_number"][0])

    def _buffer(self, rows: Mapping[str, Array]) -> EpisodeBuffer:
        run, env, number = self._key(rows)
        rewards = rows["raw_reward"] if "raw_reward" in rows else rows["reward"]
        kept = {"policy_action": "action", "behavior_logp": "behavior_logp", "policy_version": "policy_version"}
        return EpisodeBuffer(
            options={"run": run, "env": env, "episode_number": number},
            observations=np.concatenate([rows["observation"], rows["next_observation"][-1:]]),
            actions=self.actions.native(rows["action"]),
            rewards=rewards.tolist(),
            terminations=rows["terminated"].tolist(),
            truncations=rows["truncated"].tolist(),
            infos={name: rows[column] for name, column in kept.items()},
        )

    @property
    def recorded(self) -> int:
        """Episodes in the dataset, those of other runs too."""
        return int(self._storage.total_episodes)

    def state_dict(self) -> dict[str, Any]:
        """The beginnings of the episodes that are running, for JSON."""
        return {
            str(env): {
                name: [v.dtype.str, np.concatenate([p[name] for p in parts]).tolist()] for name, v in parts[0].items()
            }
            for env, parts in self._running.items()
            if parts
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._running = {
            int(env): [{name: np.array(values, dtype=kind) for name, (kind, values) in rows.items()}]
            for env, rows in state.items()
        }


def _recorded(storage: MinariStorage) -> set[tuple[str, int, int]]:
    if not storage.total_episodes:
        return set()
    notes = [m.get("options") for m in storage.get_episode_metadata(range(storage.total_episodes))]
    return {
        (str(note["run"]), int(note["env"]), int(note["episode_number"])) for note in notes if note and "run" in note
    }


def _continued(folder: Path, env: gym.Env[Any, Any]) -> MinariStorage | None:
    """The dataset that is there; ValueError where it is another environment's."""
    if not (folder / "data" / "metadata.json").exists():
        return None
    storage, wanted = MinariStorage.read(folder / "data"), (_vectors(env), env.action_space)
    if (storage.observation_space, storage.action_space) != wanted:
        raise ValueError(
            f"{folder} already holds episodes with observations {storage.observation_space} and actions "
            f"{storage.action_space}; this environment has {wanted[0]} and {wanted[1]}: choose another folder"
        )
    return storage


def _vectors(env: gym.Env[Any, Any]) -> spaces.Box:
    """The space of what is recorded as observations."""
    size = ObservationSpec.of(env.observation_space).size
    box = env.observation_space
    if isinstance(box, spaces.Box) and box.dtype == np.float32 and box.shape == (size,):
        return box
    return spaces.Box(-np.inf, np.inf, (size,), np.float32)


def _new(folder: Path, env: gym.Env[Any, Any], algorithm: str) -> MinariStorage:
    if not re.fullmatch(r"[\w-]+", folder.name):
        raise ValueError(f"{folder.name!r} cannot be the name of a Minari dataset: expected letters, digits, _ and -")
    folder.mkdir(parents=True, exist_ok=True)
    storage = MinariStorage.new(folder / "data", _vectors(env), env.action_space, env.spec)
    storage.update_metadata(
        {
            "dataset_id": folder.name,
            "minari_version": minari.__version__,
            "algorithm_name": algorithm,
            "author": {"unipo"},
        }
    )
    return storage


def record_minari(
    folder: Path, make: Callable[[], gym.Env[Any, Any]], fragments: Episodes, algorithm: str = ""
) -> None:
    """Write all of `fragments` at once; those of episodes that have not ended are left out."""
    MinariRecorder(folder, make, algorithm).add(fragments)


# ---- reading -------------------------------------------------------------------------------------------------------
def load_recorded(name: str | Path, tell: Callable[[Problem], None] | None = None) -> Episodes:
    """Episodes from a folder of .parquet files of ours (or one file), a Minari dataset's folder, or a Minari id.

    Step columns observation [N, d], action, reward, behavior_logp (NaN where unknown); episode columns terminated,
    truncated, final_observation [E, d], policy_version (-1: unknown), kind "rollout", source. Raises ValueError for anything
    else, and TaskEnvironmentError for spaces that policies cannot handle. Episodes of a Minari dataset that do not fit its
    spaces are passed over where there is somebody to `tell`.
    """
    path = Path(name)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    if not files:
        return load_minari(name, tell)
    try:
        loaded = Episodes.cat([Episodes.load(file) for file in files])
    except FileNotFoundError as error:
        raise ValueError(f"no file {path}") from error
    missing = [column for column in _NEEDED if column not in loaded]
    if missing:
        raise ValueError(f"{path} has no columns {', '.join(missing)}: expected episodes that a control run recorded")
    return loaded if "source" in loaded else loaded.with_columns("episode", source=path.stem)


def load_minari(name: str | Path, tell: Callable[[Problem], None] | None = None) -> Episodes:
    """The Minari dataset in the folder `name`, or of that id in MINARI_DATASETS_PATH; columns as in `load_recorded`."""
    dataset = _dataset(name)
    actions, seen = ActionSpec.of(dataset.action_space), dataset.observation_space
    ObservationSpec.of(seen)
    episodes = dataset.iterate_episodes() if dataset.total_episodes else ()
    parts = []
    for episode in episodes:
        found = _malformed(episode, seen, str(name))
        if found is None:
            parts.append(_arrays(episode, seen, actions))
        elif tell is None:
            raise ValueError(f"{found}; `unipo data check {name}` lists them all")
        else:
            tell(found)
    if not parts:
        raise ValueError(f"the Minari dataset {name} has no steps")
    return _joined(parts).with_columns("episode", source=dataset.id)


def _dataset(name: str | Path) -> MinariDataset:
    for folder in (Path(name) / "data", Path(name)):
        if (folder / "metadata.json").exists():
            return MinariDataset(folder)
    try:
        return minari.load_dataset(str(name))
    except (FileNotFoundError, ValueError) as error:
        known = ", ".join(sorted(minari.list_local_datasets())) or "none"
        raise ValueError(
            f"{name} is neither a folder of .parquet episodes, nor a Minari dataset's folder or id; local ids: {known}. "
            "Set MINARI_DATASETS_PATH to where they are, or fetch one with `minari download ID`"
        ) from error


def _malformed(episode: EpisodeData, space: spaces.Space[Any], name: str) -> Problem | None:
    """What keeps an episode from being read."""
    steps, seen = len(episode.rewards), _leaf_lengths(space, episode.observations)
    if not steps:
        return Problem(name, "no steps", "leave it out", int(episode.id), unit="episode")
    if seen == {steps}:
        remedy = "record the state after the last step too: what is bootstrapped from is missing"
        return Problem(
            name, f"{steps} observations for {steps} steps", remedy, int(episode.id), "observations", "episode"
        )
    counts = {"observations": seen, "actions": _any_lengths(episode.actions), "terminations": {len(episode.terminations)},
              "truncations": {len(episode.truncations)}}  # fmt: skip
    for column, found in counts.items():
        wanted = steps + 1 if column == "observations" else steps
        if found != {wanted}:
            told = f"{' and '.join(map(str, sorted(found)))} for {steps} steps, expected {wanted}"
            return Problem(name, told, "record the episode again", int(episode.id), column, "episode")
    if np.asarray(episode.terminations)[:-1].any() or np.asarray(episode.truncations)[:-1].any():
        return Problem(name, "it ends before its last step", "split it there", int(episode.id), unit="episode")
    return None


def _leaf_lengths(space: spaces.Space[Any], values: Any) -> set[int]:
    if isinstance(space, spaces.Dict):
        return set().union(*(_leaf_lengths(part, values[name]) for name, part in space.spaces.items()))
    if isinstance(space, spaces.Tuple):
        return set().union(*(_leaf_lengths(p, v) for p, v in zip(space.spaces, values, strict=True)))
    return {len(values)}


def _any_lengths(values: Any) -> set[int]:
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else [values]
    return {len(part) for part in parts}


@dataclass(frozen=True, slots=True)
class About:
    """What a Minari dataset says of itself; of a folder of our own episodes nothing is known."""

    environment: str = ""
    observations: str = ""
    action_space: str = ""
    actions: ActionSpec | None = None


def described(name: str | Path) -> About:
    """Environment and spaces of recorded data. Raises as `load_recorded` does."""
    path = Path(name)
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return About()
    dataset = _dataset(name)
    spec, seen, acted = dataset.env_spec, dataset.observation_space, dataset.action_space
    return About("" if spec is None else spec.id, _on_a_line(seen), _on_a_line(acted), ActionSpec.of(acted))


def _on_a_line(space: spaces.Space[Any]) -> str:
    return " ".join(str(space).split())


def _arrays(episode: EpisodeData, space: spaces.Space[Any], actions: ActionSpec) -> dict[str, Array]:
    steps, infos = len(episode), episode.infos or {}
    seen = flattened(space, episode.observations, steps + 1)
    ours = "policy_action" in infos and "behavior_logp" in infos
    terminated = bool(episode.terminations[-1])
    return {
        "observation": seen[:-1],
        "action": infos["policy_action"][:steps] if ours else actions.normalised(np.asarray(episode.actions)),
        "reward": np.asarray(episode.rewards, dtype=np.float32),
        "behavior_logp": np.asarray(
            infos["behavior_logp"][:steps] if ours else np.full(steps, np.nan), dtype=np.float32
        ),
        "final_observation": seen[-1:],
        "terminated": np.array([terminated]),
        "truncated": np.array([not terminated]),
        "policy_version": np.array([infos["policy_version"][0] if ours else -1]),
        "episode_number": np.array([episode.id]),
    }


def _joined(parts: Sequence[Mapping[str, Array]]) -> Episodes:
    lengths = torch.tensor([len(p["reward"]) for p in parts])
    step = ("observation", "action", "reward", "behavior_logp")
    columns = {
        name: Column(torch.from_numpy(np.concatenate([p[name] for p in parts])), "step" if name in step else "episode")
        for name in parts[0]
    }
    columns["kind"] = Column(torch.zeros(len(parts), dtype=torch.long), "episode", None, ("rollout",))
    one = torch.arange(len(parts) + 1)
    turn = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return Episodes({"turn": turn, "episode": one, "group": one}, columns)


def flattened(space: spaces.Space[Any], values: Any, n: int) -> Array:
    """[n, d] float32: `gymnasium.spaces.flatten` of n observations that were stored as arrays per part of `space`."""
    if isinstance(space, spaces.Dict):
        return np.concatenate([flattened(part, values[name], n) for name, part in space.spaces.items()], axis=1)
    if isinstance(space, spaces.Tuple):
        return np.concatenate([flattened(part, v, n) for part, v in zip(space.spaces, values, strict=True)], axis=1)
    array = np.asarray(values)
    if isinstance(space, spaces.Discrete):
        return np.eye(int(space.n), dtype=np.float32)[array.reshape(n) - int(space.start)]
    if isinstance(space, spaces.MultiDiscrete):
        chosen = (array - space.start).reshape(n, -1).T
        hot = [np.eye(int(k), dtype=np.float32)[c] for k, c in zip(space.nvec.flat, chosen, strict=True)]
        return np.concatenate(hot, axis=1)
    return np.asarray(array.reshape(n, -1), dtype=np.float32)
