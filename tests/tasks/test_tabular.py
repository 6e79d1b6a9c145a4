"""The tabular task: two independent ways to every exact number."""

import itertools
import math

import pytest
import torch

from unipo.episodes import Episodes
from unipo.policies.tabular import TabularPolicy
from unipo.tasks.tabular import TabularTask


def parity(prompt, tokens):
    return float(sum(tokens) % 2 == prompt)


def made(end=None, prompts=2, vocabulary=3, length=3):
    task = TabularTask(prompts, vocabulary, length, parity, end)
    return task, TabularPolicy.random(prompts, length, vocabulary, seed=1)


@pytest.mark.parametrize(("end", "count"), [(None, 27), (0, 1 + 2 + 4 * 3)])
def test_enumeration_is_complete(end, count):
    task, policy = made(end)
    assert len(task.sequences) == len(set(task.sequences)) == count
    torch.testing.assert_close(task.log_probability(policy).exp().sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("end", [None, 0])
def test_signals_agree_with_the_enumeration(end):
    task, policy = made(end)
    episodes = task.episodes()
    logp = episodes.reduce(policy.signals(episodes, ["logp"])["logp"])
    torch.testing.assert_close(logp, task.log_probability(policy).flatten())
    assert episodes["reward"].tolist() == [parity(p, s) for p in range(2) for s in task.sequences]


def test_log_probability_by_hand():
    """Two tokens, two steps: 0 then 1 under logits chosen so that the probabilities are 0.75 and 0.9."""
    logits = torch.zeros(1, 2, 3, 2, dtype=torch.float64)
    logits[0, 0, 2] = torch.tensor([math.log(3.0), 0.0])
    logits[0, 1, 0] = torch.tensor([0.0, math.log(9.0)])
    value = torch.arange(6, dtype=torch.float64).reshape(1, 2, 3)
    policy = TabularPolicy(logits, value)
    episodes = Episodes.build([[0, 1]], [[0]])
    found = policy.signals(episodes, ["logp", "entropy", "value"])
    torch.testing.assert_close(found["logp"].exp(), torch.tensor([0.75, 0.9], dtype=torch.float64))
    by_hand = [-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))]
    torch.testing.assert_close(found["entropy"], torch.tensor(by_hand, dtype=torch.float64))
    assert found["value"].tolist() == [2.0, 3.0]
    task = TabularTask(1, 2, 2, lambda prompt, tokens: float(tokens == (0, 1)))
    assert task.success(policy).item() == pytest.approx(0.675)


def test_success_is_the_sum_over_sequences_written_out():
    task, policy = made()
    probabilities = policy.logits.softmax(-1)
    for prompt in range(2):
        total = 0.0
        for a, b, c in itertools.product(range(3), repeat=3):
            chance = probabilities[prompt, 0, 3, a] * probabilities[prompt, 1, a, b] * probabilities[prompt, 2, b, c]
            total += chance.item() * parity(prompt, (a, b, c))
        assert task.success(policy)[prompt].item() == pytest.approx(total, abs=1e-14)


@pytest.mark.parametrize("end", [None, 0])
def test_the_gradient_is_that_of_finite_differences_and_of_the_score_function(end):
    task, policy = made(end)
    exact = task.gradient(policy)
    h, where = 1e-5, (1, 1, 1, 2)
    with torch.no_grad():
        policy.logits[where] += h
        up = task.success(policy).mean()
        policy.logits[where] -= 2 * h
        down = task.success(policy).mean()
        policy.logits[where] += h
    assert float(exact[where]) == pytest.approx((up - down).item() / (2 * h), abs=1e-9)
    episodes = task.episodes()
    logp = episodes.reduce(policy.signals(episodes, ["logp"])["logp"])
    score = (logp.detach().exp() * episodes["reward"] * logp).sum() / 2
    torch.testing.assert_close(torch.autograd.grad(score, policy.logits)[0], exact)


@pytest.mark.parametrize("end", [None, 0])
def test_samples_come_from_the_exact_distribution(end):
    task, policy = made(end)
    n = 20_000
    drawn = task.sample(policy, n, seed=0)
    assert drawn.count("group") == 2
    assert drawn.lengths("group", "episode").tolist() == [n, n]
    rate, exact = drawn.reduce("reward", "group", "mean"), task.success(policy).detach()
    error = (exact * (1 - exact) / n).sqrt()
    assert bool(((rate - exact).abs() < 4 * error).all())
    torch.testing.assert_close(drawn["behavior_logp"], policy.signals(drawn, ["logp"])["logp"].detach())
    assert task.sample(policy, 5, 3)["token"].tolist() == task.sample(policy, 5, 3)["token"].tolist()


def test_signals_do_not_depend_on_the_other_episodes():
    task, policy = made(0)
    episodes = task.sample(policy, 6, 0)
    whole = policy.signals(episodes, ["logp", "entropy", "value"])
    for i in range(len(episodes)):
        alone = policy.signals(episodes.select(torch.tensor([i])), ["logp", "entropy", "value"])
        steps = episodes.step_index(torch.tensor([i]))
        for name, values in alone.items():
            assert torch.equal(values, whole[name][steps])
    assert policy.total_lengths(episodes).tolist() == (episodes.lengths() + 1).tolist()


def test_what_does_not_fit_is_named():
    task, policy = made()
    with pytest.raises(ValueError, match="cannot be enumerated"):
        TabularTask(1, 9, 6, parity)
    with pytest.raises(ValueError, match=r"expected \[prompts, length"):
        TabularPolicy(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="one per state"):
        TabularPolicy(torch.zeros(2, 3, 4, 3), torch.zeros(2, 3))
    with pytest.raises(KeyError, match="emits collision, entropy, logp, value"):
        policy.signals(task.episodes(), ["q"])
    with pytest.raises(IndexError, match="knows 3 steps and 3 tokens"):
        policy.signals(Episodes.build([[0, 0, 0, 0]], [[0]]), ["logp"])
    with pytest.raises(ValueError, match="its prompt id"):
        policy.signals(Episodes.build([[0]], [[]]), ["logp"])
    with pytest.raises(IndexError, match="4 steps"):
        policy.signals(Episodes.build([[0, 1]], [[0, 1, 1]]), ["logp"])


def test_an_answer_goes_on_behind_what_is_written():
    """log pi(y_1 y_2 y_3) is the same in one piece and in two, the first of which is context of the second."""
    _, policy = made()
    whole = policy.signals(Episodes.build([[2, 0, 1]], [[1]]), ["logp", "value"])
    rest = policy.signals(Episodes.build([[0, 1], [1]], [[1, 2], [1, 2, 0]]), ["logp", "value"])
    for name in ("logp", "value"):
        assert torch.equal(whole[name][[1, 2, 2]], rest[name])
