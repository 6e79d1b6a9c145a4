"""A policy with memory: acting step by step and scoring fragments are the same computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unipo.episodes import Column, Episodes, offsets_of
from unipo.policies.control import ControlPolicy, load_control_policy
from unipo.policies.distributions import Categorical, Gaussian
from unipo.policies.networks import Normaliser
from unipo.policies.recurrent import RecurrentPolicy, load_recurrent_policy, over_fragments


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def episodes_of(lengths: list[int], observation: Tensor, action: Tensor, **episode: Tensor) -> Episodes:
    one = torch.arange(len(lengths) + 1)
    columns = {"observation": Column(observation, "step"), "action": Column(action, "step")}
    columns |= {name: Column(values, "episode") for name, values in episode.items()}
    return Episodes({"turn": offsets_of(torch.tensor(lengths)), "episode": one, "group": one}, columns)


def test_fragments_are_unrolled_one_by_one() -> None:
    gru, lengths = nn.GRU(3, 4), torch.tensor([2, 5, 0, 1, 5])
    x, start = torch.randn(13, 3), torch.randn(5, 4)
    expected = [gru(part[:, None], h[None, None])[0][:, 0] for part, h in
                zip(x.split(lengths.tolist()), start, strict=True) if len(part)]  # fmt: skip
    assert torch.allclose(over_fragments(gru, x, lengths, start), torch.cat(expected), atol=1e-6)


def test_the_stored_log_probs_are_those_of_the_fragments() -> None:
    """Two environments, four steps; the second fragment of each starts from the memory that was stored."""
    policy = RecurrentPolicy(3, Gaussian(2), (8,), normaliser=Normaliser(3))
    memory, rows = policy.start(2), []
    for t in range(4):
        observation = torch.randn(2, 3)
        action, logp, after = policy.act(observation, torch.randn(2, 2), memory)
        rows.append((observation, action, logp, memory))
        memory = after if t != 1 else torch.stack([after[0], torch.zeros(8)])  # the second episode ended here
    observation, action, logp = (torch.stack([row[i] for row in rows], 1).flatten(0, 1) for i in range(3))
    first, third = rows[0][3], rows[2][3]
    starts = torch.stack([first[0], third[0], first[1], third[1]])
    episodes = episodes_of([2, 2, 2, 2], observation, action, memory=starts)
    assert torch.allclose(policy.signals(episodes, ["logp"])["logp"], logp, atol=1e-5)
    whole = episodes_of([4, 2, 2], observation, action)  # one fragment remembers by itself
    assert torch.allclose(policy.signals(whole, ["logp"])["logp"], logp, atol=1e-5)
    forgotten = episodes.without("memory")
    assert not torch.allclose(policy.signals(forgotten, ["logp"])["logp"][2:4], logp[2:4], atol=1e-5)


def test_gradients_flow_through_time_within_a_fragment_only() -> None:
    policy = RecurrentPolicy(3, Categorical(2), (8,))
    observation = torch.randn(5, 3, requires_grad=True)
    found = policy.signals(episodes_of([3, 2], observation, torch.zeros(5, dtype=torch.long)), ["logp"])["logp"]
    (grad,) = torch.autograd.grad(found[2], observation)
    assert (grad.abs().sum(1) > 0).tolist() == [True, True, True, False, False]


def test_memory_solves_what_the_last_observation_cannot() -> None:
    """The action to take at the third step was shown at the first."""
    policy = RecurrentPolicy(1, Categorical(2), (16,))
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    cue = torch.tensor([0, 1] * 8)
    observation = torch.zeros(48, 1)
    observation[::3, 0] = 2.0 * cue - 1
    episodes = episodes_of([3] * 16, observation, cue.repeat_interleave(3))
    for _ in range(150):
        loss = -policy.signals(episodes, ["logp"])["logp"][2::3].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05


def test_saving(tmp_path: Path) -> None:
    normaliser = Normaliser(3)
    normaliser.update(torch.randn(9, 3) * 3)
    policy = RecurrentPolicy(3, Gaussian(2), (8, 6), log_std_init=-1, normaliser=normaliser)
    policy.save(tmp_path)
    loaded = load_recurrent_policy(tmp_path)
    given = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 6)
    assert all(torch.equal(a, b) for a, b in zip(policy.act(*given), loaded.act(*given), strict=True))
    with pytest.raises(ValueError, match="holds no control policy"):
        load_control_policy(tmp_path)
    ControlPolicy(3, Gaussian(2)).save(tmp_path / "plain")
    with pytest.raises(ValueError, match="holds no recurrent policy"):
        load_recurrent_policy(tmp_path / "plain")
