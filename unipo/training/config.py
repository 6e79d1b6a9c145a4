"""The whole configuration of a run: typed, flat, written to `config.yaml`, and the same on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import tyro
import yaml

from unipo.recipe import Given


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """What every run has, whatever it is trained on."""

    method: tyro.conf.Suppress[str] = ""
    """Method, or a weighted sum of methods such as grpo+0.2*sft+0.1*dpo."""
    task: tyro.conf.Suppress[str] = ""
    """What it is trained on."""
    method_options: tyro.conf.Suppress[Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """Keyword arguments by method: {"grpo": {"clip_high": 0.28}}; on the command line --grpo.clip-high 0.28."""

    seed: int = 0
    """Everything that is drawn at random is keyed by it."""
    out: str = ""
    """Run directory (default: runs/METHOD-TASK-sSEED)."""

    learning_rate: float = 5e-4
    """Of the policy."""
    value_learning_rate: float = 3e-3
    """Of critics."""
    weight_decay: float = 0.0
    """AdamW weight decay of matrices."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    warmup: int = 0
    """Updates of linear learning-rate warm-up."""
    schedule: str = "linear"
    """Learning rate after warm-up: constant, or linear or cosine down to 0 over the run."""
    token_budget: int = 16384
    """Tokens (or environment steps) per micro-batch: memory, never the gradient."""
    epochs: int = 0
    """Passes over each batch (0: the method's own)."""

    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads (0: torch's choice; one for control networks narrower than 256 units)."""
    tensorboard: bool = True
    """Write TensorBoard files to tensorboard/."""
    wandb: str = ""
    """Weights & Biases project (needs the wandb extra)."""

    def __post_init__(self) -> None:
        for name, (good, expected) in self.checks().items():
            if not good:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)!r}: expected {expected}")

    def checks(self) -> dict[str, tuple[bool, str]]:
        """By setting: whether it can be right, and what would be."""
        return {
            "schedule": (self.schedule in ("constant", "linear", "cosine"), "constant, linear or cosine"),
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "clip_norm": (self.clip_norm > 0, "above 0"),
            "token_budget": (self.token_budget >= 1, "at least 1"),
            "keep_checkpoints": (self.keep_checkpoints >= 1, "at least 1"),
        }

    @property
    def steps(self) -> int:
        """Steps of the loop that the run makes."""
        raise TypeError(f"{type(self).__name__} does not say how many steps it makes")

    def evaluation_due(self, step: int) -> bool:
        """Whether the policy is evaluated after `step` (1-based)."""
        raise TypeError(f"{type(self).__name__} does not say when it evaluates")

    def checkpoint_due(self, step: int) -> bool:
        """Whether the run saves itself after `step` (1-based)."""
        raise TypeError(f"{type(self).__name__} does not say when it saves")

    def dry(self, out: str) -> Self:
        """The same, in another place, and without anything that is written beside what the run needs: for a look at it."""
        return dataclasses.replace(self, out=out, tensorboard=False, wandb="")

    @property
    def folder(self) -> Path:
        name = f"{self.method}-{Path(self.task).stem or self.task}-s{self.seed}"
        return Path(self.out or f"runs/{''.join(c if c.isalnum() or c in '-_.+' else '_' for c in name)}")

    def to_yaml(self) -> str:
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
        plain = {k: dict(v) if isinstance(v, Mapping) else v for k, v in plain.items()}
        plain["method_options"] = {k: dict(v) for k, v in self.method_options.items()}
        return yaml.safe_dump(plain, sort_keys=False)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Raises ConfigError for a key that this version does not know."""
        unknown = sorted(set(plain) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"config.yaml has keys that this version does not know: {', '.join(unknown)}")
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
        return cls(**settings)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """The inverse of `to_yaml`. Raises ConfigError for what is not a configuration of this kind."""
        plain = yaml.safe_load(text)
        if not isinstance(plain, dict):
            raise ConfigError("config.yaml does not hold a mapping: it is damaged, or not a run's")
        return cls.from_plain(plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(BaseConfig):
    """How a run on text is made. Amounts are per step unless they say otherwise."""

    method: tyro.conf.Suppress[str] = "grpo"
    """Method, or a weighted sum of methods such as grpo+0.2*sft+0.1*dpo."""
    task: tyro.conf.Suppress[str] = "arithmetic"
    """Embedded task (arithmetic, arithmetic:2, countdown, ...), a dataset file or folder, or a hub name."""

    steps: int = 150
    """Steps: one batch is drawn and trained on in each."""

    model: str = "tiny"
    """"tiny" (shipped, about 1M parameters, warm-started on the embedded tasks), a folder, or a hub name."""
    reference: str = ""
    """Frozen reference of methods that ask for one: a folder or hub name (default: the model as it starts)."""
    reward: str = ""
    """Rewards, comma-separated, each NAME[*WEIGHT]: a name (math, exact_match), package.module:function or
    file.py:function. Default: the task's own; "math" for datasets."""
    gold: str = ""
    """Rewards, written as in --reward, that are measured and never trained on: of rollouts and of held-out answers."""
    on_reward_error: str = "raise"
    """What a failing reward does to the run: raise, or drop (the row is dropped and counted)."""
    reward_timeout: float = 60.0
    """Seconds that one call of a reward function may take."""

    curriculum: str = ""
    """Prompts of other tasks or datasets from a step on: 50=arithmetic:2,100=arithmetic:3 (TASK itself starts)."""
    prompts: int = 32
    """Prompts that are sampled."""
    rollouts: int = 0
    """Rollouts per prompt (0: the method's own group size)."""
    ahead: int = 0
    """Steps that rollouts are sampled ahead of training, while the policy learns, in a thread of their own (0: none)."""
    replay: int = 0
    """Groups replayed from older steps (and from --replay-from)."""
    replay_from: str = ""
    """Rollouts to start the replay from: a run directory, or a dataset with prompt, completion, reward[, logprobs]."""
    replay_capacity: int = 4096
    """Groups that the replay remembers."""
    max_staleness: int = -1
    """Oldest rollouts that are replayed, in policy updates (-1: no limit)."""
    demos: str = ""
    """Demonstrations: "task" (the task's own expert), "task:worked" (in that style), or a dataset."""
    demos_per_step: int = 16
    """Demonstrations in a batch."""
    pairs: str = ""
    """Comparisons: "task" ("task:groups": several answers on each side), a dataset of pairs (prompt, chosen, rejected) or of
    rated lists (prompt, completions, ratings), or a run's folder: its rollouts, rated by their reward."""
    pairs_per_step: int = 16
    """Pairs or lists in a batch."""
    keep_pairs: str = ""
    """Comparisons that are used: margin(0.5), length(400), quality(3), diverse(0.3), fifa(0.05), comma-separated."""
    rating_range: tuple[float, ...] = ()
    """Least and highest rating that there can be: others are told as mistakes before training."""
    flip_labels: float = 0.0
    """Share of comparisons and labels that are turned round, for experiments with noise."""
    labels: str = ""
    """Answers that were judged on their own: "task", or a dataset with prompt, completion and label (true or false)."""
    labels_per_step: int = 32
    """Labelled answers in a batch."""
    teacher: str = ""
    """Who reasons, for a method that asks a second model: a folder, a hub name, or "task" (the embedded task's own)."""
    dataset_rows: int = 1024
    """How many demonstrations, pairs or labelled answers an embedded task writes for "task"."""

    max_tokens: int = 0
    """Longest completion (0: the task's own, 256 for datasets)."""
    max_prompt_tokens: int = 0
    """Longest prompt accepted (0: what the model's context leaves)."""
    temperature: float = 1.0
    """Of sampling, and of the log-probs that are trained."""
    top_p: float = 1.0
    """Nucleus sampling."""
    top_k: int = 0
    """Sample among the k likeliest tokens (0: all)."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""

    learning_rate: float = 5e-4
    """Of the policy (5e-4 suits the tiny model; 1e-6 to 1e-5 suits large ones)."""
    minibatches: int = 0
    """Optimiser updates per pass (0: the method's own)."""

    eval_every: int = 25
    """Steps between evaluations (0: only before and after)."""
    eval_prompts: int = 256
    """Held-out prompts."""
    eval_samples: int = 1
    """Completions per held-out prompt; more than one also gives pass@k."""
    eval_temperature: float = 1.0
    """Of evaluation (0: greedy)."""
    held_out: str = ""
    """Dataset to evaluate on (default: the task's held-out split; for datasets a tenth of the rows, kept apart)."""

    checkpoint_every: int = 25
    """Steps between checkpoints."""
    save_episodes: bool = True
    """Write every step's rollouts to episodes/ (they can be replayed by later runs)."""

    dtype: str = "float32"
    """Of the weights: float32, bfloat16, float64."""
    autocast: str = "off"
    """Mixed precision of the forward and backward: off, bfloat16."""
    sampling_weights: str = "model"
    """Rollouts are sampled from the model as it is, or with weights rounded to bfloat16: faster on processors made for it. The
    logged log-probs are those of what was sampled, so that ratios correct for it."""
    lora_rank: int = 0
    """Rank of LoRA adapters (0: all weights are trained)."""
    lora_alpha: float = 0.0
    """LoRA scale (0: twice the rank)."""
    chat: bool = False
    """Wrap plain prompts as one user message through the chat template."""

    def checks(self) -> dict[str, tuple[bool, str]]:
        return {
            **super(RunConfig, self).checks(),
            "steps": (self.steps >= 1, "at least 1"),
            "prompts": (self.prompts >= 1, "at least 1"),
            "ahead": (self.ahead >= 0, "0 or more"),
            "flip_labels": (0 <= self.flip_labels <= 1, "a share from 0 to 1"),
            "rating_range": (
                not self.rating_range or (len(self.rating_range) == 2 and self.rating_range[0] < self.rating_range[1]),
                "two numbers, the least first, such as --rating-range 1 10",
            ),
            "temperature": (self.temperature > 0, "above 0 (the log-probs that are trained are divided by it)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "on_reward_error": (self.on_reward_error in ("raise", "drop"), "raise or drop"),
            "dtype": (self.dtype in ("float32", "bfloat16", "float64"), "float32, bfloat16 or float64"),
            "autocast": (self.autocast in ("off", "bfloat16"), "off or bfloat16"),
            "sampling_weights": (self.sampling_weights in ("model", "bfloat16"), "model or bfloat16"),
            "checkpoint_every": (self.checkpoint_every >= 1, "at least 1"),
            "eval_prompts": (self.eval_prompts >= 0, "0 or more"),
            "eval_samples": (self.eval_samples >= 1, "at least 1"),
        }

    def dry(self, out: str) -> RunConfig:
        return dataclasses.replace(super(RunConfig, self).dry(out), save_episodes=False)

    def evaluation_due(self, step: int) -> bool:
        return step == self.steps or (self.eval_every > 0 and step % self.eval_every == 0)

    def checkpoint_due(self, step: int) -> bool:
        return step == self.steps or step % self.checkpoint_every == 0


REPAYS = 5000
"""Updates: compiling takes 6 to 9 seconds, a compiled update saves 1.5 to 5 milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig(BaseConfig):
    """How a run in an environment is made. A step of the run collects `rollout` steps of each copy of it."""

    total_timesteps: int = 100_000
    """Environment steps of the whole run, all copies together."""
    num_envs: int = 1
    """Copies of the environment that are stepped together."""
    rollout: int = 2048
    """Steps of each copy in a step of the run."""
    batch_size: int = 64
    """Environment steps in a minibatch, or transitions drawn from the replay (0: on-policy, the whole batch)."""
    asynchronous: bool = False
    """Every copy in a process of its own (for slow environments)."""
    env_options: tyro.conf.Suppress[Mapping[str, Any]] = field(default_factory=dict)
    """Keyword arguments of the environment; on the command line --env.NAME VALUE."""

    hidden: tuple[int, ...] = (64, 64)
    """Units of the hidden layers, of policy and critics each."""
    activation: str = "tanh"
    """tanh, relu or gelu."""
    recurrent: bool = False
    """On-policy: policy and value critic remember the episode (a GRU after the hidden layers), for tasks that do not show
    everything that matters. Minibatches are then made of whole stretches of episodes."""
    orthogonal: bool = True
    """Orthogonal initial weights (otherwise torch's)."""
    log_std_init: float = 0.0
    """Where the logarithm of a Gaussian policy's standard deviation starts."""
    normalize_observations: bool = False
    """Observations to mean 0 and variance 1 by running statistics, which are saved with the policy."""
    normalize_rewards: bool = False
    """Rewards divided by the running standard deviation of their discounted sum."""

    learning_rate: float = 3e-4
    """Of the policy."""
    value_learning_rate: float = 0.0
    """Of critics (0: the policy's)."""
    clip_norm: float = 0.5
    """Largest gradient norm."""
    schedule: str = "constant"
    """Learning rate after warm-up: constant, or linear or cosine down to 0 over the run."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    token_budget: int = 1 << 20
    """Environment steps per micro-batch: memory, never the gradient."""
    compile: str = "auto"
    """An update as one compiled graph: on, off, or auto: where at least 5000 updates repay the seconds it takes."""
    autocast: str = "off"
    """Mixed precision of the updates: off, bfloat16 (several times faster for wide networks on processors made for it)."""

    learning_starts: int = 100
    """Off-policy: environment steps of uniformly random actions before the first update."""
    train_every: int = 1
    """Off-policy: steps of each copy between updates."""
    updates: int = 1
    """Off-policy: updates each time."""
    replay_capacity: int = 1_000_000
    """Off-policy: transitions that are remembered."""
    memory_mapped: bool = False
    """Off-policy: the replay is a file in the run folder, and not in memory; checkpoints then do not copy it."""
    n_step: int = 1
    """Off-policy: rewards that are summed before the bootstrap."""
    prioritized: float = 0.0
    """Off-policy: exponent of prioritised replay (0: uniform; 0.6 is usual)."""
    dataset: str = ""
    """Train on this recorded data alone, without acting: a Minari dataset, or a folder of episodes."""

    evaluations: int = 10
    """Evaluations over the run, besides the one before it (0: none)."""
    eval_episodes: int = 10
    """Episodes of an evaluation, with the mode of the policy."""
    video: bool = False
    """Film an episode of the trained policy."""
    record: str = ""
    """Write what is collected as a Minari dataset into this folder."""
    checkpoints: int = 5
    """Checkpoints over the run."""

    def __post_init__(self) -> None:
        """A rollout is never longer than the run."""
        super(ControlConfig, self).__post_init__()
        object.__setattr__(self, "rollout", min(self.rollout, -(-self.total_timesteps // self.num_envs)))

    @property
    def steps(self) -> int:
        """Steps of the run: whole rollouts, rounded up."""
        return -(-self.total_timesteps // (self.num_envs * self.rollout))

    def checks(self) -> dict[str, tuple[bool, str]]:
        at_least_one = ("total_timesteps", "num_envs", "rollout", "train_every", "updates", "replay_capacity", "n_step")
        return {
            **super(ControlConfig, self).checks(),
            **{name: (getattr(self, name) >= 1, "at least 1") for name in at_least_one},
            "batch_size": (self.batch_size >= 0, "0 or more"),
            "device": (self.device in ("auto", "cpu"), "auto or cpu: networks of control are trained on the CPU"),
            "compile": (self.compile in ("auto", "on", "off"), "auto, on or off"),
            "autocast": (self.autocast in ("off", "bfloat16"), "off or bfloat16"),
            "hidden": (all(width >= 1 for width in self.hidden), "widths of at least 1"),
            "activation": (self.activation in ("tanh", "relu", "gelu"), "tanh, relu or gelu"),
            "prioritized": (0 <= self.prioritized <= 1, "in [0, 1]"),
            "evaluations": (self.evaluations >= 0, "0 or more"),
            "eval_episodes": (self.eval_episodes >= 1, "at least 1"),
            "checkpoints": (self.checkpoints >= 1, "at least 1"),
        }

    def compiles(self, updates: int) -> bool:
        """Whether a run of so many updates compiles them. Not a matter of time, so that a resumed run does as it did before."""
        return self.compile == "on" or (self.compile == "auto" and updates >= REPAYS)

    def dry(self, out: str) -> ControlConfig:
        """Off-policy training starts as soon as it can."""
        least = min(self.learning_starts, max(1, self.batch_size))
        plain = super(ControlConfig, self).dry(out)
        return dataclasses.replace(plain, record="", video=False, learning_starts=least)

    def evaluation_due(self, step: int) -> bool:
        return bool(self.evaluations) and self._reached(step, self.evaluations)

    def checkpoint_due(self, step: int) -> bool:
        return self._reached(step, self.checkpoints)

    def _reached(self, step: int, parts: int) -> bool:
        """Whether `step` is the first to have completed another of `parts` equal parts of the run."""
        return step * parts // self.steps > (step - 1) * parts // self.steps


def read_config(text: str) -> RunConfig | ControlConfig:
    """The configuration that `to_yaml` wrote, of either kind."""
    plain = yaml.safe_load(text)
    kind = ControlConfig if isinstance(plain, dict) and "total_timesteps" in plain else RunConfig
    return kind.from_yaml(text)


class ConfigError(ValueError):
    """A setting that cannot be right; the message says which and what to do."""


class UnusableData(ConfigError):
    """A method cannot use the data of a run; `given` says what there is, so that others that can may be named."""

    def __init__(self, message: str, given: Given) -> None:
        super().__init__(message)
        self.given = given
