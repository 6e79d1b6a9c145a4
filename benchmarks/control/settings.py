"""The settings of the control rows, the same on every side, in the words of Stable-Baselines3."""

from __future__ import annotations

from typing import Any

PPO: dict[str, dict[str, Any]] = {
    "ppo-cartpole": {
        "environment": "CartPole-v1", "n_envs": 8, "n_steps": 128, "batch_size": 256, "n_epochs": 4, "width": 64,
        "learning_rate": 1e-3, "gamma": 0.99, "gae_lambda": 0.95, "clip_range": 0.2, "ent_coef": 0.0, "vf_coef": 0.5,
        "max_grad_norm": 0.5,
    },
    "ppo-halfcheetah": {
        "environment": "HalfCheetah-v5", "n_envs": 8, "n_steps": 256, "batch_size": 64, "n_epochs": 10, "width": 64,
        "learning_rate": 3e-4, "gamma": 0.99, "gae_lambda": 0.95, "clip_range": 0.2, "ent_coef": 0.0, "vf_coef": 0.5,
        "max_grad_norm": 0.5,
    },
}  # fmt: skip
"""PPO: tanh networks of two hidden layers for the policy and for the value each, Adam (eps 1e-5), advantages normalised."""

SAC: dict[str, dict[str, Any]] = {
    "sac-halfcheetah": {
        "environment": "HalfCheetah-v5", "batch_size": 256, "width": 256, "learning_rate": 3e-4, "gamma": 0.99, "tau": 0.005,
        "learning_starts": 100, "buffer_size": 200_000,
    },
    "sac-pendulum": {
        "environment": "Pendulum-v1", "batch_size": 256, "width": 256, "learning_rate": 1e-3, "gamma": 0.99, "tau": 0.005,
        "learning_starts": 100, "buffer_size": 200_000,
    },
}  # fmt: skip
"""SAC: one environment, an update of actor, both critics, temperature and targets after every step; relu networks."""

OFFLINE: dict[str, dict[str, Any]] = {
    "td3bc": {
        "environment": "HalfCheetah-v5", "batch_size": 256, "learning_rate": 3e-4, "gamma": 0.99, "tau": 0.005, "alpha": 2.5,
        "smoothing": 0.2, "clip": 0.5, "delay": 2,
    },
    "iql": {
        "environment": "HalfCheetah-v5", "batch_size": 256, "learning_rate": 3e-4, "gamma": 0.99, "tau": 0.005,
        "expectile": 0.7, "beta": 3.0, "cap": 100.0,
    },
}  # fmt: skip
"""Offline: relu networks, 100 000 recorded transitions (`data.py`), a new batch from them for every update."""
