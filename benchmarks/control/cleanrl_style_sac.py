"""SAC in one file, after the structure that CleanRL publishes: two critic modules, replay in numpy, one environment.

    build/peers/venv/bin/python -m benchmarks.control.cleanrl_style_sac sac-halfcheetah --threads 1

Written for this benchmark from the published structure: soft clipping of log-std into [-5, 2], critics moved at every step,
the actor and the temperature twice at every second step, targets at every step; the settings are those of the row.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from benchmarks.control.settings import SAC
from benchmarks.control.side import Meter, parser, prepare, say

GIVEN = parser(__doc__, tuple(SAC)).parse_args()
prepare(GIVEN.threads)

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributions import Normal  # noqa: E402


class Critic(nn.Module):
    def __init__(self, size: int, actions: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(size + actions, width), nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        found: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(torch.cat([x, a], 1))))))
        return found


class Actor(nn.Module):
    def __init__(self, size: int, actions: int, width: int, space: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, width), nn.Linear(width, width)
        self.mean, self.log_std = nn.Linear(width, actions), nn.Linear(width, actions)
        self.register_buffer("scale", torch.tensor((space.high - space.low) / 2, dtype=torch.float32))
        self.register_buffer("middle", torch.tensor((space.high + space.low) / 2, dtype=torch.float32))

    def act(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(action, log-prob [n, 1])."""
        h = F.relu(self.fc2(F.relu(self.fc1(x))))
        log_std = -5 + 0.5 * (2 - (-5)) * (torch.tanh(self.log_std(h)) + 1)
        normal = Normal(self.mean(h), log_std.exp())
        raw = normal.rsample()
        y = torch.tanh(raw)
        logp = normal.log_prob(raw) - torch.log(self.scale * (1 - y.pow(2)) + 1e-6)
        return y * self.scale + self.middle, logp.sum(1, keepdim=True)


class Replay:
    """Arrays of columns; a batch is gathered with random rows."""

    def __init__(self, capacity: int, size: int, actions: int) -> None:
        self.columns = {"x": np.zeros((capacity, size), np.float32), "x2": np.zeros((capacity, size), np.float32),
                        "a": np.zeros((capacity, actions), np.float32), "r": np.zeros((capacity, 1), np.float32),
                        "d": np.zeros((capacity, 1), np.float32)}  # fmt: skip
        self.at, self.full, self.capacity = 0, False, capacity

    def add(self, **row: Any) -> None:
        for name, value in row.items():
            self.columns[name][self.at] = value
        self.at = (self.at + 1) % self.capacity
        self.full = self.full or self.at == 0

    def sample(self, n: int) -> dict[str, Tensor]:
        rows = np.random.randint(0, self.capacity if self.full else self.at, n)
        return {name: torch.as_tensor(column[rows]) for name, column in self.columns.items()}


class Learner:
    def __init__(self, size: int, space: Any, s: dict[str, Any]) -> None:
        actions, width = int(np.prod(space.shape)), s["width"]
        self.s, self.actor = s, Actor(size, actions, width, space)
        self.q1, self.q2, self.t1, self.t2 = (Critic(size, actions, width) for _ in range(4))
        self.t1.load_state_dict(self.q1.state_dict())
        self.t2.load_state_dict(self.q2.state_dict())
        rate = s["learning_rate"]
        self.q_optimizer = torch.optim.Adam([*self.q1.parameters(), *self.q2.parameters()], lr=rate)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=rate)
        self.log_alpha = torch.zeros(1, requires_grad=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=rate)
        self.alpha, self.entropy = 1.0, -float(actions)

    def update(self, b: dict[str, Tensor], step: int) -> None:
        with torch.no_grad():
            a2, logp2 = self.actor.act(b["x2"])
            soft = torch.min(self.t1(b["x2"], a2), self.t2(b["x2"], a2)) - self.alpha * logp2
            target = b["r"] + (1 - b["d"]) * self.s["gamma"] * soft
        loss = F.mse_loss(self.q1(b["x"], b["a"]), target) + F.mse_loss(self.q2(b["x"], b["a"]), target)
        self.q_optimizer.zero_grad()
        loss.backward()
        self.q_optimizer.step()
        if step % 2 == 0:
            for _ in range(2):
                self.climb(b)
        for q, t in ((self.q1, self.t1), (self.q2, self.t2)):
            for p, slow in zip(q.parameters(), t.parameters(), strict=True):
                slow.data.copy_(self.s["tau"] * p.data + (1 - self.s["tau"]) * slow.data)

    def climb(self, b: dict[str, Tensor]) -> None:
        a, logp = self.actor.act(b["x"])
        loss = (self.alpha * logp - torch.min(self.q1(b["x"], a), self.q2(b["x"], a))).mean()
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.actor_optimizer.step()
        with torch.no_grad():
            _, logp = self.actor.act(b["x"])
        alpha_loss = (-self.log_alpha.exp() * (logp + self.entropy)).mean()
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        self.alpha = self.log_alpha.exp().item()


def main() -> None:
    torch.set_num_threads(GIVEN.threads)
    torch.manual_seed(GIVEN.seed)
    np.random.seed(GIVEN.seed)
    if GIVEN.precision == "mkldnn":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    s = SAC[GIVEN.row]
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(s["environment"]))
    size, space = int(np.prod(env.observation_space.shape or ())), env.action_space
    learner, replay = Learner(size, space, s), Replay(s["buffer_size"], size, int(np.prod(space.shape or ())))
    context = torch.autocast("cpu", dtype=torch.bfloat16) if GIVEN.precision == "autocast" else nullcontext()
    meter, step, going = Meter("update", GIVEN.warm, GIVEN.seconds), 0, True
    x, _ = env.reset(seed=GIVEN.seed)
    with context:
        while going:
            if step < s["learning_starts"]:
                action = space.sample()
            else:
                with torch.no_grad():
                    action = learner.actor.act(torch.as_tensor(x, dtype=torch.float32)[None])[0][0].float().numpy()
            x2, reward, terminated, truncated, _ = env.step(action)
            replay.add(x=x, x2=x2, a=action, r=reward, d=terminated)
            x = env.reset()[0] if terminated or truncated else x2
            if step >= s["learning_starts"]:
                learner.update(replay.sample(s["batch_size"]), step)
                going = meter.add(1)
            step += 1
    notes = f"CleanRL-style script, {GIVEN.threads} thread(s), {GIVEN.precision}"
    say(meter.result(notes, ("torch", "gymnasium", "mujoco", "numpy")))


if __name__ == "__main__":
    main()
