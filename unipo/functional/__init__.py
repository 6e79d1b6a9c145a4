"""Pure maths on flat tensors and segment ids: no modules, no input or output, no configuration.

Shapes: [N] steps, [E] episodes, [G] groups, [P] pairs. `index` is the int64 segment id of each entry, `n` the number of
segments. Nothing here mutates its inputs; ratios are formed in log space and clamped before `exp`.
"""

from unipo.functional.advantages import (
    batch_mean,
    batch_std,
    beta_parameters,
    beta_scale,
    discounted_return,
    gae,
    group_mean,
    group_std,
    leave_one_out_mean,
    normalize,
)
from unipo.functional.aggregate import constant, episode_mean, episode_sum, token_mean
from unipo.functional.divergences import entropy, generalised_jsd, k1, k2, k3, kl
from unipo.functional.pairs import hinge, logistic, pairwise_square, squared
from unipo.functional.weights import (
    clip_mask,
    dual_clip_mask,
    effective_sample_size,
    geometric_ratio,
    log_ratio,
    ring_mask,
    sequence_ratio,
    taper,
    token_ratio,
    two_side_mask,
)

__all__ = [
    "batch_mean",
    "batch_std",
    "beta_parameters",
    "beta_scale",
    "clip_mask",
    "constant",
    "discounted_return",
    "dual_clip_mask",
    "effective_sample_size",
    "entropy",
    "episode_mean",
    "episode_sum",
    "gae",
    "generalised_jsd",
    "geometric_ratio",
    "group_mean",
    "group_std",
    "hinge",
    "k1",
    "k2",
    "k3",
    "kl",
    "leave_one_out_mean",
    "log_ratio",
    "logistic",
    "normalize",
    "pairwise_square",
    "ring_mask",
    "sequence_ratio",
    "squared",
    "taper",
    "token_mean",
    "token_ratio",
    "two_side_mask",
]
