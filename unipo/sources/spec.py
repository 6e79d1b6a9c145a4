"""What a method asks of its rollouts, and of its actors in environments, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unipo.objectives import Knob
from unipo.sources.acting.behaviour import Behaviour
from unipo.sources.directions import Asking
from unipo.sources.stages.augment import Augment
from unipo.sources.stages.beginnings import Beginning
from unipo.sources.text.arms import ArmChoice
from unipo.sources.text.filters import GroupFilter, Relabel
from unipo.sources.text.partial import COLUMNS


@dataclass(frozen=True)
class Writer:
    """Another player writes the rollouts in the policy's place: "reference" as it is at the start, a snapshot as it was.

    `redraw`: draws are those of the last step that this divides (0: of the first), so that a prompt which comes again has the
    same answers again as long as the player stands still. Their policy version counts as unknown.
    """

    player: str = "reference"
    redraw: int = 1

    def step(self, step: int) -> int:
        """The step whose draws are made in `step`."""
        return step - step % self.redraw if self.redraw else 0


@dataclass(frozen=True, kw_only=True)
class RolloutSpec:
    """What a method asks of its rollouts.

    `group`: rollouts per prompt. `keep`: groups that are used, judged by the task's own rewards; where it drops some, up to
    `refill` further rounds of prompts are sampled until the batch is full. `augment`: rows that join groups or take the
    place of others, in order. `relabel`: applied in order to what is kept. `replay`: this share of the batch's groups are
    replayed ones, drawn from the last `replay_steps` steps (where `--replay` does not say otherwise). `arms`: prompts come
    from categories, of which those are drawn more often that teach more now. `window`: a step writes at most this share of the
    longest answer for each rollout, and what is not finished goes on in the next one (0: whole answers). `begin`: what answers
    begin with, where they do not begin at their start. `writer`: who writes them (None: the policy). `ask`: what prompts become
    before they are answered.
    """

    group: int = 8
    keep: GroupFilter = GroupFilter()
    refill: int = 0
    augment: tuple[Augment, ...] = ()
    relabel: tuple[Relabel, ...] = ()
    replay: float | Knob = 0.0
    replay_steps: int = 1
    arms: ArmChoice | None = None
    window: float = 0.0
    begin: Beginning = Beginning()
    writer: Writer | None = None
    ask: Asking = Asking()

    def __post_init__(self) -> None:
        if not 0.0 <= self.window <= 1.0:
            raise ValueError(
                f"window is {self.window}: expected a share of the longest answer, from 0 (whole answers) to 1"
            )
        if self.window and type(self.begin) is not Beginning:
            raise ValueError("answers that are written over several steps begin at their start: leave out `begin`")
        if self.window and self.writer is not None:
            raise ValueError("answers that are written over several steps are the policy's own: leave out `writer`")
        if self.window and (self.arms is not None or type(self.keep) is not GroupFilter):
            raise ValueError(
                "answers that are written over several steps cannot be chosen by group: leave out `keep` and `arms`"
            )

    @property
    def columns(self) -> frozenset[str]:
        """What its stages add to the columns of rollouts."""
        own = (*(COLUMNS if self.window else ()), *self.begin.columns)
        return frozenset().union(own, *(stage.columns for stage in self.augment))

    @property
    def rewards(self) -> frozenset[str]:
        """Single rewards, of several, that its stages read, by name."""
        return frozenset[str]().union(*(stage.rewards for stage in self.augment))

    @property
    def players(self) -> frozenset[str]:
        """Other policies that write, or that its stages sample, by name."""
        own = () if self.writer is None else (self.writer.player,)
        return frozenset(own).union(*(stage.players for stage in self.augment))


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """How a policy acts while data is collected. This one samples its own distribution."""


@dataclass(frozen=True, kw_only=True)
class ActionNoise(Exploration):
    """The policy's mode plus normal noise of this standard deviation, kept in [-1, 1] (DDPG, TD3)."""

    std: float = 0.1


@dataclass(frozen=True, kw_only=True)
class EpsilonGreedy(Exploration):
    """The critic's greedy action, or with probability epsilon any: from `start` to `end` over a `share` of the run (DQN)."""

    start: float = 1.0
    end: float = 0.05
    share: float = 0.1

    def epsilon(self, done: float) -> float:
        """Epsilon after a share `done` of the run, in [0, 1]."""
        return self.start + (self.end - self.start) * min(1.0, done / max(self.share, 1e-12))


@dataclass(frozen=True, kw_only=True)
class ControlSpec:
    """What a method asks of its actor, critics and memory in an environment.

    `actor`: of Box actions: gaussian, squashed, mixture, beta or deterministic (discrete ones are categorical);
    `state_std`: its spread depends on the state; `log_std`: bounds of a squashed actor's log-std. A mixture has `experts`
    components, whose means start `spread` apart. `critic`: none, value, q, gaussian_q or quantile_q, of `critics` members;
    `dueling`: Q of discrete actions as V + A.
    `off_policy`: transitions are remembered and drawn again, with `discount` = gamma. `backup`: what the next state is
    worth (column `next_q`): soft, component, smoothed, deterministic, greedy, double, gaussian or quantile; "" for none.
    `target_policy`: the backup asks a slow copy of the policy. Targets move by `tau` every `target_every` updates.
    `smoothing`: standard deviation and clip of the noise on a smoothed backup's action. `snapshot_every`: the policy is
    copied every so many updates, for the signal `pathwise_reference_logp` (0: it is not). `reduce`: an ensemble's value
    of the policy's own action: min, first or mean. `recorded`: the method is for recorded data (`--dataset`) only; `compared`:
    these are pairs of segments. `fixed_std`: the log-std of a Gaussian stays where it starts.
    `batches`: on-policy, so many newest batches are trained on together. `behaviour`: a second policy that acts, made of the
    trained one. `keep_best`: the policy that earned the best mean return of a batch so far is kept, as `reference`.
    `info_columns`: entries of each step's info that the method reads. `settings`: fields of `ControlConfig` that the method
    wants to start from.
    """

    actor: str = "gaussian"
    state_std: bool = False
    log_std: tuple[float, float] = (-20.0, 2.0)
    experts: int = 4
    spread: float = 0.0
    critic: str = "value"
    critics: int = 2
    dueling: bool = False
    off_policy: bool = False
    gamma: float = 0.99
    backup: str = ""
    target_policy: bool = False
    tau: float = 0.005
    target_every: int = 1
    smoothing: tuple[float, float] = (0.2, 0.5)
    snapshot_every: int = 0
    reduce: str = "min"
    recorded: bool = False
    compared: bool = False
    fixed_std: bool = False
    explore: Exploration = Exploration()
    batches: int = 1
    behaviour: Behaviour | None = None
    keep_best: bool = False
    info_columns: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def acts_apart(self) -> bool:
        """Whether it asks for something in acting that text has not: another policy, older batches, entries of info, options
        of the environment."""
        asked = self.info_columns or "env_options" in self.settings
        return self.behaviour is not None or self.keep_best or self.batches > 1 or bool(asked)

    @property
    def action_kinds(self) -> frozenset[str]:
        """Of box, categorical and multi_categorical: the actions that actor, critic and backup know."""
        greedy = self.backup in ("greedy", "double")
        discrete = self.actor not in ("deterministic", "mixture") and self.critic in ("none", "value", "q")
        kinds = {"box": not greedy and self.actor != "greedy", "categorical": discrete,
                 "multi_categorical": discrete and self.critic != "q"}  # fmt: skip
        return frozenset(kind for kind, known in kinds.items() if known)
