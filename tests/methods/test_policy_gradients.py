"""Identity tests of the classics: each number comes from a second derivation, not from our own code."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.toys import ToyPolicy, gradient, rollouts_of, toy_batch
from unipo.episodes import Episodes
from unipo.learner import coefficients
from unipo.methods.catalog import find
from unipo.objectives import (
    ClipMask,
    DualClipMask,
    GroupStd,
    Normalised,
    PolicyGradient,
    Product,
    TokenMean,
    TokenRatio,
)
from unipo.policies.tabular import TabularPolicy
from unipo.sources.controllers import RunningMean
from unipo.sources.text.filters import MixedOutcomes, SoftOverlong
from unipo.tasks.tabular import TabularTask

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]]
LENGTHS = [[2, 3, 1, 4], [1, 2, 5, 2]]


def drifted(seed: int = 0, drift: float = 0.4) -> tuple[Episodes, Tensor]:
    return rollouts_of(REWARDS, LENGTHS, seed, drift)


def z_scores(episodes: Episodes) -> Tensor:
    """GRPO's advantage per step, by torch's own mean and std."""
    r = episodes["reward"].reshape(2, 4)
    z = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)
    return z.flatten()[episodes.index("episode")]


def episode_mean(x: Tensor, episodes: Episodes) -> Tensor:
    return torch.stack([x[episodes.index("episode") == i].mean() for i in range(len(episodes))]).mean()


AGGREGATES = {
    "grpo": episode_mean,
    "dapo-bytedance": lambda x, e: x.mean(),
    "dr-grpo": lambda x, e: x.sum() / 1024 / len(e),
}


@pytest.mark.parametrize("slug", list(AGGREGATES))
def test_log_form_has_the_gradient_of_the_ratio_form(slug: str) -> None:
    """The log form with detached weight and mask against autograd of -min(r A, clip(r) A)."""
    episodes, logp = drifted()
    high = 0.28 if slug == "dapo-bytedance" else 0.2
    r = episodes["reward"].reshape(2, 4)
    centred = (r - r.mean(1, keepdim=True)).flatten()[episodes.index("episode")]
    advantage = centred if slug == "dr-grpo" else z_scores(episodes)
    x = logp.clone().requires_grad_()
    ratio = (x - episodes["behavior_logp"]).exp()
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1 + high) * advantage)
    (expected,) = torch.autograd.grad(AGGREGATES[slug](surrogate, episodes), x)
    found = gradient(find(slug).build().objective, episodes, logp)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert (expected == 0).any(), "the batch must have clipped steps, or the test shows nothing"
    assert (expected != 0).any()


def test_on_policy_all_are_reinforce_up_to_constants() -> None:
    """r = 1: PPO, GRPO without std, REINFORCE with the group mean and Dr. GRPO differ by aggregation constants only."""
    episodes, logp = drifted(drift=0.0)
    e, lengths = len(episodes), episodes.expand(episodes.lengths())
    base = gradient(PolicyGradient(advantage=Normalised()), episodes, logp) * e * lengths
    r = episodes["reward"].reshape(2, 4)
    centred = (r - r.mean(1, keepdim=True)).flatten()[episodes.index("episode")]
    torch.testing.assert_close(base, -centred)
    dr = gradient(find("dr-grpo").build(budget=50).objective, episodes, logp) * e * 50
    torch.testing.assert_close(dr, -centred)
    grpo = gradient(find("grpo").build().objective, episodes, logp) * e * lengths
    torch.testing.assert_close(grpo, -z_scores(episodes))
    clipped = PolicyGradient(
        advantage=Normalised(), weight=TokenRatio(), mask=find("ppo").build().objective.terms()[0][1].mask
    )  # type: ignore[attr-defined]
    torch.testing.assert_close(gradient(clipped, episodes, logp) * e * lengths, -centred)


def test_sft_is_cross_entropy() -> None:
    episodes = toy_batch()
    policy = ToyPolicy()
    objective = find("sft").build().objective
    demos = episodes.expand(episodes.category("kind", "demo"))
    logp = policy.signals(episodes, ["logp"])["logp"]
    torch.testing.assert_close(objective(episodes, {"logp": logp}), -logp[demos].mean())


def test_rloo_is_scaled_group_centring() -> None:
    """R_i - mean of the others = G / (G - 1) (R_i - mean), summed over tokens, mean over episodes."""
    episodes, logp = drifted()
    r = episodes["reward"].reshape(2, 4)
    others = (r.sum(1, keepdim=True) - r) / 3
    expected = -(r - others).flatten()[episodes.index("episode")] / len(episodes)
    torch.testing.assert_close(gradient(find("rloo").build().objective, episodes, logp), expected)
    torch.testing.assert_close(r - others, 4 / 3 * (r - r.mean(1, keepdim=True)))


def bandit_expectation(slug: str, theta: Tensor, reward: Tensor, group: int) -> Tensor:
    """E over all groups of actions of the method's gradient on a softmax bandit, by enumeration."""
    p = torch.softmax(theta, 0)
    total = torch.zeros_like(theta)
    objective = find(slug).build().objective
    for actions in itertools.product(range(len(theta)), repeat=group):
        a = torch.tensor(actions)
        episodes = Episodes.build([[i] for i in actions], [[0]] * group, [0] * group, kind=["rollout"] * group)
        episodes = episodes.with_columns("episode", reward=reward[a]).with_columns("step", behavior_logp=p.log()[a])
        x = theta.clone().requires_grad_()
        logp = torch.log_softmax(x, 0)[a]
        coefficient = gradient(objective, episodes, logp.detach())
        (g,) = torch.autograd.grad((coefficient * logp).sum(), x)
        total += p[a].prod() * g
    return total


def exact_policy_gradient(theta: Tensor, reward: Tensor) -> Tensor:
    p = torch.softmax(theta, 0)
    return p * (reward - (p * reward).sum())


THETA, REWARD = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64), torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)


def test_reinforce_expectation_is_the_policy_gradient() -> None:
    """By enumeration of all actions; the running baseline is a constant and leaves the expectation alone."""
    expected = exact_policy_gradient(THETA, REWARD)
    torch.testing.assert_close(bandit_expectation("reinforce", THETA, REWARD, 1), -expected, rtol=1e-12, atol=1e-14)


def test_rloo_expectation_is_the_policy_gradient() -> None:
    expected = exact_policy_gradient(THETA, REWARD)
    torch.testing.assert_close(bandit_expectation("rloo", THETA, REWARD, 3), -expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("slug", "group"), [("reinforce", 1), ("rloo", 2)])
@pytest.mark.parametrize("end", [None, 0])
def test_sequences_have_the_exact_policy_gradient_in_expectation(slug: str, group: int, end: int | None) -> None:
    """A tabular language model, sequences of up to two tokens: every group of sampled sequences, weighted by its chance."""
    task = TabularTask(
        1, 3, 2, lambda prompt, tokens: float(tokens[0] == 1) + 0.3 * len(tokens) + 0.5 * tokens[-1], end
    )
    policy = TabularPolicy.random(1, 2, 3, seed=4)
    chance = task.log_probability(policy)[0].exp().detach()
    every, total = task.episodes(), torch.zeros_like(policy.logits)
    objective = find(slug).build().objective
    for drawn in itertools.product(range(len(task.sequences)), repeat=group):
        episodes = every.select(torch.tensor(drawn)).with_columns("episode", kind="rollout")
        logp = policy.signals(episodes, ["logp"])["logp"]
        coefficient = gradient(objective, episodes, logp.detach())
        (g,) = torch.autograd.grad(logp, policy.logits, coefficient)
        total += chance[list(drawn)].prod() * g
    torch.testing.assert_close(total, -task.gradient(policy), rtol=1e-12, atol=1e-14)
    assert float(total.norm()) > 0.1


def test_group_mean_expectation_is_shrunk_by_g_minus_one_over_g() -> None:
    """Dr. GRPO's baseline contains the sample itself: its expectation is (G - 1) / G of the policy gradient."""
    found = bandit_expectation("dr-grpo", THETA, REWARD, 3) * 1024
    torch.testing.assert_close(found, -2 / 3 * exact_policy_gradient(THETA, REWARD), rtol=1e-12, atol=1e-14)


def test_gspo_gradient_is_that_of_its_objective() -> None:
    """Autograd of mean_i min(s_i A_i, clip(s_i) A_i), s_i = exp(mean of log r), with clip bounds that bite."""
    episodes, logp = drifted(drift=0.2)
    advantage = z_scores(episodes)
    first = torch.tensor([int((episodes.index("episode") == i).nonzero()[0]) for i in range(len(episodes))])
    x = logp.clone().requires_grad_()
    log_ratio = x - episodes["behavior_logp"]
    s = torch.stack([log_ratio[episodes.index("episode") == i].mean().exp() for i in range(len(episodes))])
    a = advantage[first]
    (expected,) = torch.autograd.grad(-torch.minimum(s * a, s.clamp(0.95, 1.05) * a).mean(), x)
    found = gradient(find("gspo").build(clip_low=0.05, clip_high=0.05).objective, episodes, logp)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert (expected == 0).any()
    assert (expected != 0).any()


def test_cispo_caps_the_weight_and_keeps_the_gradient() -> None:
    episodes, logp = drifted(drift=1.0)
    ratio = (logp - episodes["behavior_logp"]).exp()
    found = gradient(find("cispo").build(cap=1.5).objective, episodes, logp)
    torch.testing.assert_close(found, -ratio.clamp(max=1.5) * z_scores(episodes) / len(logp))
    assert (ratio > 1.5).any()
    assert (found != 0).all()


def test_dapo_counts_tokens() -> None:
    """Two answers of 1 and 3 tokens, advantages +-0.7071: each token weighs 1/4, whatever its episode's length."""
    episodes, logp = rollouts_of([[1.0, 0.0]], [[1, 3]])
    a = 0.5 / (0.5**0.5 + 1e-6)
    found = gradient(find("dapo-bytedance").build().objective, episodes, logp)
    torch.testing.assert_close(found, torch.tensor([-a, a, a, a], dtype=torch.float64) / 4)


def test_soft_overlong_punishment() -> None:
    """Limit 10, cache 0.4: free up to 6 tokens, -1/2 at 8, -1 at 10; a truncated one has -1."""
    episodes, _ = rollouts_of([[1.0, 1.0, 1.0, 0.0]], [[6, 8, 10, 3]])
    episodes = episodes.with_columns("episode", truncated=torch.tensor([False, False, False, True]))
    assert SoftOverlong(0.4)(episodes, 10)["reward"].tolist() == [1.0, 0.5, 0.0, -1.0]
    assert MixedOutcomes()(episodes).tolist() == [True]


def test_ppo_without_a_critic_is_reinforce() -> None:
    """lam = gamma = 1 and values 0: the advantage is the outcome at every step."""
    episodes, logp = drifted(drift=0.0)
    episodes = episodes.with_columns("step", old_value=torch.zeros_like(logp))
    recipe = find("ppo").build(gamma=1.0, lam=1.0, value=0.0).but(whiten=None)
    expected = -episodes.expand("reward") / len(logp)
    torch.testing.assert_close(gradient(recipe.objective, episodes, logp), expected)


@pytest.mark.parametrize("reward", [0.0, 0.3])
def test_whitened_advantages_that_are_all_equal_are_zero(reward: float) -> None:
    """A new critic that says 0 everywhere and answers of equal reward: nothing to learn, and no 0 / 0."""
    episodes, logp = rollouts_of([[reward] * 4], [[2, 3, 1, 4]])
    episodes = episodes.with_columns("step", old_value=torch.zeros_like(logp))
    found = gradient(find("ppo").build(gamma=1.0, lam=1.0, value=0.0).objective, episodes, logp)
    assert torch.equal(found, torch.zeros_like(logp))


def test_ppo_whitens_over_steps() -> None:
    """Advantages 1 (two steps) and 0 (two steps): mean 1/2, std 1/sqrt(3), so +-sqrt(3)/2; a mean over 4 tokens."""
    episodes, logp = rollouts_of([[1.0, 0.0]], [[2, 2]])
    episodes = episodes.with_columns("step", old_value=torch.zeros_like(logp))
    found = gradient(find("ppo").build(gamma=1.0, lam=1.0, value=0.0).objective, episodes, logp)
    a = 0.5 / (3**-0.5 + 1e-6)
    torch.testing.assert_close(found, torch.tensor([-a, -a, a, a], dtype=torch.float64) / 4)


def test_dual_clip_is_the_gradient_of_its_maximum() -> None:
    """max(min(r A, clip(r) A), c A) for A < 0 (arXiv 1912.09729) against the product of two masks."""
    episodes, logp = drifted(drift=1.0)
    advantage, limit = z_scores(episodes), 1.6
    x = logp.clone().requires_grad_()
    ratio = (x - episodes["behavior_logp"]).exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    dual = torch.where(advantage < 0, torch.maximum(clipped, limit * advantage), clipped)
    (expected,) = torch.autograd.grad(-dual.mean(), x)
    recipe = find("grpo").build().but(mask=Product((ClipMask(0.2, 0.2), DualClipMask(limit))), aggregate=TokenMean())
    torch.testing.assert_close(gradient(recipe.objective, episodes, logp), expected, rtol=1e-12, atol=1e-14)
    plain = gradient(recipe.but(mask=ClipMask(0.2, 0.2)).objective, episodes, logp)
    assert ((expected == 0) & (plain != 0)).any(), "the batch must have steps that only the dual clip stops"


def test_gae_by_hand() -> None:
    """One episode, rewards 0 0 1, values .5 .4 .2, gamma .9, lam .8: the recursion with numbers."""
    episodes = Episodes.build([[1, 1, 1]], [[0]], kind=["rollout"])
    episodes = episodes.with_columns("episode", reward=torch.tensor([1.0], dtype=torch.float64))
    episodes = episodes.with_columns("step", old_value=torch.tensor([0.5, 0.4, 0.2], dtype=torch.float64))
    from unipo.objectives import GeneralisedAdvantage

    a3 = 1 - 0.2
    a2 = 0.9 * 0.2 - 0.4 + 0.72 * a3
    a1 = 0.9 * 0.4 - 0.5 + 0.72 * a2
    assert GeneralisedAdvantage(0.9, 0.8)(episodes, {}).tolist() == pytest.approx([a1, a2, a3])
    cut = episodes.with_columns("episode", truncated=torch.tensor([True]))
    assert GeneralisedAdvantage(0.9, 0.8)(cut, {})[-1].item() == pytest.approx(a3 + 0.9 * 0.2), "truncation bootstraps"


def test_zero_variance_groups_have_no_advantage_even_without_eps() -> None:
    episodes, logp = rollouts_of([[0.3, 0.3, 0.3]], [[1, 2, 3]])
    objective = PolicyGradient(advantage=Normalised(scale=GroupStd(eps=0.0)))
    assert torch.equal(gradient(objective, episodes, logp), torch.zeros_like(logp))


def test_kl_and_entropy_terms_are_absent_at_zero() -> None:
    assert "reference_logp" not in find("grpo").build().needs.columns
    assert "reference_logp" in find("grpo").build(kl=0.04).needs.columns
    assert "entropy" in find("grpo").build(entropy=0.01).needs.signals
    assert "value" not in find("ppo").build(value=0.0).needs.signals


@pytest.mark.parametrize("slug", ["grpo", "dapo-bytedance"])
def test_the_kl_term_pulls_to_the_reference(slug: str) -> None:
    """k3 = ref / pi - 1 - log(ref / pi) has the slope 1 - ref / pi, aggregated as the method's policy gradient."""
    episodes, logp = drifted(drift=0.0)
    reference = logp + torch.linspace(-1, 1, len(logp), dtype=torch.float64)
    episodes = episodes.with_columns("step", reference_logp=reference)
    with_kl, without = (gradient(find(slug).build(kl=kl).objective, episodes, logp) for kl in (0.3, 0.0))
    tokens = episodes.expand(episodes.lengths()) * len(episodes) if slug == "grpo" else len(logp)
    torch.testing.assert_close(with_kl - without, 0.3 * (1 - (reference - logp).exp()) / tokens)


def test_the_entropy_term_is_a_reward() -> None:
    episodes, logp = drifted(drift=0.0)
    objective = find("grpo").build(entropy=0.3).objective
    found = coefficients(objective, episodes, {"logp": logp, "entropy": torch.ones_like(logp)}).total["entropy"]
    torch.testing.assert_close(found, -0.3 / (episodes.expand(episodes.lengths()).double() * len(episodes)))


def test_the_kl_of_rloo_is_in_the_reward() -> None:
    """R - kl * sum log(pi / ref): here the sums are 0.5 per token, so an answer of 4 tokens has 2 kl less."""
    episodes, logp = rollouts_of([[1.0, 1.0]], [[4, 2]])
    episodes = episodes.with_columns("step", reference_logp=logp - 0.5)
    found = gradient(find("rloo").build(kl=0.1).objective, episodes, logp)
    torch.testing.assert_close(found, -torch.tensor([-0.1] * 4 + [0.1] * 2, dtype=torch.float64) / 2)


def test_the_baseline_of_reinforce_is_subtracted_and_turned() -> None:
    episodes, logp = drifted(drift=0.0)
    recipe = find("reinforce").build(decay=0.8)
    found = gradient(recipe.objective, episodes, logp, {"baseline": 0.3})
    torch.testing.assert_close(found, -(episodes.expand("reward") - 0.3) / len(episodes))
    assert recipe.controllers == (RunningMean(knob="baseline", metric="reward", decay=0.8),)


def test_the_critic_of_ppo_regresses_to_the_return() -> None:
    """lam = gamma = 1: the target is the reward 1. Values 0.1, 0.5 from 0.1, 0: the second has left the clip range."""
    episodes, logp = rollouts_of([[1.0]], [[2]])
    value = torch.tensor([0.1, 0.5], dtype=torch.float64)
    episodes = episodes.with_columns("step", old_value=torch.tensor([0.1, 0.0], dtype=torch.float64))

    def found(clip: float) -> list[float]:
        objective = find("ppo").build(lam=1.0, value=0.5, value_clip=clip).objective
        return coefficients(objective, episodes, {"logp": logp, "value": value}).total["value"].tolist()

    assert found(0.2) == pytest.approx([0.5 * (0.1 - 1) / 2, 0.0])
    assert found(0.0) == pytest.approx([0.5 * (0.1 - 1) / 2, 0.5 * (0.5 - 1) / 2])


def test_dapo_samples_anew_and_punishes_length() -> None:
    spec = find("dapo-bytedance").build(refill=3, overlong=0.25).rollouts
    assert (spec.group, spec.keep, spec.refill, spec.relabel) == (16, MixedOutcomes(), 3, (SoftOverlong(0.25),))
    assert find("dapo-bytedance").build(overlong=0.0).rollouts.relabel == ()
