"""The surface: exported == documented == `__all__`, every function called once, and none mutates what it is given."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unipo import functional as F
from unipo.functional import (
    advantages,
    aggregate,
    balance,
    bayesian_quadrature,
    coverage,
    divergences,
    flow,
    lists,
    moments,
    neighbours,
    pairs,
    ranking,
    segments,
    selection,
    weights,
)

MODULES = (
    advantages, aggregate, balance, bayesian_quadrature, coverage, divergences, flow, lists, moments, neighbours, pairs,
    ranking, segments, selection, weights,
)  # fmt: skip
INDEX = torch.tensor([0, 0, 1, 1])
ROW = torch.tensor([0.3, 0.9, 0.5, 0.7])
SIGN = torch.tensor([1.0, -1.0, 1.0, 0.0])
SCORES = torch.tensor([[1.0, 0.5], [-0.3, 1.0], [0.2, -1.0], [0.7, 0.1]])
FULL = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
CHOSEN = torch.tensor([True, False, False, True])

# One call of every function: its tensors, and the numbers that follow them.
CALLS: dict[str, tuple[tuple[Tensor, ...], tuple[object, ...]]] = {
    "active_balance": ((ROW, SIGN), (0.6, 1.2, 3.0)),
    "ascending": ((ROW,), ()),
    "bac": ((SCORES, ROW, torch.eye(4), torch.eye(2), torch.zeros(4, 4), torch.eye(4)), ()),
    "balanced_bounds": ((), (lambda low, high: (ROW.sum(), ROW.sum() * 2), (0.6, 1.2), (0.8, 2.0), (0.05, 0.05))),
    "batch_mean": ((ROW,), ()),
    "batch_std": ((ROW,), ()),
    "beta_parameters": ((ROW,), ()),
    "beta_scale": ((ROW,), (1.5, 2.0)),
    "bpg_model_1": ((SCORES, ROW, torch.eye(2)), (0.1,)),
    "bpg_model_2": ((SCORES, ROW, torch.eye(2)), (0.1,)),
    "clip_mask": ((ROW, SIGN), (0.2, 0.2)),
    "constant": ((ROW,), (2, 4.0)),
    "digitise": ((ROW,), ([0.0], [1.0], 4)),
    "discounted_gain": ((ROW, INDEX, INDEX), (2,)),
    "discounted_return": ((ROW, INDEX), (2, 0.9)),
    "distinct_rows": ((INDEX, CHOSEN), ()),
    "dual_clip_mask": ((ROW, SIGN), (3.0,)),
    "effective_sample_size": ((ROW,), ()),
    "entropy": ((FULL,), ()),
    "episode_mean": ((ROW, INDEX), (2,)),
    "episode_sum": ((ROW,), (2,)),
    "every_kth": ((CHOSEN, INDEX), (2,)),
    "fisher_estimate": ((SCORES,), ()),
    "fisher_kernel": ((SCORES, torch.eye(2)), ()),
    "flow_error": ((SCORES, SCORES.flip(-1), SCORES.flip(0)), ()),
    "gae": ((ROW, SIGN, INDEX), (2, 0.9, 0.8, torch.ones(2))),
    "generalised_jsd": ((FULL, FULL.flip(-1)), (0.3,)),
    "geometric_ratio": ((ROW, INDEX), (2,)),
    "group_mean": ((ROW, INDEX), (2,)),
    "group_softmax": ((ROW, INDEX), (2, CHOSEN)),
    "group_std": ((ROW, INDEX), (2,)),
    "group_variance": ((ROW, INDEX), (2,)),
    "hinge": ((ROW,), ()),
    "idealised_log_ratio": ((SIGN, ROW), (0.1,)),
    "importance": ((ROW, ROW, SIGN), (0.5, 0.5)),
    "k1": ((ROW,), ()),
    "k2": ((ROW,), ()),
    "k3": ((ROW,), ()),
    "kl": ((FULL, FULL.flip(-1)), ()),
    "largest": ((ROW,), (2,)),
    "leave_one_out_mean": ((ROW, INDEX), (2,)),
    "list_cross_entropy": ((ROW, SIGN.abs(), INDEX), (2,)),
    "log_ratio": ((ROW, SIGN), ()),
    "log_state_action_coverage": ((INDEX, CHOSEN), ((INDEX, CHOSEN),)),
    "log_spacing": ((ROW,), ()),
    "logistic": ((ROW,), (0.1,)),
    "max_variance_subset": ((ROW,), (2,)),
    "merged_moments": ((), ((2.0, 0.5, 0.1), (4.0, 0.6, 0.2))),
    "moments_of": ((ROW,), ()),
    "ndcg": ((ROW, SIGN.abs(), INDEX), (2,)),
    "neighbour_distance": ((SCORES,), (2,)),
    "noised": ((SCORES, SCORES.flip(0), ROW[:, None]), ()),
    "normalize": ((ROW, SIGN, ROW), (0.1,)),
    "ordered_pairs": ((ROW, INDEX), (2,)),
    "pair_margin": ((ROW, CHOSEN, INDEX), (2,)),
    "pairwise_square": ((ROW, INDEX), (2,)),
    "places": ((ROW, INDEX), (2,)),
    "plackett_luce": ((ROW, SIGN, INDEX), (2,)),
    "rank_shares": ((ROW, INDEX), (2, 0.5, 0.5, 0.0)),
    "ranking_difficulty": ((SIGN,), (0.1,)),
    "ranks_right": ((ROW, SIGN), ()),
    "ring_mask": ((ROW, SIGN), (0.2, 0.2, 0.6, 2.0)),
    "row_entropy": ((INDEX, CHOSEN), ()),
    "running_mean": ((ROW, INDEX), ()),
    "score_square": ((-ROW, ROW), ()),
    "segment_advantages": ((ROW[:2], torch.tensor([0, 3]), ROW[2:], INDEX), ()),
    "sequence_ratio": ((ROW, INDEX), (2,)),
    "share_of": ((), (4, 0.3)),
    "squared": ((ROW,), (1.0,)),
    "standardised": ((ROW,), ()),
    "standouts": ((ROW, INDEX), (2, CHOSEN, 0.6, 2)),
    "state_action_coverage": ((INDEX, CHOSEN), ((INDEX, CHOSEN),)),
    "shaped_slope": ((ROW,), (0.1,)),
    "softened": ((ROW,), (0.8, 0.01, 1.0)),
    "swap_gain": ((ROW, INDEX, INDEX, INDEX.flip(0)), ()),
    "taper": ((ROW, SIGN), ()),
    "temporal_differences": ((ROW, INDEX, torch.tensor([True, False])), (0.9,)),
    "token_mean": ((ROW,), ()),
    "token_ratio": ((ROW,), ()),
    "trajectory_quality": ((ROW,), (0.0, 1.0)),
    "truncate": ((ROW,), (0.6,)),
    "two_side_mask": ((ROW,), (0.2, 0.2)),
    "value_balance": ((ROW, SIGN), (0.6, 1.2, 3.0)),
    "weighted_k3": ((ROW, ROW), ()),
    "weighted_leave_one_out_mean": ((ROW, ROW, INDEX), (2,)),
    "weighted_r2": ((ROW, SIGN, ROW), ()),
    "win_shares": ((ROW, INDEX), (2,)),
}


def public_functions(module: object) -> set[str]:
    own = inspect.getmodule(module)
    return {
        n for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == own.__name__ and n[0] != "_"
    }


def test_exported_documented_and_all_are_the_same_names() -> None:
    assert F.__all__ == sorted(F.__all__)
    for module in MODULES:
        assert set(module.__all__) == public_functions(module), module.__name__
        for name in module.__all__:
            assert getattr(F, name) is getattr(module, name)
    listed = {name for module in MODULES for name in module.__all__}
    assert listed <= set(F.__all__)
    table = set(re.findall(r"`(\w+)`", F.__doc__.split("advantages ", 1)[1]))
    assert listed <= table <= set(F.__all__)
    assert listed == set(CALLS)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_documented_and_typed(name: str) -> None:
    function: Callable[..., object] = getattr(F, name)
    assert function.__doc__, name
    signature = inspect.signature(function)
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    assert signature.return_annotation is not inspect.Signature.empty


def tensors_of(found: object) -> list[Tensor]:
    return [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", sorted(CALLS))
def test_nothing_is_mutated_and_no_float_changes_type(name: str) -> None:
    tensors, rest = CALLS[name]
    copies = [x.clone() for x in tensors]
    for dtype in (torch.float32, torch.float64):
        given = tuple(x.to(dtype) if x.is_floating_point() else x for x in tensors)
        for found in tensors_of(getattr(F, name)(*given, *rest)):
            assert found.dtype in (dtype, torch.bool, torch.int64)
            assert not found.isnan().any() if found.is_floating_point() else True
        getattr(F, name)(*tensors, *rest)
        assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))
