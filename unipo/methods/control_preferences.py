"""Policies from preferences between segments of behaviour, without a reward or a critic.

    score of a segment     sum gamma^t alpha log( pi(a_t|s_t) / ref )           the advantage of the policy that it is optimal for
    cpl                    no reference, other's score times lam                lam < 1: all of the data stay likely
    cpl, cloned            reference: the policy after its cloning phase        DPO, on segments

`unipo data segments RECORDED OUT --expert RUN` makes pairs; `unipo run cpl ENV --dataset OUT` learns from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from unipo.methods.method import Method, choice
from unipo.objectives import (
    Discounted,
    EpisodeMean,
    Knob,
    LessOfOthers,
    Likelihood,
    Objective,
    Pairwise,
    WeightedScore,
    pairs,
)
from unipo.recipe import Recipe, Snapshot
from unipo.sources.controllers import Switch
from unipo.sources.spec import ControlSpec

REFERENCES: Mapping[str, str] = {"none": "", "cloned": "reference"}
UNIT = -0.5 * math.log(2.0 * math.pi)
"""log of the standard deviation with which a Gaussian's log-density is -pi |a - mu|^2, without a constant."""


def cpl(*, alpha: float = 0.1, lam: float = 0.5, gamma: float = 1.0, clone: int = 0, bc: float = 0.0,
        reference: str = "none") -> Recipe:  # fmt: skip
    """Contrastive preference learning (arXiv 2310.13639): preferences are about regret, and an advantage is a log-probability.

        S(segment) = sum_t gamma^t alpha log pi(a_t | s_t)
        steps < clone:   L = - mean log pi(a|s)                                          over both segments of every pair
        then             L = mean over pairs - log sigmoid( S(+) - lam S(-) ) - bc mean log pi(a|s)

    lam below 1 prefers policies that find all of the data likely. `reference` cloned: log pi / pi_clone in the score (CPL-KL:
    alpha 0.2, lam 0.75); the paper's CPL-BC: lam 1, bc 1. A Gaussian has a fixed standard deviation, with which log pi = -pi
    |a - mu|^2: alpha is then the paper's times pi. Departs from the paper: Adam is not started anew after cloning; no dropout.
    """
    to = choice(REFERENCES, "reference", reference)
    score = LessOfOthers(WeightedScore(alpha, Discounted(gamma), to), lam)
    cloning = Likelihood(rows=pairs, aggregate=EpisodeMean(), name="cloning")
    total: Objective = Pairwise(score=score, name="contrast")
    total = total + bc * cloning if bc else total
    phase = Knob("clone", 1.0)
    control = ControlSpec(
        actor="gaussian", fixed_std=True, critic="none", off_policy=True, recorded=True, compared=True, gamma=gamma,
        settings={"hidden": (256, 256), "activation": "relu", "orthogonal": False, "batch_size": 48, "rollout": 100,
                  "total_timesteps": 5000, "learning_rate": 1e-3, "log_std_init": UNIT, "adam_eps": 1e-8},
    )  # fmt: skip
    return Recipe(
        objective=phase * cloning + (1 - phase) * total if clone else total,
        control=control,
        controllers=(Switch(knob="clone", value=1.0, after=0.0, at=clone),) if clone else (),
        snapshots={"reference": Snapshot(at=(clone,))} if to else {},
    )


_TESTS = "tests/methods/test_control_preferences.py::"
METHODS: tuple[Method, ...] = (
    Method(
        slug="cpl", build=cpl, row=115, family="preference",
        title="Contrastive Preference Learning: Learning from Human Feedback without RL", paper="arXiv 2310.13639",
        equation="L = mean_pairs -log sigmoid(S(+) - lam S(-)) - bc mean log pi,   S = sum_t gamma^t alpha log pi(a_t | s_t)",
        claim="from pairs of segments labelled by regret CPL finds better policies than imitation of the preferred segments, and "
              "no worse ones than a reward model and planning; with labels by return it does not",
        identity_tests=tuple(_TESTS + t for t in (
            "test_segments_of_one_step_are_dpo",
            "test_advantages_of_both_sides",
            "test_only_a_factor_below_one_sees_how_likely_all_of_the_data_are",
            "test_regret_labels_have_the_best_policy_as_minimiser",
            "test_much_cloning_is_behaviour_cloning",
            "test_the_fixed_gaussian_has_no_constant",
            "test_the_better_segment_is_preferred",
            "test_a_run_learns_from_pairs_and_from_nothing_else")),
    ),
)  # fmt: skip
