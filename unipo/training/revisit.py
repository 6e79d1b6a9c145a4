"""Coming back to a run: load what it trained, evaluate it, film it, let it act."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unipo.critics.greedy import load_greedy_policy
from unipo.policies import RecurrentPolicy, TokenPolicy, load_control_policy, load_policy, load_recurrent_policy
from unipo.sources.directions import Asking
from unipo.sources.text.sampler import Sampler, SamplerSettings
from unipo.statistics import bootstrap_interval
from unipo.tasks import TINY_MODEL
from unipo.training.best_of import BestOf, best_of, picker
from unipo.training.config import ConfigError, ControlConfig, RunConfig, read_config
from unipo.training.evaluate import Evaluation, evaluate
from unipo.training.judging import JUDGED, Judgement, arranged, judged
from unipo.training.problems import load_problems, scorer
from unipo.training.stored_rows import fixed_rows
from unipo.training.versus import Versus, versus

if TYPE_CHECKING:
    import gymnasium as gym

KINDS = {"distribution": load_control_policy, "greedy": load_greedy_policy, "recurrent": load_recurrent_policy}
"""A key of config.json that only this kind of policy has -> how it is loaded. Anything else is a language model."""


def load_trained(folder: str | Path) -> Any:
    """The policy that a run of any kind saved: `folder` is the run or its `final/`. Raises ModelError or ConfigError."""
    folder = Path(folder)
    final = folder / "final" if (folder / "config.yaml").exists() else folder
    if final != folder and not (final / "config.json").exists():
        raise ConfigError(f"{folder} has no trained policy yet: finish it with `unipo resume {folder}`")
    described = json.loads((final / "config.json").read_text()) if (final / "config.json").exists() else {}
    kind = next((key for key in KINDS if key in described), None)
    return load_policy(str(final)) if kind is None else KINDS[kind](final)


@dataclass
class Actor:
    """A trained policy in the units of an environment: an observation as it comes in, the action to take out.

    A recurrent one remembers what it was shown since the last `reset`, which is to be called where an episode begins.
    """

    policy: Any
    observation_space: Any
    actions: Any
    memory: Tensor | None = field(default=None, repr=False)

    def reset(self) -> None:
        """An episode begins: what was seen is forgotten."""
        self.memory = None

    def __call__(self, observation: Any) -> Any:
        """The policy's mode, which is what evaluations take."""
        from gymnasium.spaces import flatten

        vector = torch.from_numpy(flatten(self.observation_space, observation)).float()[None]
        return self.actions.native(self._mode(vector).numpy())[0]

    def _mode(self, vector: Tensor) -> Tensor:
        noise = torch.zeros(1, 0)
        if isinstance(self.policy, RecurrentPolicy):
            before = self.policy.start(1) if self.memory is None else self.memory
            action, _, self.memory = self.policy.act(vector, noise, before, deterministic=True)
        else:
            action, _ = self.policy.act(vector, noise, deterministic=True)
        return action

    def fits(self) -> bool:
        """Whether the policy gives actions of this kind and shape."""
        tried = self._mode(torch.zeros(1, self.policy.observation_size))
        self.reset()
        wanted = () if self.actions.kind == "categorical" else (self.actions.size,)
        return tried.is_floating_point() == (self.actions.kind == "box") and tuple(tried.shape[1:]) == wanted


def load_actor(folder: str | Path, env: gym.Env[Any, Any]) -> Actor:
    """What `load_trained` finds, ready to act in `env`. Raises ConfigError for a policy of other observations or actions."""
    from unipo.sources.acting.spaces import ActionSpec, ObservationSpec

    policy = load_trained(folder)
    wanted, found = ObservationSpec.of(env.observation_space).size, getattr(policy, "observation_size", None)
    if found != wanted:
        raise ConfigError(
            f"the policy in {folder} expects {found} numbers as observation; this environment has {wanted}"
        )
    actor = Actor(policy, env.observation_space, ActionSpec.of(env.action_space))
    if not actor.fits():
        raise ConfigError(f"the policy in {folder} does not choose actions of {env.action_space}")
    return actor


# ---- measuring -------------------------------------------------------------------------------------------------------
def config_of(folder: str | Path) -> RunConfig | ControlConfig:
    """The configuration of a run. Raises ConfigError where there is none."""
    path = Path(folder) / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{folder} is not a run: it has no config.yaml")
    return read_config(path.read_text())


def evaluate_versus(folder: str | Path, against: str, prompts: int, samples: int, temperature: float, judge: str = "reward",
                    ask: Asking | None = None, theirs: Asking | None = None) -> Versus:  # fmt: skip
    """The policy of `folder` against that of the run `against`, or against the model it started from ("reference").

    Both answer the held-out prompts of `folder`'s run, each as it is asked them (`unipo.api.asking`). Raises ConfigError where
    one of them is not there, or for a judge that is none.
    """
    config = config_of(folder)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{folder} is a run in an environment: --against compares answers to prompts")
    problems = load_problems(dataclasses.replace(config, eval_prompts=prompts))
    start = str(TINY_MODEL) if config.model == "tiny" else config.model
    other = load_policy(start, config.dtype) if against == "reference" else load_trained(against)
    policy = load_trained(folder)
    if not (isinstance(policy, TokenPolicy) and isinstance(other, TokenPolicy)):
        raise ConfigError(f"{against} has no policy that answers prompts")
    try:
        return versus(config, problems, policy, other, against, samples, temperature, judge, ask, theirs)
    except ValueError as error:
        raise ConfigError(f"--judge: {error}") from error


def evaluate_run(folder: str | Path, prompts: int, samples: int, temperature: float, most: int = 0, reward: str = "",
                 ask: Asking | None = None) -> Evaluation | Judgement | BestOf:  # fmt: skip
    """Sample held-out prompts with the policy in `folder/final`, or order held-out pairs by it if it is a judge.

    `most`: of so many answers the best is picked, by `reward`. `ask`: what prompts become first. Raises ConfigError when there is
    no policy yet.
    """
    found, policy = config_of(folder), load_trained(folder)
    assert isinstance(found, RunConfig)
    config = dataclasses.replace(found, eval_prompts=prompts)
    problems = load_problems(config)
    if policy.judges:
        stages = (JUDGED[policy.judges],)
        fixed = arranged(fixed_rows(config, policy, problems), stages, policy.tokenizer)
        return judged(fixed, config, stages, policy, problems)(policy)
    if not problems.held_out:
        raise ConfigError(f"{config.task} has no held-out prompts: give the run a --held-out dataset")
    settings = SamplerSettings(temperature=temperature, max_tokens=problems.max_tokens, stop=config.stop)
    sampler = Sampler(policy.model, policy.tokenizer, settings)
    held_out = [(ask or Asking()).held_out(p) for p in problems.held_out]
    if most:
        picks = picker(config, problems, reward)
        return best_of(held_out, sampler, policy.tokenizer, scorer(problems.gold), scorer(picks), config.seed, most)
    return evaluate(held_out, sampler, policy.tokenizer, scorer(problems.gold), config.seed, samples)


@dataclass(frozen=True, slots=True)
class Returns:
    """What whole episodes paid, and how long they were, in the order of the episodes."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    def metrics(self) -> dict[str, float]:
        """Mean return with its 95 % bootstrap interval over the episodes, as in the run's own evaluations; mean length."""
        mean, low, high = bootstrap_interval(self.returns, resamples=2000)
        length = sum(self.lengths) / len(self.lengths)
        return {"return": mean, "return_low": low, "return_high": high, "length": length}


def evaluate_control(folder: str | Path, episodes: int) -> Returns:
    """Whole episodes with the mode of the policy in `folder/final`; the first are those of the run's own evaluations.

    Raises ConfigError where nothing is trained yet, TaskEnvironmentError and EnvironmentFailure.
    """
    from unipo.training.build_control import run_episodes

    config, policy = config_of(folder), load_trained(folder)
    assert isinstance(config, ControlConfig)
    if episodes < 1:
        raise ConfigError(f"--episodes is {episodes}: expected at least 1")
    found = run_episodes(config, policy, episodes)
    return Returns(tuple(float(r) for r, _ in found), tuple(int(n) for _, n in found))


def film_run(config: ControlConfig, policy: Any, folder: Path) -> list[Path]:
    """One episode of the policy's mode as a video in `folder`, the first of the evaluation's. Raises TaskEnvironmentError."""
    from unipo.sources.acting.evaluation import film
    from unipo.sources.acting.remembering import mode
    from unipo.training.build_control import EVALUATION, maker

    return film(mode(policy), maker(config), folder, config.seed + EVALUATION)


def as_json(found: Evaluation | Judgement | BestOf | Returns | Versus) -> Mapping[str, Any]:
    """What `unipo evaluate --json` prints."""
    if isinstance(found, Judgement | BestOf | Versus):
        return found.metrics()
    if isinstance(found, Returns):
        return {**found.metrics(), "episodes": len(found.returns), "returns": list(found.returns)}
    return {**found.metrics(), "prompts": found.prompts, "samples": found.samples}
