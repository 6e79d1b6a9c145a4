"""Results on estimating: values from data of another policy, the best of a class, gradients, and the worth of a data set.

realizable-offpolicy   LSTD where fitted Q evaluation diverges        unipo.tabular.least_squares
agnostic-rl            trajectory trees, capacities, PSDP and CPI     unipo.tabular.agnostic
bayesian-pg            Bayesian quadrature of the policy gradient     unipo.functional.bayesian_quadrature
dataset-saco-tq        quality and coverage of a data set             unipo.functional.coverage
"""

from __future__ import annotations

from unipo.functional import bpg_model_1, state_action_coverage
from unipo.methods.method import Study
from unipo.tabular.agnostic import trajectory_trees
from unipo.tabular.least_squares import lstd


def _tests(path: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{path}.py::{name}" for name in names)


STUDIES: tuple[Study, ...] = (
    Study(
        slug="realizable-offpolicy", function=lstd, row=62, family="theory", paper="arXiv 2211.05311",
        title="When is Realizability Sufficient for Off-Policy Reinforcement Learning?",
        equation="w = A^-1 b,  A = E[x (x - discount x')^T];  error ~ kappa sigma sqrt(d/n)\n"
                 "kappa = 1 / sigma_min(S^-1/2 A S^-1/2),  S = E[x x^T],  C = E[x x'^T]\n"
                 "fitted Q evaluation: w <- S^-1 (b + discount C w), converges iff rho(discount S^-1 C) < 1",
        claim="with a realizable critic and no Bellman completeness, least-squares temporal differences evaluate a policy at "
              "the rate kappa sigma sqrt(d/n); fitted Q evaluation can diverge",
        identity_tests=_tests("tabular/test_least_squares", "test_lstd_is_exact_under_any_law_when_realizable",
                              "test_finite_sample_error_identity", "test_minimax_loss_is_the_residual_and_lstd_minimises_it",
                              "test_fqe_is_the_regression_on_bootstrapped_targets",
                              "test_fqe_diverges_on_the_two_state_chain_and_lstd_does_not",
                              "test_fqe_converges_iff_the_factor_is_below_one",
                              "test_conditioning_under_the_laws_of_the_policy", "test_one_hot_lstd_is_the_count_model"),
    ),
    Study(
        slug="agnostic-rl", function=trajectory_trees, row=147, family="theory", paper="arXiv 2506.01884",
        title="Agnostic Reinforcement Learning: Foundations and Algorithms",
        equation="C(Pi) = max_h max over deterministic processes of #{(s, a) reached at h by Pi}\n"
                 "V^(pi) = mean over trees of pi's return;  |V^ - V| <= sqrt(log(2|Pi|/delta) / 2n) from n H C(Pi) calls",
        claim="trajectory trees evaluate all policies of a class from as many samples as its spanning capacity asks for, with no "
              "dependence on the number of states",
        identity_tests=_tests("tabular/test_agnostic", "test_spanning_capacity_is_the_worst_deterministic_process",
                              "test_known_capacities", "test_coverability",
                              "test_a_tree_is_unbiased_for_every_member_at_once", "test_importance_sampling_is_unbiased",
                              "test_one_step_importance_sampling_is_inverse_propensity_scoring",
                              "test_psdp_over_all_policies_is_dynamic_programming",
                              "test_cpi_gain_is_the_derivative_of_the_return"),
    ),
    Study(
        slug="bayesian-pg", function=bpg_model_1, row=137, family="control",
        paper="Ghavamzadeh, Engel & Valko 2016, JMLR 17",
        title="Bayesian policy gradient and actor-critic algorithms",
        equation="k = u_i^T G^-1 u_j;  Model 1: mean = sum R_i u_i ((K + s^2)^-1 b)_i, K = (1 + k)^2, b_i = 1 + k_ii\n"
                 "Model 2: mean = U (k + s^2)^-1 R, covariance = G - U (k + s^2)^-1 U^T;  actor-critic: r = H q + noise",
        claim="Bayesian quadrature estimates a policy gradient with less squared error than Monte Carlo from few samples; with "
              "a prior on the integrand it is all but exact from 20",
        identity_tests=_tests("functional/test_bayesian_quadrature", "test_push_through",
                              "test_with_the_estimated_fisher_model_2_is_shrunk_monte_carlo",
                              "test_under_much_noise_the_mean_is_the_sum_over_noise",
                              "test_the_weights_of_model_1_are_the_mean_of_its_kernel",
                              "test_the_covariance_of_model_2_ignores_returns_and_the_kernel_ignores_parametrisation",
                              "test_without_discount_or_state_kernel_it_is_model_2",
                              "test_with_correlated_noise_it_is_model_2_on_discounted_returns_to_go",
                              "test_the_state_kernel_leaves_the_prior_of_the_gradient"),
    ),
    Study(
        slug="dataset-saco-tq", function=state_action_coverage, row=43, family="evaluation", paper="arXiv 2111.04714",
        title="A Dataset Perspective on Offline Reinforcement Learning",
        equation="TQ = (mean return - worst) / (best - worst);  SACo = u(D) / u(D_ref),  u = number of different (s, a)",
        claim="off-policy learning follows the coverage of its data set and behaviour cloning its quality; constrained learners "
              "do well where either is high",
        identity_tests=_tests("functional/test_coverage", "test_quality_of_random_is_zero_and_of_expert_one",
                              "test_quality_is_invariant_to_affine_maps_of_the_return_only",
                              "test_quality_of_a_mixture_is_the_mean_by_episodes", "test_distinct_rows_are_those_of_a_set",
                              "test_entropy_bounds_the_count_with_equality_for_even_rows",
                              "test_coverage_of_the_reference_is_one",
                              "test_a_union_has_at_most_the_sum_and_at_least_the_larger"),
    ),
)  # fmt: skip
