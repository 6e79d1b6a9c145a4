"""PPO in one file, after the structure that CleanRL publishes: torch modules and distributions, synchronous vector environment.

    build/peers/venv/bin/python -m benchmarks.control.cleanrl_style_ppo ppo-cartpole --threads 1

Written for this benchmark from the published structure and defaults (one Agent module with separate actor and critic, statistics
of episodes by a wrapper, rollout tensors [steps, envs], GAE backwards, epochs of shuffled minibatches, Adam with eps 1e-5); the
settings are those of the row. Trackers are left out, as on the other sides.
"""

from __future__ import annotations

from typing import Any

from benchmarks.control.settings import PPO
from benchmarks.control.side import Meter, parser, prepare, say

GIVEN = parser(__doc__, tuple(PPO)).parse_args()
prepare(GIVEN.threads)

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributions import Categorical, Normal  # noqa: E402


def layer(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    made = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(made.weight, gain)
    nn.init.zeros_(made.bias)
    return made


def network(inputs: int, width: int, outputs: int, gain: float) -> nn.Sequential:
    return nn.Sequential(layer(inputs, width), nn.Tanh(), layer(width, width), nn.Tanh(), layer(width, outputs, gain))


class Agent(nn.Module):
    """Actor and critic apart; of real actions the spread is one vector."""

    def __init__(self, envs: Any, width: int) -> None:
        super().__init__()
        size, actions = int(np.prod(envs.single_observation_space.shape)), envs.single_action_space
        self.discrete = isinstance(actions, gym.spaces.Discrete)
        outputs = int(actions.n) if self.discrete else int(np.prod(actions.shape))
        self.critic, self.actor = network(size, width, 1, 1.0), network(size, width, outputs, 0.01)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(1, outputs))

    def act(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(action, log-prob, entropy, value)."""
        given = self.actor(x)
        if self.log_std is None:
            drawn = Categorical(logits=given)
            action = drawn.sample() if action is None else action
            return action, drawn.log_prob(action), drawn.entropy(), self.critic(x)
        normal = Normal(given, self.log_std.expand_as(given).exp())
        action = normal.sample() if action is None else action
        return action, normal.log_prob(action).sum(1), normal.entropy().sum(1), self.critic(x)


def environment(name: str) -> Any:
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(name))
    if isinstance(env.action_space, gym.spaces.Box):
        env = gym.wrappers.ClipAction(gym.wrappers.FlattenObservation(env))
    return env


def update(agent: Agent, optimizer: Any, s: dict[str, Any], batch: dict[str, Tensor]) -> None:
    """One clipped update on a minibatch."""
    _, logp, entropy, value = agent.act(batch["observation"], batch["action"])
    ratio = (logp - batch["logp"]).exp()
    with torch.no_grad():  # what the script logs of every minibatch
        ((ratio - 1) - (logp - batch["logp"])).mean()
        ((ratio - 1.0).abs() > s["clip_range"]).float().mean().item()
    advantage = batch["advantage"]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = torch.clamp(ratio, 1 - s["clip_range"], 1 + s["clip_range"])
    policy_loss = torch.max(-advantage * ratio, -advantage * clipped).mean()
    value_loss = 0.5 * ((value.view(-1) - batch["return"]) ** 2).mean()
    loss = policy_loss - s["ent_coef"] * entropy.mean() + 2 * s["vf_coef"] * value_loss
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), s["max_grad_norm"])
    optimizer.step()


def main() -> None:
    torch.set_num_threads(GIVEN.threads)
    torch.manual_seed(GIVEN.seed)
    np.random.seed(GIVEN.seed)
    s = PPO[GIVEN.row]
    steps, copies = s["n_steps"], s["n_envs"]
    reset = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([lambda: environment(s["environment"])] * copies, autoreset_mode=reset)
    agent = Agent(envs, s["width"])
    optimizer = torch.optim.Adam(agent.parameters(), lr=s["learning_rate"], eps=1e-5)
    observations = torch.zeros((steps, copies, *envs.single_observation_space.shape))
    actions = torch.zeros((steps, copies, *envs.single_action_space.shape))
    logps, rewards, dones, values = (torch.zeros((steps, copies)) for _ in range(4))
    meter, going = Meter("env_step", GIVEN.warm, GIVEN.seconds), True
    seen, _ = envs.reset(seed=GIVEN.seed)
    observation, done = torch.Tensor(seen), torch.zeros(copies)
    while going:
        for t in range(steps):
            observations[t], dones[t] = observation, done
            with torch.no_grad():
                action, logp, _, value = agent.act(observation)
            values[t], actions[t], logps[t] = value.flatten(), action, logp
            seen, reward, terminated, truncated, _ = envs.step(action.numpy())
            rewards[t] = torch.tensor(reward).view(-1)
            observation, done = torch.Tensor(seen), torch.Tensor(np.logical_or(terminated, truncated))
        with torch.no_grad():
            advantages, last = torch.zeros_like(rewards), torch.zeros(copies)
            following = agent.critic(observation).view(-1)
            for t in reversed(range(steps)):
                on = 1.0 - (done if t == steps - 1 else dones[t + 1])
                delta = rewards[t] + s["gamma"] * (following if t == steps - 1 else values[t + 1]) * on - values[t]
                advantages[t] = last = delta + s["gamma"] * s["gae_lambda"] * on * last
        flat = {"observation": observations.flatten(0, 1), "action": actions.flatten(0, 1), "logp": logps.flatten(),
                "advantage": advantages.flatten(), "return": (advantages + values).flatten()}  # fmt: skip
        order = np.arange(steps * copies)
        for _ in range(s["n_epochs"]):
            np.random.shuffle(order)
            for start in range(0, len(order), s["batch_size"]):
                rows = order[start : start + s["batch_size"]]
                update(agent, optimizer, s, {name: column[rows] for name, column in flat.items()})
        going = meter.add(steps * copies)
    say(meter.result(f"CleanRL-style script, {GIVEN.threads} thread(s)", ("torch", "gymnasium", "mujoco", "numpy")))


if __name__ == "__main__":
    main()
