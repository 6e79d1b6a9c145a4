"""From a configuration and a recipe to a run in an environment: everything is made and checked here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

from unipo.critics import (
    DeterministicBackup,
    DiscreteQ,
    ExpectedBackup,
    GaussianBackup,
    GaussianQ,
    GreedyBackup,
    Pathwise,
    QEnsemble,
    QuantileBackup,
    QuantileQ,
    SmoothedBackup,
    SoftBackup,
    Target,
    ValueCritic,
)
from unipo.critics.backups import ComponentBackup
from unipo.critics.greedy import GreedyPolicy
from unipo.critics.post_decision import PostDecisionCritic
from unipo.critics.recurrent import RecurrentValue
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings, Player, annotate
from unipo.learner.policy_step import PolicyOptimiser
from unipo.objectives import GaussianReturn, Needs, Objective, QuantileRegression, Regression, Sum
from unipo.optimizers import RepeatedSteps
from unipo.policies.control import ControlPolicy
from unipo.policies.distributions import (
    Beta,
    Categorical,
    Deterministic,
    Distribution,
    Gaussian,
    GaussianMixture,
    MultiCategorical,
    SquashedGaussian,
)
from unipo.policies.networks import Normaliser
from unipo.recipe import Recipe
from unipo.sources.acting.behaviour import Recent
from unipo.sources.acting.collector import Collector
from unipo.sources.acting.dispatch import SIMULATORS, Simulators, shifts
from unipo.sources.acting.environments import ActionSpec, Environments, make_environment
from unipo.sources.acting.evaluation import evaluate, filmable
from unipo.sources.acting.remembering import Mode, Remembering, mode
from unipo.sources.acting.reward_scaling import RewardScaler
from unipo.sources.acting.segment_pairs import SegmentPairs
from unipo.sources.acting.transitions import Prioritised, TransitionReplay
from unipo.sources.spec import ActionNoise, ControlSpec
from unipo.training.adapted import Adapted
from unipo.training.config import ConfigError, ControlConfig
from unipo.training.control import Best, EnvironmentData, Joined
from unipo.training.fingerprint import fingerprint
from unipo.training.loop import Run
from unipo.training.progress import Progress
from unipo.training.recorded import recorded_data, recorder
from unipo.training.records import Records
from unipo.training.recurrent import check_recurrent, recurrent_networks
from unipo.training.threads import use_threads

ACTORS: dict[str, Callable[[int, ControlSpec], Distribution]] = {
    "gaussian": lambda size, spec: Gaussian(size),
    "squashed": lambda size, spec: SquashedGaussian(size, *spec.log_std),
    "mixture": lambda size, spec: GaussianMixture(size, spec.experts, True, *spec.log_std, spread=spec.spread),
    "beta": lambda size, spec: Beta(size),
    "deterministic": lambda size, spec: Deterministic(
        size, spec.explore.std if isinstance(spec.explore, ActionNoise) else 0.0
    ),
}
EVALUATION = 1_000_003
"""Added to a run's seed where its policy is evaluated."""
BACKUPS: dict[str, Callable[[Players, ControlSpec], Any]] = {
    "soft": lambda p, _: (ExpectedBackup if isinstance(p.critic, DiscreteQ) else SoftBackup)(p.policy, p.slow_critic),
    "component": lambda p, _: ComponentBackup(p.policy, p.slow_critic),
    "smoothed": lambda p, spec: SmoothedBackup(p.slow_policy, p.slow_critic, *spec.smoothing),
    "deterministic": lambda p, _: DeterministicBackup(p.slow_policy, p.slow_critic),
    "greedy": lambda p, _: GreedyBackup(p.slow_critic),
    "double": lambda p, _: GreedyBackup(p.slow_critic, p.critic),
    "gaussian": lambda p, _: GaussianBackup(p.slow_policy, p.slow_critic),
    "quantile": lambda p, _: QuantileBackup(p.policy, p.slow_critic),
}


@dataclass
class Players:
    """The networks of a run: what acts, what judges, and their slow copies."""

    policy: Any
    value: ValueCritic | RecurrentValue | None
    critic: Any
    slow_policy: Any
    slow_critic: Any
    normaliser: Normaliser | None
    snapshot: Any = None
    post: PostDecisionCritic | None = None
    best: Any = None
    copies: dict[str, Any] = field(default_factory=dict)


def build_control(config: ControlConfig, recipe: Recipe, console: Console | None = None) -> Run:
    """A run at step 0. Raises ConfigError or TaskEnvironmentError for what cannot work."""
    spec = control_spec(config, recipe)
    if config.epochs:
        recipe = recipe.but(epochs=config.epochs)
    use_threads(config.threads, max(config.hidden, default=0))
    torch.manual_seed(config.seed)

    if config.video:
        filmable(maker(config))
    environments = environments_of(config, spec)
    size, actions = environments.observation_spec.size, environments.action_spec
    sized = tuple(c.sized(actions.size, actions.kind != "box").lasting(config.steps) for c in recipe.controllers)
    recipe = recipe.but(
        controllers=sized, objective=weighted(recipe.objective) if config.prioritized else recipe.objective
    )
    players = make_players(config, recipe, spec, size, actions)
    data = make_data(config, spec, environments, players)
    data.needs = Needs.of(columns="old_next_value" if "old_value" in recipe.needs.columns else "")
    trained = trained_players(recipe, spec, players)
    who = annotators(spec, players)
    prepare = None
    if spec.off_policy and recipe.passes == 1:
        prepare = partial(annotate, needs=recipe.needs | data.needs, policies=who, token_budget=config.token_budget)
    learner = Learner(trained, learner_settings(config, recipe, spec), _monitored(players), prepare, data.targets)
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    return Run(config, folder, recipe, players.policy, who, learner, data, Records(folder),
               Progress(config.steps, console), fingerprint(config), modules(players),
               policy_optimiser(config, recipe, players, data, who))  # fmt: skip


WEIGHTED = (Regression, GaussianReturn, QuantileRegression)


def weighted(objective: Objective) -> Objective:
    """With the importance weights of a prioritised replay in its regressions (arXiv 1511.05952, section 3.4)."""
    terms = [(c, t.but(weight="replay_weight") if isinstance(t, WEIGHTED) else t) for c, t in objective.terms()]
    return Sum(weighted=tuple(terms))


def control_spec(config: ControlConfig, recipe: Recipe) -> ControlSpec:
    """What the recipe asks of environments. Raises ConfigError for a method that is not for them."""
    if recipe.control is None:
        raise ConfigError(
            f"{config.method!r} is not for environments such as {config.task}: take a method whose `unipo show` says "
            "control, such as ppo, sac or dqn"
        )
    return recipe.control


# ---- players -----------------------------------------------------------------------------------------------------------
def make_players(config: ControlConfig, recipe: Recipe, spec: ControlSpec, size: int, actions: ActionSpec) -> Players:
    """Policy, critics and their targets. The networks of a run depend on its seed alone."""
    normaliser = Normaliser(size) if config.normalize_observations else None
    net: dict[str, Any] = {"hidden": config.hidden, "activation": config.activation, "normaliser": normaliser}
    if config.recurrent:
        check_recurrent(config, recipe, spec)
        networks = recurrent_networks(recipe, spec, size, distribution(spec, actions), config.log_std_init, net)
        return Players(*networks, None, None, None, normaliser)
    value = ValueCritic(size, orthogonal=config.orthogonal, **net) if "value" in recipe.needs.signals else None
    critic = _action_critic(spec, size, actions, net)
    policy: Any
    if isinstance(critic, DiscreteQ) and spec.backup in ("greedy", "double"):
        policy = GreedyPolicy(critic, actions.size)
    else:
        policy = ControlPolicy(size, distribution(spec, actions), log_std="network" if spec.state_std else "parameter",
                               log_std_init=config.log_std_init, orthogonal=config.orthogonal,
                               masked=actions.masked, **net)  # fmt: skip
        if spec.fixed_std and policy.log_std is not None:
            policy.log_std.requires_grad_(False)
    slow_critic = None if critic is None else copy.deepcopy(critic).requires_grad_(False)
    slow_policy = copy.deepcopy(policy).requires_grad_(False) if spec.target_policy else None
    snapshot = copy.deepcopy(policy).requires_grad_(False) if spec.snapshot_every else None
    post = None
    if "post_value" in recipe.needs.signals:
        post = PostDecisionCritic(ValueCritic(size, orthogonal=config.orthogonal, **net))
    best = copy.deepcopy(policy).requires_grad_(False) if spec.keep_best else None
    copies = {name: copy.deepcopy(policy).requires_grad_(False) for name in sorted(recipe.snapshots)}
    return Players(policy, value, critic, slow_policy, slow_critic, normaliser, snapshot, post, best, copies)


def distribution(spec: ControlSpec, actions: ActionSpec) -> Distribution:
    """The action distribution for a space. Raises ConfigError where the method has none for it."""
    if actions.kind == "box":
        if spec.actor not in ACTORS:
            raise ConfigError(
                f"this method chooses among discrete actions; the environment has {actions.size} real ones"
            )
        if not actions.bounded and spec.actor != "gaussian":
            raise ConfigError(
                f"the action space is unbounded: a {spec.actor} policy covers [-1, 1] only; use ppo or trpo"
            )
        return ACTORS[spec.actor](actions.size, spec)
    if spec.actor in ("deterministic", "mixture"):
        raise ConfigError(
            "this method needs real-valued (Box) actions; the environment has discrete ones: use dqn or ppo"
        )
    return Categorical(actions.size) if actions.kind == "categorical" else MultiCategorical(actions.sizes)


def _action_critic(spec: ControlSpec, size: int, actions: ActionSpec, net: dict[str, Any]) -> Any:
    if spec.critic in ("none", "value"):
        return None
    if actions.kind == "categorical":
        if spec.critic != "q":
            raise ConfigError(
                f"the critic {spec.critic!r} needs real-valued (Box) actions; this space has discrete ones"
            )
        return DiscreteQ(size, actions.size, critics=spec.critics, dueling=spec.dueling, **net)
    if actions.kind != "box":
        raise ConfigError("off-policy critics know Box and Discrete actions; for MultiDiscrete ones use ppo or a2c")
    if spec.backup in ("greedy", "double"):
        raise ConfigError(
            "this method takes a maximum over discrete actions; the environment has a Box: use sac or td3"
        )
    kinds = {"q": QEnsemble, "gaussian_q": GaussianQ, "quantile_q": QuantileQ}
    return kinds[spec.critic](size, actions.size, critics=spec.critics, **net)


def trained_players(recipe: Recipe, spec: ControlSpec, p: Players) -> dict[str, Player]:
    """What the learner trains, by name; `pathwise` joins policy and critic and has no parameters of its own."""
    found: dict[str, Any] = {"policy": p.policy, "value": p.value, "critic": p.critic, "post": p.post}
    if any(s.startswith("pathwise") or s == "router" for s in recipe.needs.signals):
        found["pathwise"] = Pathwise(p.policy, p.critic, spec.reduce, p.snapshot)
    return {name: player for name, player in found.items() if player is not None}


def annotators(spec: ControlSpec, p: Players) -> dict[str, Player]:
    """Who computes the columns old_*, target_*, next_* and reference_*."""
    found: dict[str, Any] = {"old": Joined(*(x for x in (p.policy, p.value, p.critic, p.post) if x is not None))}
    found |= p.copies
    if p.best is not None:
        found["reference"] = p.best
    if p.slow_critic is not None:
        found["target"] = p.slow_critic
    if spec.backup:
        found["next"] = BACKUPS[spec.backup](p, spec)
    return found


def modules(p: Players) -> dict[str, nn.Module]:
    """What is checkpointed besides the policy's parameters."""
    found: dict[str, nn.Module | None] = {
        "value": p.value,
        "critic": p.critic,
        "slow_critic": p.slow_critic,
        "slow_policy": p.slow_policy,
        "snapshot": p.snapshot,
        "post": p.post,
        "best": p.best,
        "normaliser": p.normaliser,
        **p.copies,
    }
    return {name: module for name, module in found.items() if module is not None}


def policy_optimiser(config: ControlConfig, recipe: Recipe, p: Players, data: EnvironmentData,
                     who: Mapping[str, Player]) -> PolicyOptimiser | None:  # fmt: skip
    """Who takes the policy's steps, where the recipe names an optimiser for them."""
    if recipe.policy_step is None:
        return None
    repeated = recipe.policy_step.steps if isinstance(recipe.policy_step, RepeatedSteps) else 1
    settings = learner_settings(config, recipe, recipe.control or ControlSpec())
    settings = replace(settings, total_updates=config.steps * repeated)

    def sample() -> Episodes:
        return annotate(data.another(), recipe.needs | data.needs, who, config.token_budget)

    return PolicyOptimiser(p.policy, Learner({"policy": p.policy}, settings, _monitored(p)), recipe.policy_step, sample)


def _monitored(p: Players) -> tuple[str, ...]:
    """Signals that are computed only to be reported."""
    known = isinstance(getattr(p.policy, "distribution", None), Categorical | MultiCategorical | Gaussian | Beta)
    return ("entropy", "logp") if known and p.value is not None else ()


# ---- data --------------------------------------------------------------------------------------------------------------
def make_data(config: ControlConfig, spec: ControlSpec, environments: Environments, p: Players) -> EnvironmentData:
    """Collector (none for recorded data), replay and targets. Raises ConfigError for data that does not fit."""
    wide = p.policy.noise if isinstance(p.policy, GreedyPolicy) else p.policy.distribution.noise
    scaler = RewardScaler(environments.num, spec.gamma) if config.normalize_rewards else None
    recorded = recorded_data(config, spec, environments)
    collector = None
    if recorded is None:
        collector = Collector(environments, config.seed, wide, scaler, recorder(config, maker(config)))
    slow = [(p.slow_critic, p.critic, spec.tau, spec.target_every), (p.slow_policy, p.policy, spec.tau, spec.target_every),
            (p.snapshot, p.policy, 1.0, spec.snapshot_every)]  # fmt: skip
    targets = tuple(Target(*each) for each in slow if each[0] is not None)
    replay: TransitionReplay | SegmentPairs | None = None
    if spec.compared:
        replay = SegmentPairs(config.seed)
    elif spec.off_policy:
        noise = {"noise": (wide,), "next_noise": (wide,), "target_noise": ()} if spec.critic != "none" else {}
        capacity = config.replay_capacity if recorded is None else recorded.count("step")
        priorities = Prioritised(config.prioritized) if config.prioritized else None
        replay = TransitionReplay(capacity, config.seed, spec.gamma, config.n_step, noise, priorities,
                                  config.folder / "replay" if config.memory_mapped else None)  # fmt: skip
    data = EnvironmentData(config, spec, p.policy, collector, replay, targets, p.normaliser,
                           lambda n: run_episodes(config, p.policy, n), recent=Recent(spec.batches))  # fmt: skip
    if config.recurrent:
        critics = () if not isinstance(p.value, RecurrentValue) else (p.value,)
        data.memory, data.unit = Remembering(p.policy, environments, critics), "group"
    if p.best is not None:
        data.best = Best(p.best)
    if spec.behaviour is not None:
        memory = spec.batches * config.rollout * environments.num
        data.behaviour = Adapted(spec.behaviour, p.policy, memory, config.seed, environments.num)
    if recorded is not None:
        environments.close()
        data.remember(recorded)
    return data


def run_episodes(config: ControlConfig, policy: Any, number: int) -> list[tuple[float, int]]:
    """(return, length) of episodes with the policy's mode, in environments of their own; the same for every evaluation."""
    seed, act = config.seed + EVALUATION, mode(policy)
    if config.task in SIMULATORS:
        assert not isinstance(act, Mode)
        return shifts(act, Simulators(config.task, number, seed, **config.env_options))
    found = evaluate(act, maker(config), number, seed)
    return list(zip(found.returns.tolist(), found.lengths.tolist(), strict=True))


def environments_of(config: ControlConfig, spec: ControlSpec) -> Any:
    """What the policy acts in: `Environments`, or what stands where they do."""
    if config.task in SIMULATORS:
        return Simulators(config.task, config.num_envs, config.seed, **config.env_options)
    return Environments(maker(config), config.num_envs, config.seed, config.asynchronous, spec.info_columns)


def maker(config: ControlConfig) -> Callable[..., Any]:
    """Makes the environment of a run; keyword arguments such as render_mode are passed on."""
    return lambda **more: make_environment(config.task, **config.env_options, **more)


def learner_settings(config: ControlConfig, recipe: Recipe, spec: ControlSpec) -> LearnerSettings:
    steps = config.num_envs * config.rollout * spec.batches
    if spec.off_policy:
        per_step = config.rollout * config.updates / config.train_every
    else:
        per_step = recipe.passes * (-(-steps // config.batch_size) if config.batch_size else 1)
    planned = int(config.steps * per_step)
    return LearnerSettings(
        learning_rate=config.learning_rate, value_learning_rate=config.value_learning_rate or config.learning_rate,
        weight_decay=config.weight_decay, betas=(0.9, 0.999), eps=config.adam_eps, clip_norm=config.clip_norm,
        warmup=config.warmup, schedule=config.schedule, total_updates=planned,
        token_budget=config.token_budget, autocast=config.autocast, compiled=config.compiles(planned),
    )  # fmt: skip
