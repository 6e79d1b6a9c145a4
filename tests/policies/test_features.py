"""Hidden states of inner layers, read after each action: equal to the model's own, one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.policies.models import configurations, saved
from unipo.episodes import Episodes
from unipo.policies import load_policy

ARCHITECTURES = tuple(configurations(300))


def batch() -> Episodes:
    prompt = [20, 21, 22, 23, 24, 25, 26]
    return Episodes.build([[5, 6, 1], [7], [], [8, 9, 10, 11, 1], [4, 1]], [prompt, prompt, [3], [26], prompt])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_are_the_models_own(name: str, tmp_path: Path) -> None:
    policy, episodes, layers = load_policy(str(saved(name, tmp_path))), batch(), (0.5, 1.0)
    found = policy.features(episodes, layers)
    expected = []
    for i in range(len(episodes)):
        one = episodes.select(torch.tensor([i]))
        context, actions = one.context().values, one["token"]
        if len(actions):
            out = policy.model(torch.cat([context, actions])[None], output_hidden_states=True).hidden_states
            depth = len(out) - 1
            states = torch.stack([out[max(1, round(share * depth))][0, len(context) :] for share in layers], 1)
            expected.append(states)
    assert found.shape == (episodes.count("step"), 2, policy.width)
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)


def test_features_are_differentiable(tmp_path: Path) -> None:
    policy = load_policy(str(saved("qwen3", tmp_path)))
    policy.features(batch(), (1.0,)).square().sum().backward()
    grad = policy.model.get_input_embeddings().weight.grad
    assert grad is not None
    assert bool(grad[[5, 20]].any())
    assert policy.features(batch().select(torch.tensor([2])), (0.5, 1.0)).shape == (0, 2, policy.width)
