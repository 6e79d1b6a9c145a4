"""Decision processes: every exact number a second way, and samples that agree with it."""

import itertools

import numpy as np
import pytest
import torch

from unipo.tabular import KL, Counts, EpisodicMDP, FiniteMDP, Free, deep_sea, random_episodic_mdp, random_mdp


def some_policy(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng((seed, 7)).dirichlet(np.ones(shape[-1]), shape[:-1]))


def paths(mdp, policy):
    """Every episode of an episodic process: (probability, [(h, s, a)])."""
    names = [range(mdp.states), range(mdp.actions)] * mdp.horizon
    for path in itertools.product(*names):
        states, actions = path[::2], path[1::2]
        p = mdp.initial[states[0]]
        for h in range(mdp.horizon):
            p = p * policy[h, states[h], actions[h]]
            if h + 1 < mdp.horizon:
                p = p * mdp.transition[h, states[h], actions[h], states[h + 1]]
        yield float(p), list(zip(range(mdp.horizon), states, actions, strict=True))


def test_two_states_by_hand():
    """State 0 pays 1 and moves on with probability 1/2; state 1 pays nothing for ever: V(0) = 1 / (1 - 0.9 / 2)."""
    mdp = FiniteMDP(transition=torch.tensor([[[0.5, 0.5]], [[0.0, 1.0]]]), reward=torch.tensor([[1.0], [0.0]]),
                    initial=torch.tensor([1.0, 0.0]), discount=0.9)  # fmt: skip
    only = torch.ones(2, 1, dtype=torch.float64)
    assert mdp.evaluate(only).v.tolist() == pytest.approx([1 / 0.55, 0.0])
    assert float(mdp.expected_return(only)) == pytest.approx(1 / 0.55)
    assert mdp.occupancy(only)[:, 0].tolist() == pytest.approx([0.1 / 0.55, 0.45 / 0.55])


def test_discounted_value_is_the_sum_over_time():
    mdp, policy = random_mdp(4, 3, 0), some_policy(4, 3)
    moves = torch.einsum("sa,sat->st", policy, mdp.transition)
    paid, v, weight = (policy * mdp.reward).sum(1), torch.zeros(4, dtype=torch.float64), torch.eye(4).double()
    for t in range(400):
        v, weight = v + 0.9**t * weight @ paid, weight @ moves
    torch.testing.assert_close(mdp.evaluate(policy).v, v)
    torch.testing.assert_close((mdp.occupancy(policy) * mdp.reward).sum() / 0.1, mdp.expected_return(policy))
    assert float(mdp.occupancy(policy).sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", [Free(), KL(torch.ones(3, 2).double(), 0.3)])
def test_no_policy_beats_the_optimum(kind):
    """Free: all deterministic policies. KL: its fixed point, random policies, and a gradient of zero on the logits."""
    mdp = random_mdp(3, 2, 1)
    best = mdp.optimal(kind)
    rivals = [torch.nn.functional.one_hot(torch.tensor(a), 2).double() for a in itertools.product(range(2), repeat=3)]
    rivals += [some_policy(3, 2, seed=s) for s in range(50)]
    values = torch.stack([mdp.evaluate(r, kind).v for r in rivals])
    assert bool((values <= best.v + 1e-10).all())
    torch.testing.assert_close((best.policy * best.q).sum(1) - kind.cost(best.policy), best.v)
    if isinstance(kind, Free):
        torch.testing.assert_close(values.amax(0), best.v)
    else:
        logits = best.policy.log().requires_grad_()
        mdp.expected_return(logits.softmax(1), kind).backward()
        assert float(logits.grad.abs().max()) < 1e-10


def test_kl_choice_by_hand():
    """Reference (3/4, 1/4), Q (0, log 3 * temperature): equal odds; the cost is temperature * KL."""
    kl = KL(torch.tensor([[0.75, 0.25]]).double(), 0.5)
    chosen = kl.choose(torch.tensor([[0.0, 0.5 * np.log(3.0)]]).double())
    assert chosen[0].tolist() == pytest.approx([0.5, 0.5])
    assert float(kl.cost(chosen)) == pytest.approx(0.5 * (0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)))


def test_episodic_values_are_sums_over_all_episodes():
    mdp, policy = random_episodic_mdp(2, 2, 3, 0), some_policy(3, 2, 2)
    kl = KL(some_policy(3, 2, 2, seed=1), 0.4)
    occupancy, total, regularised = torch.zeros_like(mdp.reward), 0.0, 0.0
    for p, steps in paths(mdp, policy):
        total += p * sum(float(mdp.reward[i]) for i in steps)
        regularised += p * sum(float(mdp.reward[i] - 0.4 * (policy[i] / kl.reference[i]).log()) for i in steps)
        for i in steps:
            occupancy[i] += p
    assert float(mdp.expected_return(policy)) == pytest.approx(total)
    assert float(mdp.expected_return(policy, kl)) == pytest.approx(regularised)
    torch.testing.assert_close(mdp.occupancy(policy), occupancy)


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_no_episodic_policy_beats_the_optimum(temperature):
    mdp = random_episodic_mdp(2, 2, 2, 3)
    kind = Free() if temperature is None else KL(some_policy(2, 2, 2, seed=1), temperature)
    best = mdp.optimal(kind)
    rivals = [torch.nn.functional.one_hot(torch.tensor(a), 2).double().reshape(2, 2, 2)
              for a in itertools.product(range(2), repeat=4)]  # fmt: skip
    rivals += [some_policy(2, 2, 2, seed=s) for s in range(50)]
    values = [float(mdp.expected_return(r, kind)) for r in rivals]
    assert max(values) <= float(mdp.initial @ best.v[0]) + 1e-12
    assert temperature is not None or max(values) == pytest.approx(float(mdp.initial @ best.v[0]))


def test_samples_agree_with_the_occupancy():
    mdp, policy = random_episodic_mdp(3, 2, 4, 0), some_policy(4, 3, 2)
    data = mdp.sample(policy, 40_000, np.random.default_rng(0))
    assert data.state.shape == (40_000, 4)
    counts = Counts.none(mdp).add(data)
    assert float((counts.visits / 40_000 - mdp.occupancy(policy)).abs().max()) < 0.01
    assert float(data.reward.sum(1).mean()) == pytest.approx(float(mdp.expected_return(policy)), abs=0.01)
    assert torch.equal(data.state[:, 1:], data.next_state[:, :-1])
    learned = counts.model(mdp.initial)
    torch.testing.assert_close(learned.reward, mdp.reward)
    error = (mdp.transition * (1 - mdp.transition) / counts.visits[..., None]).sqrt()
    assert float(((learned.transition - mdp.transition).abs() / error).max()) < 4


def test_what_has_no_chance_is_never_drawn():
    """Not even when the generator says exactly 0."""

    class Zeros:
        def random(self, n):
            return np.zeros(n)

    mdp = random_episodic_mdp(2, 2, 3, 0)
    policy = torch.tensor([0.0, 1.0]).double().expand(3, 2, 2)
    assert mdp.sample(policy, 5, Zeros()).action.unique().tolist() == [1]


def test_counts_by_hand():
    """One episode 0 -a1-> 1 -a0-> 0 twice over; what was never tried pays 0 and leads anywhere alike."""
    mdp = random_episodic_mdp(2, 2, 2, 0)
    data = mdp.sample(some_policy(2, 2, 2), 1, np.random.default_rng(0))
    one = type(data)(state=torch.tensor([[0, 1]]), action=torch.tensor([[1, 0]]), next_state=torch.tensor([[1, 0]]),
                     reward=torch.tensor([[2.0, 3.0]]).double())  # fmt: skip
    counts = Counts.none(mdp).add(one).add(one)
    assert counts.moves[0, 0, 1].tolist() == [0, 2]
    assert counts.moves[1, 1, 0].tolist() == [2, 0]
    assert float(counts.visits.sum()) == 4
    model = counts.model(mdp.initial)
    assert float(model.reward[0, 0, 1]) == 2
    assert float(model.reward[1, 1, 0]) == 3
    assert model.transition[0, 0, 1].tolist() == [0, 1]
    assert model.transition[0, 0, 0].tolist() == [0.5, 0.5]
    assert float(model.reward.sum()) == 5


@pytest.mark.parametrize("size", [3, 6])
def test_deep_sea_pays_one_less_the_cost(size):
    mdp = deep_sea(size, seed=2)
    best = mdp.optimal()
    assert float(mdp.initial @ best.v[0]) == pytest.approx(0.99)
    uniform = torch.full_like(mdp.reward, 0.5)
    right_moves = size * 0.5 * 0.01 / size
    assert float(mdp.expected_return(uniform)) == pytest.approx(0.5**size - right_moves)


def test_bad_processes_are_refused():
    good = random_mdp(2, 2, 0)
    with pytest.raises(ValueError, match="sum to 1"):
        FiniteMDP(transition=good.transition * 2, reward=good.reward, initial=good.initial, discount=0.5)
    with pytest.raises(ValueError, match="EpisodicMDP"):
        FiniteMDP(transition=good.transition, reward=good.reward, initial=good.initial, discount=1.0)
    with pytest.raises(ValueError, match=r"found \(2, 2, 2\)"):
        EpisodicMDP(transition=good.transition, reward=good.reward[None], initial=good.initial)
    with pytest.raises(ValueError, match="temperature > 0"):
        KL(torch.ones(2, 2), 0.0)
    with pytest.raises(ValueError, match="add-one smoothing"):
        KL(torch.eye(2), 1.0)
