"""TD3+BC and IQL in one file, after the structure that CORL publishes: torch modules, the dataset as tensors on the device.

    build/peers/venv/bin/python -m benchmarks.control.corl_style td3bc --threads 1 --width 256

Written for this benchmark from the published structure: every critic a module and an optimiser step of its own kind, batches
gathered from the whole dataset, targets by soft updates; observations standardised for TD3+BC. Nothing is logged.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.control.settings import OFFLINE
from benchmarks.control.side import Meter, parser, prepare, say, say_returns

GIVEN = parser(__doc__, tuple(OFFLINE)).parse_args()
prepare(GIVEN.threads)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributions import Normal  # noqa: E402

ARRAYS = Path(__file__).resolve().parents[2] / "build" / "bench" / "halfcheetah" / "transitions.npz"


def network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


class Actor(nn.Module):
    """Actions in [-1, 1]; `log_std` is of IQL's Gaussian."""

    def __init__(self, size: int, width: int, actions: int) -> None:
        super().__init__()
        self.net, self.log_std = network(size, width, actions), nn.Parameter(torch.zeros(actions))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.net(x))

    def logp(self, x: Tensor, a: Tensor) -> Tensor:
        normal = Normal(self(x), self.log_std.clamp(-20, 2).exp())
        return normal.log_prob(a).sum(-1)


class Critic(nn.Module):
    def __init__(self, size: int, width: int, actions: int) -> None:
        super().__init__()
        self.net = network(size + actions, width, 1)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        found: Tensor = self.net(torch.cat([x, a], 1))
        return found


class Twins(nn.Module):
    def __init__(self, size: int, width: int, actions: int) -> None:
        super().__init__()
        self.q1, self.q2 = Critic(size, width, actions), Critic(size, width, actions)

    def both(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.q1(x, a), self.q2(x, a)


def soft_update(slow: nn.Module, fast: nn.Module, tau: float) -> None:
    for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
        a.data.copy_((1 - tau) * a.data + tau * b.data)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Td3Bc:
    def __init__(self, size: int, actions: int, width: int, s: dict[str, Any]) -> None:
        self.s, self.updates = s, 0
        self.actor = Actor(size, width, actions)
        self.critics = [Critic(size, width, actions) for _ in range(2)]
        self.actor_slow, self.slow = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.actor_optimizer = torch.optim.Adam(self.actor.net.parameters(), lr=s["learning_rate"])
        self.optimizers = [torch.optim.Adam(c.parameters(), lr=s["learning_rate"]) for c in self.critics]

    def update(self, x: Tensor, a: Tensor, r: Tensor, x2: Tensor, d: Tensor) -> dict[str, float]:
        s, said = self.s, {}
        self.updates += 1
        with torch.no_grad():
            noise = (torch.randn_like(a) * s["smoothing"]).clamp(-s["clip"], s["clip"])
            a2 = (self.actor_slow(x2) + noise).clamp(-1, 1)
            target = r + (1 - d) * s["gamma"] * torch.min(self.slow[0](x2, a2), self.slow[1](x2, a2))
        loss = sum(F.mse_loss(c(x, a), target) for c in self.critics)
        assert isinstance(loss, Tensor)
        said["critic_loss"] = loss.item()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.updates % s["delay"] == 0:
            pi = self.actor(x)
            q = self.critics[0](x, pi)
            actor_loss = -s["alpha"] / q.abs().mean().detach() * q.mean() + F.mse_loss(pi, a)
            said["actor_loss"] = actor_loss.item()
            step(self.actor_optimizer, actor_loss)
            for slow, fast in zip([*self.slow, self.actor_slow], [*self.critics, self.actor], strict=True):
                soft_update(slow, fast, s["tau"])
        return said


class Iql:
    def __init__(self, size: int, actions: int, width: int, s: dict[str, Any]) -> None:
        self.s = s
        self.actor, self.value = Actor(size, width, actions), network(size, width, 1)
        self.q = Twins(size, width, actions)
        self.slow = copy.deepcopy(self.q)
        rate = s["learning_rate"]
        self.v_optimizer = torch.optim.Adam(self.value.parameters(), lr=rate)
        self.q_optimizer = torch.optim.Adam(self.q.parameters(), lr=rate)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=rate)

    def update(self, x: Tensor, a: Tensor, r: Tensor, x2: Tensor, d: Tensor) -> dict[str, float]:
        s = self.s
        with torch.no_grad():
            following = self.value(x2)
            wanted = torch.min(*self.slow.both(x, a))
        advantage = wanted - self.value(x)
        v_loss = ((s["expectile"] - (advantage < 0).float()).abs() * advantage**2).mean()
        step(self.v_optimizer, v_loss)
        target = r + (1 - d) * s["gamma"] * following
        q_loss = sum(F.mse_loss(q, target) for q in self.q.both(x, a)) / 2
        assert isinstance(q_loss, Tensor)
        step(self.q_optimizer, q_loss)
        soft_update(self.slow, self.q, s["tau"])
        weight = (s["beta"] * advantage.detach()).exp().clamp(max=s["cap"]).squeeze(1)
        actor_loss = -(weight * self.actor.logp(x, a)).mean()
        step(self.actor_optimizer, actor_loss)
        return {"value_loss": v_loss.item(), "q_loss": q_loss.item(), "actor_loss": actor_loss.item()}


def main() -> None:
    torch.set_num_threads(GIVEN.threads)
    torch.manual_seed(GIVEN.seed)
    np.random.seed(GIVEN.seed)
    if GIVEN.precision == "mkldnn":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    s, found = OFFLINE[GIVEN.row], np.load(ARRAYS)
    observation, following = found["observation"], found["next_observation"]
    if GIVEN.row == "td3bc":
        mean, std = observation.mean(0), observation.std(0) + 1e-3
        observation, following = (observation - mean) / std, (following - mean) / std
    arrays = (
        observation,
        found["action"].clip(-1, 1),
        found["reward"][:, None],
        following,
        found["terminated"][:, None],
    )
    columns = [torch.tensor(np.asarray(c, np.float32)) for c in arrays]
    kind = {"td3bc": Td3Bc, "iql": Iql}[GIVEN.row]
    learner = kind(columns[0].shape[1], columns[1].shape[1], GIVEN.width, s)
    context = torch.autocast("cpu", dtype=torch.bfloat16) if GIVEN.precision == "autocast" else nullcontext()
    if GIVEN.steps:
        with context:
            for _ in range(GIVEN.steps):
                rows = np.random.randint(0, len(columns[0]), s["batch_size"])
                learner.update(*(c[rows] for c in columns))

        def act(x: np.ndarray) -> np.ndarray:
            seen = (x - mean) / std if GIVEN.row == "td3bc" else x
            with torch.no_grad():
                return np.asarray(learner.actor(torch.as_tensor(seen)).float())

        say_returns(s["environment"], GIVEN.steps, act, GIVEN.precision, ("torch", "gymnasium", "mujoco", "numpy"))
        return
    meter, going = Meter("update", GIVEN.warm, GIVEN.seconds), True
    with context:
        while going:
            rows = np.random.randint(0, len(columns[0]), s["batch_size"])
            learner.update(*(c[rows] for c in columns))
            going = meter.add(1)
    notes = f"CORL-style script, {GIVEN.threads} thread(s), {GIVEN.precision}"
    say(meter.result(notes, ("torch", "numpy")))


if __name__ == "__main__":
    main()
