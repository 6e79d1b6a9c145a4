"""Exploration with optimism, with demonstrations, and with fewer actions: what theory says of it, enumerated.

nora-actor-critic    optimism + a critic of Q* + an actor that is reset when the data have doubled
demo-reg-rl          a clone as the prior: planning errors enter squared, over the temperature
action-grouping      fewer actions: approximation + estimation
"""

from __future__ import annotations

from unipo.methods.method import Study
from unipo.tabular import explore, grouped_policy, optimistic_actor_critic

_TESTS = "tests/tabular/"
STUDIES = (
    Study(
        slug="nora-actor-critic", function=optimistic_actor_critic, row=74, family="theory",
        title="Actor-Critics Can Achieve Optimal Sample Efficiency", paper="arXiv 2505.03710",
        equation="f = argmax over {f: L_h(f_h, f_h+1) - min_g L_h(g, f_h+1) <= beta} of max_a f_1(s_1, a)\n"
                 "L_h(f, g) = sum_data (f(s, a) - r - max_a' g(s', a'))^2       tabular: f = r^ + c / sqrt(n) + P^ max f\n"
                 "every episode: pi <- pi exp(eta f) / Z       when the data have outgrown f: new f, pi <- uniform",
        claim="optimism, a critic of Q* and rare switches with resets explore where leaving out optimism or switching at "
              "every episode does not; without the reset it is slower; demonstrations make optimism unnecessary",
        identity_tests=tuple(f"{_TESTS}test_nora.py::{t}" for t in (
            "test_excess_loss_is_what_least_squares_leaves", "test_the_bonus_spends_its_square_on_every_pair",
            "test_no_bonus_is_the_optimum_of_the_counts", "test_between_switches_the_actor_is_the_exponentiated_critic",
            "test_a_large_rate_is_optimistic_value_iteration", "test_a_switch_resets_the_actor",
            "test_switches_are_logarithmic")),
    ),
    Study(
        slug="demo-reg-rl", function=explore, row=90, family="theory",
        title="Demonstration-Regularized RL", paper="arXiv 2310.17303",
        equation="pi_BC = (N_h(s, a) + 1) / (N_h(s) + A)       max_pi E sum_h r_h - lam KL(pi_h || pi_BC,h)\n"
                 "V*_lam - V^pi_lam = lam sum_h E_pi KL(pi_h || pi*_h) <= 1 / (2 lam) sum_h E_pi max_a (Q~_h - Q*_h)^2\n"
                 "V^E - V^pi <= lam KL(pi_E || pi_BC) + eps_RL",
        claim="with a temperature in proportion to the number N of demonstrations, the episodes that exploration takes fall "
              "like 1 / N, below those of UCB when N is large; the policy is as good as promised and better than the clone",
        identity_tests=tuple(f"{_TESTS}test_demonstration_regularised.py::{t}" for t in (
            "test_the_regularised_loss_is_a_kl", "test_errors_enter_squared", "test_the_price_of_demonstrations",
            "test_limits_of_the_temperature", "test_a_uniform_clone_is_the_entropy_bonus_less_a_constant",
            "test_kl_of_episodes_is_the_sum_over_steps", "test_one_step_is_the_tilted_clone",
            "test_the_clone_is_within_the_bound_behind_the_temperature")),
    ),
    Study(
        slug="action-grouping", function=grouped_policy, row=124, family="theory",
        title="Achieving Sample and Computational Efficient Reinforcement Learning by Action Space Reduction via Grouping",
        paper="arXiv 2306.12981",
        equation="P(.|s, a) = (1 - bP) P1(.|s, h(a)) + bP P2(.|s, a), r alike       lifted: one action per group h\n"
                 "V* - V^pi <= (br + gamma bP / (1 - gamma)) / (1 - gamma) + estimation ~ sqrt(S G / N) / (1 - gamma)^2",
        claim="with few samples an intermediate number of groups loses least, less than all actions and less than one group, "
              "and the best number grows with the samples",
        identity_tests=tuple(f"{_TESTS}test_action_grouping.py::{t}" for t in (
            "test_singletons_are_the_process_itself", "test_one_group_is_worth_its_law",
            "test_a_policy_of_groups_is_worth_the_same_below", "test_twins_are_lossless",
            "test_the_approximation_bound_holds", "test_the_approximation_bound_is_attained")),
    ),
)  # fmt: skip
