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
from unipo.sources.augment import Augment
from unipo.sources.branching import ADVANTAGE, Cut, MaskLikely, SegmentValues, Unlikely
from unipo.sources.trees import SegmentTree


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


def spo_tree(*, branching: tuple[int, ...] = (6, 6, 6), tokens: int = 30, scale: str = "centred", edges: int = 32, batch: int = 64,
             keep: int = 8, threshold: float = 0.9, clip: float = 0.2, skip: float = 10.0, kl: float = 1e-4, epochs: int = 1,
             minibatches: int = 1) -> Recipe:  # fmt: skip
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
        L       = - TOK( min(r_n A_n, clip(r_n) A_n) ) over the window + value * TOK( (V - return)^2 / 2 ) over finished answers

    A step writes `window` of the longest answer; unfinished answers go on in the next one, with the policy of then, and r is to
    the policy that wrote the token. Returns are Monte Carlo (lam 1, of whole answers). On whole answers this is `ppo`. A cold
    critic gives cut windows A near 0: train it first. The last token before a cut has A = (gamma - 1) V: it is not judged.
    Departs from the paper, which does not state them: lam, value, epochs are those of `ppo`.
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
