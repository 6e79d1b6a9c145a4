"""Pure maths on flat tensors and segment ids: no modules, no input or output, no configuration.

Shapes: [N] steps, [E] episodes, [G] groups, [P] pairs. `index` is the int64 segment id of each entry, `n` the number of
segments. Nothing here mutates its inputs; ratios are formed in log space and clamped before `exp`.

    advantages    subtract `group_mean` `leave_one_out_mean` `batch_mean`, divide by `group_std` `batch_std`: `normalize`;
                  `group_variance`, `group_softmax`; `weighted_leave_one_out_mean`, by `score_square` say;
                  `softened` rewards; `beta_parameters` `beta_scale` (BNPO); over time `gae` `discounted_return`
    weights       `log_ratio` `token_ratio` `sequence_ratio` `geometric_ratio`; masks `clip_mask` `dual_clip_mask`
                  `two_side_mask` `ring_mask`; tapers `truncate` `taper`; `shaped_slope`; `effective_sample_size`
    divergences   from samples `k1` `k2` `k3` `weighted_k3`; over full distributions `kl` `entropy` `generalised_jsd`
    pairs         `pair_margin`; links `logistic` `squared` `hinge`; all pairs of a group `pairwise_square`
    lists         of rated rows: `ordered_pairs` `win_shares`, `discounted_gain` `ndcg`, LambdaRank's `swap_gain`; losses
                  `plackett_luce` `list_cross_entropy`
    aggregate     `token_mean` `episode_mean` `episode_sum` `constant`
    quadrature    posterior of a policy gradient: `bpg_model_1` `bpg_model_2`, `bac` on `temporal_differences`;
                  `fisher_kernel` `fisher_estimate`
    coverage      of a data set: `trajectory_quality`, `state_action_coverage` `log_state_action_coverage`,
                  `distinct_rows` `row_entropy` of integers, `digitise`
    selection     `ascending` `largest` `max_variance_subset` `share_of`; by place in a group `places` `rank_shares`
    segments      of answers: where they begin `every_kth`, differences of values along them `segment_advantages`
    balance       of raised and lowered probabilities: `active_balance` `value_balance`, clip bounds `balanced_bounds`
    flow          `noised` data, `flow_error` of a velocity; `standouts` of a segment, its `running_mean`
    ranking       of pairs by a policy: `ranks_right`, `idealised_log_ratio`, `ranking_difficulty`
    neighbours    of points: `neighbour_distance`, its `log_spacing`; `importance` of rows, of terms that are `standardised`
    moments       `moments_of` `merged_moments` of numbers that come in parts; `weighted_r2` of a regression
"""

from unipo.functional.advantages import (
    batch_mean,
    batch_std,
    beta_parameters,
    beta_scale,
    discounted_return,
    gae,
    group_mean,
    group_softmax,
    group_std,
    group_variance,
    leave_one_out_mean,
    normalize,
    score_square,
    softened,
    weighted_leave_one_out_mean,
)
from unipo.functional.aggregate import constant, episode_mean, episode_sum, token_mean
from unipo.functional.balance import active_balance, balanced_bounds, value_balance
from unipo.functional.bayesian_quadrature import (
    bac,
    bpg_model_1,
    bpg_model_2,
    fisher_estimate,
    fisher_kernel,
    temporal_differences,
)
from unipo.functional.coverage import (
    digitise,
    distinct_rows,
    log_state_action_coverage,
    row_entropy,
    state_action_coverage,
    trajectory_quality,
)
from unipo.functional.divergences import entropy, generalised_jsd, k1, k2, k3, kl, weighted_k3
from unipo.functional.flow import flow_error, noised, running_mean, standouts
from unipo.functional.lists import (
    discounted_gain,
    list_cross_entropy,
    ndcg,
    ordered_pairs,
    plackett_luce,
    swap_gain,
    win_shares,
)
from unipo.functional.moments import Moments, merged_moments, moments_of, weighted_r2
from unipo.functional.neighbours import importance, log_spacing, neighbour_distance, standardised
from unipo.functional.pairs import hinge, logistic, pair_margin, pairwise_square, squared
from unipo.functional.ranking import idealised_log_ratio, ranking_difficulty, ranks_right
from unipo.functional.segments import every_kth, segment_advantages
from unipo.functional.selection import ascending, largest, max_variance_subset, places, rank_shares, share_of
from unipo.functional.weights import (
    clip_mask,
    dual_clip_mask,
    effective_sample_size,
    geometric_ratio,
    log_ratio,
    ring_mask,
    sequence_ratio,
    shaped_slope,
    taper,
    token_ratio,
    truncate,
    two_side_mask,
)

__all__ = [
    "active_balance",
    "ascending",
    "bac",
    "balanced_bounds",
    "batch_mean",
    "batch_std",
    "beta_parameters",
    "beta_scale",
    "bpg_model_1",
    "bpg_model_2",
    "clip_mask",
    "constant",
    "digitise",
    "discounted_gain",
    "discounted_return",
    "distinct_rows",
    "dual_clip_mask",
    "effective_sample_size",
    "entropy",
    "episode_mean",
    "episode_sum",
    "every_kth",
    "fisher_estimate",
    "fisher_kernel",
    "flow_error",
    "gae",
    "generalised_jsd",
    "geometric_ratio",
    "group_mean",
    "group_softmax",
    "group_std",
    "group_variance",
    "hinge",
    "idealised_log_ratio",
    "importance",
    "k1",
    "k2",
    "k3",
    "kl",
    "largest",
    "leave_one_out_mean",
    "list_cross_entropy",
    "log_ratio",
    "log_spacing",
    "log_state_action_coverage",
    "logistic",
    "max_variance_subset",
    "merged_moments",
    "moments_of",
    "ndcg",
    "neighbour_distance",
    "noised",
    "normalize",
    "ordered_pairs",
    "pair_margin",
    "pairwise_square",
    "places",
    "plackett_luce",
    "rank_shares",
    "ranking_difficulty",
    "ranks_right",
    "ring_mask",
    "row_entropy",
    "running_mean",
    "score_square",
    "segment_advantages",
    "sequence_ratio",
    "shaped_slope",
    "share_of",
    "softened",
    "squared",
    "standardised",
    "standouts",
    "state_action_coverage",
    "swap_gain",
    "taper",
    "temporal_differences",
    "token_mean",
    "token_ratio",
    "trajectory_quality",
    "truncate",
    "two_side_mask",
    "value_balance",
    "weighted_k3",
    "weighted_leave_one_out_mean",
    "weighted_r2",
    "win_shares",
]
