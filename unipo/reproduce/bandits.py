"""CoPG: learning the optimum of reward - beta * KL from samples of a bad policy (arXiv 2406.19185)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from unipo.episodes import Episodes
from unipo.methods.catalog import build, find
from unipo.objectives import BatchMean, LeaveOneOut
from unipo.policies.tabular import TabularPolicy
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.training import copy_of, divergence, key, near_uniform, success, train
from unipo.sources.keyed import keyed_generator
from unipo.tasks.tabular import TabularTask

BETA, PROMPTS, ARMS, GROUP = 0.5, 8, 6, 8


def bandit(seed: int) -> TabularTask:
    """Rewards are a normal offset per prompt plus a uniform number per arm."""
    drawn = keyed_generator(seed, "bandit")
    table = drawn.normal(size=(PROMPTS, 1)) + drawn.uniform(size=(PROMPTS, ARMS))
    return TabularTask(PROMPTS, ARMS, 1, lambda prompt, tokens: float(table[prompt, tokens[0]]))


def bad_policy(task: TabularTask) -> TabularPolicy:
    """Prefers what is worth least: softmax(-2 R)."""
    logits = torch.zeros(PROMPTS, 1, ARMS + 1, ARMS, dtype=torch.float64)
    return TabularPolicy(logits - 2.0 * task.rewards[:, None, None, :])


def trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """KL(pi || pi*) after `steps` updates on groups drawn from the bad policy; pi* = ref * exp(R / beta) / Z."""
    task = bandit(seed)
    reference, behaviour = near_uniform(task, seed), bad_policy(task)
    policy = copy_of(reference)

    def draw(step: int) -> Episodes:
        return task.sample(behaviour, GROUP, key(seed, "bandit", step))

    train(phases, policy, draw, steps=steps, rate=rate, reference=reference)
    with torch.no_grad():
        best = (task.log_probability(reference) + task.rewards / BETA).log_softmax(1)
    return {"KL to the optimum": divergence(task, policy, best), "reward": success(task, policy)}


REINFORCE = build("rloo", {"rloo": {"kl": BETA}})
CLAIMS = (
    Claim(
        slug="copg",
        statement=find("copg").claim,
        arms={
            "copg": (build("copg", {"copg": {"beta": BETA}}),),
            "reinforce, batch mean": (REINFORCE.but(center=BatchMean()),),
            "rloo, KL in reward": (REINFORCE.but(center=LeaveOneOut()),),
        },
        trial=trial,
        steps=300,
        tune="KL to the optimum",
        minimise=True,
        grid=(0.006, 0.02, 0.06, 0.2),
        expectations=(
            Expectation(arm="copg", metric="KL to the optimum", most=1e-3),
            Expectation(arm="reinforce, batch mean", metric="KL to the optimum", than="copg", least=1e-3),
        ),
        note=f"Bandit of {PROMPTS} prompts x {ARMS} arms, rewards offset per prompt, {GROUP} draws per prompt and step "
        f"from softmax(-2 R), beta {BETA}, exact KL. All baselines have the KL inside the reward. With a single "
        "prompt the batch mean is a matched baseline and has the same fixed point as CoPG, so several prompts are needed "
        "for the claim to mean anything; RLOO with the KL in the reward, CoPG's gradient up to a factor, is shown beside.",
    ),
)
