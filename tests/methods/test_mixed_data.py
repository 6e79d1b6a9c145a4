"""Identity tests of chord and hpt."""

from __future__ import annotations

import math

import torch

from tests.toys import ToyPolicy, gradient, toy_batch
from unipo.methods.catalog import find
from unipo.objectives import Budget, Likelihood, Normalised, PolicyGradient, Probability, TokenMean, TokenRatio


def batch() -> tuple[object, torch.Tensor]:
    episodes = toy_batch()
    return episodes, ToyPolicy().signals(episodes, ["logp"])["logp"].detach()


def test_chord_at_mu_zero_is_grpo() -> None:
    episodes, logp = batch()
    grpo = find("grpo").build().but(aggregate=TokenMean())
    found = gradient(find("chord").build().objective, episodes, logp, {"mu": 0.0})
    assert torch.equal(found, gradient(grpo.objective, episodes, logp))
    assert not found[episodes.expand(episodes.category("kind", "demo"))].any()


def test_chord_at_mu_one_without_phi_is_sft() -> None:
    episodes, logp = batch()
    found = gradient(find("chord-mu").build().objective, episodes, logp, {"mu": 1.0})
    assert torch.equal(found, gradient(find("sft").build().objective, episodes, logp))


def test_phi_gradient_on_the_logits() -> None:
    """-phi(p) (onehot - pi), whose size on the target is p (1 - p)^2: largest at p = 1/3, zero at the ends."""
    sizes = []
    grid = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for p in grid:
        logits = torch.tensor([math.log(p / (1 - p)), 0.0], dtype=torch.float64, requires_grad=True)
        logp = torch.log_softmax(logits, 0)[:1]
        weight = (logp.exp() * (1 - logp.exp())).detach()
        (g,) = torch.autograd.grad(-(weight * logp).sum(), logits)
        torch.testing.assert_close(-g[0], p * (1 - p) ** 2)
        sizes.append(-g[0])
    assert abs(float(grid[int(torch.stack(sizes).argmax())]) - 1 / 3) < 0.011
    episodes, logp = batch()
    demos = episodes.expand(episodes.category("kind", "demo"))
    p = logp[demos].exp()
    found = gradient(find("chord").build().objective, episodes, logp, {"mu": 1.0})[demos]
    torch.testing.assert_close(found, -p * (1 - p) / demos.sum())


def test_probability_weight_is_the_gradient_of_the_probability() -> None:
    """-sg(p) grad log p = -grad p: the exact policy gradient of the reward "the token is right"."""
    episodes, logp = batch()
    demos = episodes.expand(episodes.category("kind", "demo"))
    x = logp.clone().requires_grad_()
    (expected,) = torch.autograd.grad(-x[demos].exp().mean(), x)
    torch.testing.assert_close(gradient(Likelihood(weight=Probability()), episodes, logp), expected)


def test_mu_schedule() -> None:
    """Warm-up 0 -> peak, cosine to valley: by hand at its corners and its middle."""
    (schedule,) = find("chord-mu").build(peak=0.8, valley=0.2, warmup=10, decay=100).controllers
    found = [schedule.setting({}, step) for step in (0, 5, 10, 60, 110, 500)]
    assert found == [0.0, 0.4, 0.8, 0.5, 0.2, 0.2]
    assert find("chord").build().controllers[0].setting({}, 77) == 0.1


def test_each_loss_is_averaged_over_its_own_tokens() -> None:
    """Twice the demonstrations, each twice: the same gradient per distinct row, so the mix does not depend on the sizes."""
    episodes, logp = batch()
    demos = episodes.expand(episodes.category("kind", "demo"))
    found = gradient(find("chord-mu").build().objective, episodes, logp, {"mu": 0.3})
    torch.testing.assert_close(found[demos], torch.full_like(found[demos], -0.3 / int(demos.sum())))


def hpt_parts(episodes: object, logp: torch.Tensor, threshold: float) -> torch.Tensor:
    return gradient(find("upge-hpt").build(threshold=threshold, budget=8).objective, episodes, logp)


def test_hpt_below_zero_is_dr_grpo_without_clip() -> None:
    """No prompt is ever below a negative threshold: only reinforcement is left."""
    episodes, logp = batch()
    rl = PolicyGradient(advantage=Normalised(), weight=TokenRatio(), aggregate=Budget(8))
    torch.testing.assert_close(hpt_parts(episodes, logp, -0.5), gradient(rl, episodes, logp))


def test_hpt_at_one_is_sft() -> None:
    episodes, logp = batch()
    paired = episodes.category("kind", "demo")
    torch.testing.assert_close(hpt_parts(episodes, logp, 1.0), gradient(Likelihood(), episodes, logp))
    assert paired.any()


def test_hpt_switches_per_prompt() -> None:
    """A prompt that is never solved: its rollouts get nothing and its demonstration is learned; a solved one: the reverse."""
    episodes = toy_batch(rewards=[0.0] * 4)
    reward = episodes["reward"].clone()
    reward[0] = 1.0
    episodes = episodes.with_columns("episode", reward=reward)
    logp = ToyPolicy().signals(episodes, ["logp"])["logp"].detach()
    found = hpt_parts(episodes, logp, 0.0)
    solved = episodes.index("group") == 0
    rollout, demo = (episodes.expand(episodes.category("kind", k)) for k in ("rollout", "demo"))
    assert found[solved & rollout].abs().min() > 0
    assert not found[solved & demo].any()
    assert not found[~solved & rollout].any()
    used = ~solved & demo
    torch.testing.assert_close(found[used], torch.full_like(found[used], -1 / int(used.sum())))


def test_dropped_episodes_stay_in_the_denominator() -> None:
    """L_RL is divided by all sampled episodes: dropping prompts scales nothing else."""
    episodes = toy_batch()
    logp = ToyPolicy().signals(episodes, ["logp"])["logp"].detach()
    kept = hpt_parts(episodes, logp, -0.5)
    gated = hpt_parts(episodes, logp, 0.3)
    live = gated != 0
    rollout = episodes.expand(episodes.category("kind", "rollout"))
    assert torch.equal(gated[live & rollout], kept[live & rollout])


def test_advantages_sum_to_zero_in_a_group() -> None:
    episodes, logp = batch()
    acted = episodes.select(episodes.category("kind", "rollout"))
    r = acted["reward"]
    centred = r - acted.expand(acted.reduce("reward", to="group", how="mean"), to="episode", level="group")
    per_step = Normalised()(acted, {"logp": logp})
    torch.testing.assert_close(per_step, acted.expand(centred))
    torch.testing.assert_close(acted.reduce(centred, to="group", level="episode"), torch.zeros(4, dtype=torch.float64))


def test_a_likelihood_is_the_estimator_with_advantage_one() -> None:
    """UPGE: grad pi / pi_ref with pi_ref = pi and A = 1 is grad log pi."""
    episodes, logp = batch()
    from unipo.objectives import Advantage, demonstrations

    estimator = PolicyGradient(advantage=Advantage(), aggregate=TokenMean(), rows=demonstrations)
    assert torch.equal(gradient(estimator, episodes, logp), gradient(find("sft").build().objective, episodes, logp))
