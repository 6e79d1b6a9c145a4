"""Credit for parts of an answer: prefixes valued by completions behind them, and answers cut by a window.

A step's advantage is a difference of values, V(where its segment ends) - V(where it begins):

                   segment                        V at its ends                                    V(end of the answer)
    spo-segment    between uncertain tokens       mean reward of K completions                     R
    spo-tree       M tokens, an edge of a tree    mean of the children                             R
    t-ppo          one token (GAE over lam)       critic; where a window cuts, V(s_l) = V(s_l-1)   R
    dr-grpo        the whole answer               mean of the group                                R

With one segment, spo-segment and spo-tree are dr-grpo; on whole answers t-ppo is ppo.
"""

from __future__ import annotations

from unipo.methods.method import Method
from unipo.methods.policy_gradients import ppo, regularised
from unipo.objectives import (
    Advantage,
    BatchStd,
    ClipMask,
    GeneralisedAdvantage,
    GroupStd,
    MeanRatioMask,
    PolicyGradient,
    Product,
    Scale,
    Stored,
    TokenMean,
    TokenRatio,
    ValueRegression,
    ValueTarget,
    Where,
    Whitened,
    rollouts,
)
from unipo.objectives.scores import Marked
from unipo.recipe import Recipe, RolloutSpec
from unipo.sources.stages.augment import Augment
from unipo.sources.stages.branching import ADVANTAGE, MaskLikely, SegmentValues, Unlikely
from unipo.sources.stages.trees import SegmentTree


def spo_chain(*, group: int = 8, completions: int = 9, interval: int = 5, threshold: float = 0.9, clip: float = 0.2,
              skip: float = 10.0, kl: float = 1e-4, epochs: int = 1, minibatches: int = 1) -> Recipe:  # fmt: skip
    """SPO-chain (arXiv 2505.23564): answers are cut where the policy was unsure, and each segment gets what it added.

        A_n = V(next boundary) - V(own boundary),    V = mean reward of `completions` answers behind the prefix, V(end) = R
        L   = - TOK( min(r_n A_n, clip(r_n) A_n) ) + kl * TOK( k3(pi || ref) )          A whitened

    Boundaries stand before every `interval`-th token that had mu < `threshold`; tokens with mu >= `threshold` are in no loss and
    no count (1: all are cut points, none is left out). An update whose mean ratio is above `skip` is left out. Departs from
    the paper: equal prefixes of a prompt are completed once; `skip` is not stated there.
    """
    stage = SegmentValues(Unlikely(threshold, interval), completions)
    advantage = Whitened(Stored(ADVANTAGE), BatchStd(1e-8))
    return _segments(advantage, stage, group, threshold, clip, skip, kl, epochs, minibatches)


SCALES = {"centred": Scale(), "z-score": GroupStd()}


def spo_tree(*, branching: tuple[int, ...] = (6, 6, 6), tokens: int = 30, scale: str = "centred", edges: int = 32,
             batch: int = 64, keep: int = 8, threshold: float = 0.9, clip: float = 0.2, skip: float = 10.0,
             kl: float = 1e-4, epochs: int = 1, minibatches: int = 1) -> Recipe:  # fmt: skip
    """SPO-tree (arXiv 2505.23564): a tree of segments, in which siblings are compared and every sampled token is trained on.

        A(edge) = V(child) - V(parent),     V(leaf) = R,  V(inner node) = mean of its children
        L       = - TOK( min(r_n A_n, clip(r_n) A_n) ) + kl * TOK( k3(pi || ref) )

    Segments have `tokens` tokens (30 for GSM8K, 100 for MATH), those of the last level run to the end. `scale`: centred, or
    z-score (over the siblings' standard deviation). Edges with A = 0 are discarded; `edges` of a prompt are used in a step,
    `batch` per prompt that was drawn in all, and the rest within `keep` steps. Not whitened: A keeps its size.
    """
    tree = SegmentTree(tuple(branching), tokens, SCALES[scale], edges, batch, keep)
    return _segments(Stored(ADVANTAGE), tree, branching[0], threshold, clip, skip, kl, epochs, minibatches)


def _segments(advantage: Advantage, stage: Augment, group: int, threshold: float, clip: float, skip: float, kl: float,
              epochs: int, minibatches: int) -> Recipe:  # fmt: skip
    """What chain and tree share: PPO's clip, on tokens that were not sure."""
    gradient = PolicyGradient(
        advantage=advantage, weight=TokenRatio(), mask=Product((ClipMask(clip, clip), MeanRatioMask(skip))),
        aggregate=TokenMean(),
    )  # fmt: skip
    spec = RolloutSpec(group=group, augment=(stage, MaskLikely(threshold)) if threshold < 1 else (stage,))
    return regularised(Recipe(objective=gradient, rollouts=spec, epochs=epochs, minibatches=minibatches), kl, 0.0)


def t_ppo(*, group: int = 1, window: float = 1 / 3, clip_low: float = 0.2, clip_high: float = 0.28, gamma: float = 1.0,
          lam: float = 0.95, value: float = 0.1, value_clip: float = 0.2, kl: float = 0.0, entropy: float = 0.0,
          epochs: int = 4, minibatches: int = 1) -> Recipe:  # fmt: skip
    """Truncated PPO (arXiv 2506.15050): no step waits for its longest answer, and no answer for its end to be learned from.

        delta_k = R_k + gamma V(s_k+1) - V(s_k)         V(s_l) := V(s_l-1) where the window cuts, V = 0 after the end
        A_n     = sum_k>=n (gamma lam)^(k-n) delta_k    over what is written
        L       = - TOK( min(r_n A_n, clip(r_n) A_n) ) over the window + value * TOK( (V - R)^2 / 2 ) over finished answers

    A step writes `window` of the longest answer; unfinished answers go on in the next one, with the policy of then; r is to
    the policy that wrote the token. V is regressed to Monte-Carlo returns (lam 1) of whole answers. On whole answers this is
    `ppo` with lam 1 for its critic and A as it is: whitening would lower every answer that is not judged yet, whose A is near
    0 with a cold critic (train it first). The last token before a cut has A = (gamma - 1) V. lam, value, epochs: those of
    `ppo`, the paper does not state them.
    """
    base = ppo(group=group, gamma=gamma, epochs=epochs, minibatches=minibatches)
    gradient = PolicyGradient(
        advantage=GeneralisedAdvantage(gamma, lam), weight=TokenRatio(), mask=ClipMask(clip_low, clip_high),
        counted=Where("current"), aggregate=TokenMean(),
    )  # fmt: skip
    critic = ValueRegression(
        target=ValueTarget(gamma, 1.0), clip=value_clip or None, rows=rollouts & Marked("finished")
    )
    spec = RolloutSpec(group=group, window=window)
    recipe = base.but(objective=gradient + value * critic if value else gradient, rollouts=spec, control=None)
    return regularised(recipe, kl, entropy)


_TESTS, _SOURCES = "tests/methods/test_segments.py::", "tests/sources/test_branching.py::"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(_TESTS + n for n in names)


METHODS = (
    Method(
        slug="spo-segment", build=spo_chain, row=76, family="llm-rl", paper="arXiv 2505.23564",
        title="Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL for Large Language Models",
        equation="A = V(next boundary) - V(own boundary), whitened;  V = mean reward of K completions behind the prefix\n"
                 "L = -TOK(min(r A, clip(r) A)) + kl TOK(k3),  over tokens with mu < threshold (tree: spo-tree)",
        claim="at equal generated tokens SPO is at least as good as GRPO and as PPO with a critic, and its advantages are closer "
              "to the true ones than the critic's",
        identity_tests=(*_tests("test_segments_telescope", "test_one_segment_is_the_group_baseline",
                                "test_cuts_everywhere_with_exact_values_give_token_advantages",
                                "test_segment_advantages_have_mean_zero_behind_every_prefix",
                                "test_a_threshold_of_one_switches_the_mask_off", "test_masked_tokens_leave_the_count",
                                "test_whitening_is_over_what_is_not_masked", "test_a_batch_far_off_is_skipped"),
                        _SOURCES + "test_segment_values_are_those_of_enumeration"),
    ),
    Method(
        slug="spo-tree", build=spo_tree, family="llm-rl", paper="arXiv 2505.23564",
        title="Segment Policy Optimization on trees",
        equation="A = V(child) - V(parent),  V(inner node) = mean of its children;  L as spo-segment",
        identity_tests=(*_tests("test_a_tree_of_one_level_is_dr_grpo", "test_tree_advantages_over_the_spread_of_siblings"),
                        _SOURCES + "test_siblings_add_up_to_zero_and_values_are_means_of_children",
                        _SOURCES + "test_a_tree_of_one_level_is_its_group"),
    ),
    Method(
        slug="t-ppo", build=t_ppo, row=78, family="llm-rl", paper="arXiv 2506.15050",
        title="Truncated Proximal Policy Optimization",
        equation="A = GAE over what is written, V(s_l) := V(s_l-1) at a cut;  L = -TOK_window(min(r A, clip(r) A))\n"
                 "    + value TOK_finished((V - R)^2 / 2)",
        claim="at equal generated tokens T-PPO is as good as PPO that waits for whole answers, with less idle time",
        identity_tests=(*_tests("test_whole_answers_are_ppo", "test_egae_by_hand", "test_a_cut_is_not_an_end",
                                "test_egae_is_unbiased_but_at_the_cut", "test_policy_and_critic_have_their_own_tokens"),
                        _SOURCES + "test_a_window_of_the_whole_answer_gives_plain_rollouts",
                        _SOURCES + "test_answers_go_on_where_they_were_cut"),
    ),
)  # fmt: skip
