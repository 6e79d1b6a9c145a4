"""SAC, PMOE and DSAC-T (arXiv 1812.05905, 2104.09122, 2310.05858): scales of rewards, two equal peaks, Pendulum.

Small problems, the library's own recipes: a point on a line whose transitions are drawn anew for every update (no exploration,
no memory), a bandit with two peaks, and Pendulum by the library's own loop.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from unipo.critics import Pathwise, polyak
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings, Player, annotate
from unipo.methods.actor_critic import dsac_t, pmoe, sac
from unipo.methods.catalog import find
from unipo.objectives import Objective, Sum, with_settings
from unipo.policies.control import ControlPolicy
from unipo.policies.distributions import GaussianMixture
from unipo.recipe import Recipe
from unipo.reproduce.claim import Claim, Expectation
from unipo.sources.acting.spaces import ActionSpec
from unipo.sources.keyed import keyed_generator
from unipo.training.build_control import Players, annotators, build_control, make_players, trained_players
from unipo.training.config import ControlConfig

# ---- a point on a line -----------------------------------------------------------------------------------------------
GAMMA, TAU, NOISE, STATES, HORIZON = 0.8, 0.02, 0.5, 32, 30
ALPHA = 0.2
LINE = ActionSpec("box", 1)


@dataclass(frozen=True, slots=True)
class Setting:
    """How the point is learned: scales of its reward, updates, transitions in each, learning rate."""

    scales: tuple[float, ...]
    updates: int
    batch: int
    rate: float


OF_SAC = Setting((0.1, 1.0, 10.0), 1500, 128, 1e-3)
OF_DSAC = Setting((0.1, 10.0), 800, 64, 2e-3)


def moved(state: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(next state [n, 1], reward [n]) of a point at `state` pushed by `action`; it should come to 0 and stay, cheaply."""
    following = (state + 0.5 * action).clamp(-1, 1)
    return following, -(following.square() + 0.05 * action.square()).squeeze(1) + NOISE * noise


def drawn(generator: torch.Generator, scale: float, n: int) -> Episodes:
    """n transitions from states and actions drawn uniformly, with the noise of the players."""
    state, action = (2 * torch.rand(n, 1, generator=generator) - 1 for _ in range(2))
    normal = [torch.randn(n, 1, generator=generator) for _ in range(4)]
    following, reward = moved(state, action, normal[0].squeeze(1))
    step = {"observation": state, "action": action, "reward": scale * reward, "noise": normal[1], "next_noise": normal[2],
            "target_noise": normal[3].squeeze(1)}  # fmt: skip
    episode = {"terminated": torch.zeros(n, dtype=torch.bool), "discount": torch.full((n,), GAMMA),
               "final_observation": following}  # fmt: skip
    return Episodes.flat(step, episode, kind="rollout")


def learned(recipe: Recipe, seed: int, scale: float, setting: Setting, steps: int) -> tuple[Players, dict[str, float]]:
    """Train on drawn transitions; what came out, and the knobs at the end."""
    spec = recipe.control
    assert spec is not None
    generator = torch.Generator().manual_seed(int(keyed_generator(seed, "point").integers(2**31)))
    recipe = recipe.but(controllers=tuple(c.sized(1, False) for c in recipe.controllers))
    torch.manual_seed(seed)
    settings = ControlConfig(hidden=(32, 32), activation="relu", orthogonal=False)
    players = make_players(settings, recipe, spec, 1, LINE)
    learner = Learner(trained_players(recipe, spec, players), LearnerSettings(
        learning_rate=setting.rate, value_learning_rate=setting.rate, betas=(0.9, 0.999), clip_norm=float("inf")))  # fmt: skip
    who, states = annotators(spec, players), {c.knob: c.start() for c in recipe.controllers}
    slow = [(players.slow_critic, players.critic), (players.slow_policy, players.policy)]
    for step in range(steps):
        knobs = {c.knob: c.setting(states[c.knob], step) for c in recipe.controllers}
        batch = annotate(drawn(generator, scale, setting.batch), recipe.needs, who, 1 << 20)
        update = learner.update(batch, with_settings(recipe.objective, knobs))
        for c in recipe.controllers:
            states[c.knob] = c.observe(states[c.knob], update.means())
        for target, online in slow:
            if target is not None and (step + 1) % spec.target_every == 0:
                polyak(target, online, spec.tau)
    return players, {c.knob: c.setting(states[c.knob], steps) for c in recipe.controllers}


@torch.no_grad()
def judged(players: Players, seed: int, scale: float, temperature: float, rollouts: int = 64) -> dict[str, float]:
    """In units of `scale`, from states and first actions on a grid: the policy's return, its entropy's worth apart; the mean
    error of the critics' smaller value against that of sampled futures; and sigma over their standard deviation."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    state = torch.linspace(-0.9, 0.9, STATES)[:, None]
    first = 0.8 * (-state).sign() * state.abs()
    s, a, soft, hard = state.repeat(rollouts, 1), first.repeat(rollouts, 1), torch.zeros(1), torch.zeros(1)
    for t in range(HORIZON):
        s, reward = moved(s, a, torch.randn(len(s), generator=generator))
        hard = hard + GAMMA**t * reward
        a, logp = players.policy.act(s, torch.randn(len(s), 1, generator=generator))
        soft = soft + GAMMA**t * (scale * reward - GAMMA * temperature * logp)
    futures = soft.reshape(rollouts, STATES) / scale
    q = players.critic.q(state, first).amin(1) / scale
    found = {"return": float(hard.mean()), "error": float((q - futures.mean(0)).abs().mean())}
    if hasattr(players.critic, "moments"):
        sigma = players.critic.moments(state, first)[1].mean(1) / scale
        found["spread"] = float((sigma / futures.std(0)).mean())
    return found


def over_scales(recipe: Recipe, setting: Setting, seed: int, steps: int) -> list[dict[str, float]]:
    """What is judged, at every scale, after at most `steps` updates."""
    found = []
    for scale in setting.scales:
        players, knobs = learned(recipe, seed, scale, setting, min(steps, setting.updates))
        found.append({**judged(players, seed, scale, knobs.get("temperature", ALPHA)), **knobs})
    return found


# ---- sac -------------------------------------------------------------------------------------------------------------
STEPS = 5000


def pendulum(recipe: Recipe, seed: int, steps: int) -> float:
    """Mean return of 10 episodes of the mode after `steps` steps of Pendulum-v1, by the library's loop."""
    assert recipe.control is not None
    with tempfile.TemporaryDirectory() as folder:
        settings = {**recipe.control.settings, "method": "sac", "task": "Pendulum-v1", "out": str(Path(folder) / "run"),
                    "seed": seed, "total_timesteps": steps, "rollout": min(steps, 1000), "learning_rate": 1e-3,
                    "hidden": (64, 64), "evaluations": 1, "checkpoints": 1, "tensorboard": False}  # fmt: skip
        run = build_control(ControlConfig(**settings), recipe, Console(file=io.StringIO()))
        run.train()
        run.data.close()
    return float(run.records.metrics[-1]["eval_return"])


def sac_trial(automatic: bool, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Pendulum, and the point at three scales of its rewards; returns and errors in units of the scale."""
    recipe = sac(gamma=GAMMA, tau=TAU, temperature=ALPHA, automatic=automatic, temperature_rate=5e-3)
    found = over_scales(recipe, OF_SAC, seed, steps)
    learning = sac(temperature=ALPHA, automatic=automatic, temperature_rate=1e-3)
    each = list(zip(OF_SAC.scales, found, strict=True))
    return {"pendulum": pendulum(learning, seed, steps), "worst return": min(f["return"] for f in found),
            **{f"return at x{scale:g}": f["return"] for scale, f in each},
            **{f"temperature at x{scale:g}": f.get("temperature", ALPHA) for scale, f in each}}  # fmt: skip


# ---- dsac-t ----------------------------------------------------------------------------------------------------------
def dsac_trial(recipe: Recipe, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """The point at two scales of its rewards; nothing but the scale differs."""
    found = over_scales(recipe, OF_DSAC, seed, steps)
    return {"worst return": min(f["return"] for f in found), "worst error": max(f["error"] for f in found),
            **{f"error at x{scale:g}": f["error"] for scale, f in zip(OF_DSAC.scales, found, strict=True)},
            "spread": found[-1].get("spread", 0.0)}  # fmt: skip


def likelihood(recipe: Recipe) -> Recipe:
    """Its first version's critic: gradients of a Gaussian likelihood, 1 / sigma^2, and draws clipped at a fixed 10."""
    left = tuple(c for c in recipe.controllers if not c.knob.startswith("spread"))
    changed = recipe.objective.terms()[0][1].but(spreads=(1.0, 1.0), rate=0.0, bound=10.0, scale=(0.0, 1e9))
    terms = ((1.0, changed), *recipe.objective.terms()[1:])
    return recipe.but(objective=Sum(weighted=terms), controllers=left)


DSAC = dsac_t(gamma=GAMMA, tau=TAU, temperature=ALPHA, temperature_rate=2e-2, spread_rate=TAU)
SAC = sac(gamma=GAMMA, tau=TAU, temperature=ALPHA, temperature_rate=1e-2)


# ---- pmoe ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Experts:
    """An arm of the bandit: how many experts, and which of them climb."""

    experts: int
    update: str = "all"


BANDITS, WIDTH, PEAK = 32, 0.2, 0.7


class TwoPeaks:
    """Q(a) = the sum of two equal bumps at +-PEAK, in every state."""

    def q(self, observation: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        bumps = [torch.exp(-((action - p) / WIDTH).square() / 2) for p in (PEAK, -PEAK)]
        return torch.stack(bumps).sum(0)


def bandit_policy(arm: Experts, seed: int) -> ControlPolicy:
    """An independent mixture for each of `BANDITS` states, its experts' means drawn with standard deviation 1."""
    torch.manual_seed(seed)
    mixture: Any = GaussianMixture(1, arm.experts)
    policy = ControlPolicy(BANDITS, mixture, (), log_std="network", orthogonal=False)
    generator = torch.Generator().manual_seed(seed + 17)
    policy.network.head.bias.requires_grad_(False)
    with torch.no_grad():
        policy.network.head.bias.zero_()
        policy.network.head.weight.zero_()
        means = torch.randn(arm.experts, BANDITS, generator=generator)
        policy.network.head.weight[arm.experts : 2 * arm.experts] = means
    return policy


def pmoe_trial(arm: Experts, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Shares of bandits whose policy takes either side in 20 to 80 % of its actions, and what its actions are worth."""
    recipe = pmoe(experts=arm.experts, update=arm.update, temperature=0.05, automatic=False)
    objective: Objective = Sum(weighted=tuple((c, t) for c, t in recipe.objective.terms() if t.title != "critic"))
    policy, critic = bandit_policy(arm, seed), TwoPeaks()
    players: dict[str, Player] = {"policy": policy, "pathwise": Pathwise(policy, critic)}
    learner = Learner(players, LearnerSettings(learning_rate=rate, betas=(0.9, 0.999), clip_norm=1e9))
    generator, states = torch.Generator().manual_seed(seed), torch.eye(BANDITS).repeat(8, 1)
    wide = policy.distribution.noise
    for _ in range(steps):
        noise = torch.randn(len(states), wide, generator=generator)
        learner.update(Episodes.flat({"observation": states, "noise": noise}, kind="rollout"), objective)
    return looked_at(policy, critic, generator)


@torch.no_grad()
def looked_at(policy: ControlPolicy, critic: TwoPeaks, generator: torch.Generator) -> dict[str, float]:
    """Of 500 actions in every bandit."""
    mixture: Any = policy.distribution
    seen = torch.eye(BANDITS).repeat(500, 1)
    action = policy.act(seen, torch.randn(len(seen), mixture.noise, generator=generator))[0]
    near = [((action - p).abs() < 2 * WIDTH).float().reshape(500, BANDITS).mean(0) for p in (PEAK, -PEAK)]
    heaviest = mixture.weights(policy.raw(torch.eye(BANDITS))).amax(1)
    return {"both peaks": float(((near[0] > 0.2) & (near[1] > 0.2)).float().mean()),
            "value": float(critic.q(seen, action).mean()), "heaviest expert": float(heaviest.mean())}  # fmt: skip


CLAIMS = (
    Claim(
        slug="sac",
        statement=find("sac").claim,
        arms={"sac": True, "fixed temperature": False},
        trial=sac_trial,
        steps=STEPS,
        tune="worst return",
        grid=(0.0,),
        expectations=(
            Expectation(arm="sac", metric="pendulum", least=-200.0),
            Expectation(arm="sac", metric="worst return", than="fixed temperature", least=0.1),
        ),
        note=f"Pendulum-v1, {STEPS} steps, networks of 64 x 64, rate 1e-3, mean return of 10 episodes of the mode. Scales: a "
        f"noisy point on a line whose reward is multiplied by {OF_SAC.scales}, {OF_SAC.updates} updates on transitions drawn "
        "anew, nothing else changed; the return is that of sampled actions, in units of the scale. Both arms start at "
        f"temperature {ALPHA}. The paper's tasks are MuJoCo's; there the scale also decides how much is explored, here it "
        "does not.",
    ),
    Claim(
        slug="pmoe",
        statement=find("pmoe").claim,
        arms={
            "pmoe, 4 experts": Experts(4),
            "one gaussian": Experts(1),
            "pmoe, 2 experts": Experts(2),
            "max, 4 experts": Experts(4, "max"),
            "max, 2 experts": Experts(2, "max"),
        },
        trial=pmoe_trial,
        steps=3000,
        tune="value",
        grid=(3e-3,),
        expectations=(
            Expectation(arm="pmoe, 4 experts", metric="both peaks", than="one gaussian", least=0.2),
            Expectation(arm="pmoe, 4 experts", metric="value", least=0.8),
        ),
        note=f"{BANDITS} independent bandits of one state per seed, two equal peaks of width {WIDTH} at +-{PEAK} (tanh-squashed "
        "actions), temperature .05, Adam 3e-3, 256 samples per update, initial means drawn with standard deviation 1. Both "
        "peaks: at least a fifth of the actions within two widths of either. Value: of sampled actions, at most 1. max: only "
        "the best expert climbs, as one reading of the paper has it. The critic is known; no task is learned.",
    ),
    Claim(
        slug="dsac-t",
        statement=find("dsac-t").claim,
        arms={"dsac-t": DSAC, "likelihood": likelihood(DSAC), "sac": SAC},
        trial=dsac_trial,
        steps=OF_DSAC.updates,
        tune="worst return",
        grid=(OF_DSAC.rate,),
        expectations=(
            Expectation(arm="likelihood", metric="worst error", than="dsac-t", least=0.0),
            Expectation(arm="dsac-t", metric="worst return", than="sac", least=-0.05),
            Expectation(arm="dsac-t", metric="spread", least=0.9, most=1.1),
        ),
        note=f"A noisy point on a line whose reward is multiplied by {OF_DSAC.scales}, {OF_DSAC.updates} updates on "
        "transitions drawn anew, nothing else changed (temperature by dual ascent, from .2). Error: mean distance of the "
        "smaller critic from 64 sampled futures, entropy included; spread: sigma over their standard deviation at scale 10 (0: "
        "no sigma); returns are those of sampled actions; all in units of the scale. likelihood: the gradients of a Gaussian "
        "likelihood with draws clipped at 10, as the method's first version, otherwise the same. The paper's tasks are "
        "MuJoCo's.",
    ),
)
