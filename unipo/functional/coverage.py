"""What a fixed data set is like before anything is trained on it: how good its episodes are, how much of the world it saw.

Rows are numpy arrays or tensors, [N] or [N, ...]: one observation or one action per transition. Counting is exact and
of integers; real numbers are put into bins first (`digitise`), with limits that are the same for every data set that is
compared. Leave out the last observation of an episode, where no action was taken. Results are plain numbers and numpy.
Source: Schweighofer et al. (2021), "A Dataset Perspective on Offline Reinforcement Learning", arXiv 2111.04714.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

__all__ = [
    "digitise",
    "distinct_rows",
    "log_state_action_coverage",
    "row_entropy",
    "state_action_coverage",
    "trajectory_quality",
]

Rows = np.ndarray | Tensor


def trajectory_quality(returns: Rows, worst: float, best: float) -> float:
    """TQ = (mean return - worst) / (best - worst): 0 for a random policy's data, 1 for an expert's; may exceed 1.

    `returns` [E]: undiscounted. `worst`, `best`: mean return of the random and of the best policy. Positive affine maps
    of all three change nothing.
    """
    if not best > worst or not len(returns):
        raise ValueError(
            f"expected episodes and best > worst, found {len(returns)} episodes, best {best}, worst {worst}: "
            f"give the mean return of a random and of an expert policy"
        )
    return (float(_numbers(returns).mean()) - worst) / (best - worst)


def digitise(rows: Rows, low: Sequence[float] | Rows, high: Sequence[float] | Rows, bins: int = 100) -> np.ndarray:
    """[N, d] int64: the bin of each number among `bins` equal ones between `low` and `high` (one per column, or one).

    What lies outside belongs to the outermost bins. Raises ValueError for limits that are not finite or not ordered.
    """
    x, low_d, high_d = _matrix(rows), _numbers(low).astype(np.float64), _numbers(high).astype(np.float64)
    if not (np.isfinite(low_d).all() and np.isfinite(high_d).all() and (low_d < high_d).all()):
        raise ValueError(
            f"expected finite low < high in every column, found {low_d} and {high_d}: choose global limits"
        )
    if not np.isfinite(x).all():
        raise ValueError("expected finite numbers, found NaN or infinite ones: drop these transitions")
    return np.clip(np.floor((x - low_d) / (high_d - low_d) * bins), 0, bins - 1).astype(np.int64)


def distinct_rows(*columns: Rows) -> int:
    """u(D): the number of different rows of integer `columns` side by side, such as observations and actions; exact."""
    return len(_counts(columns))


def row_entropy(*columns: Rows) -> float:
    """Entropy in nats of the empirical law of rows: exp of it is at most u(D), equal iff all rows are equally frequent."""
    share = _counts(columns) / max(len(columns[0]), 1)
    return float(-(share * np.log(share)).sum())


def state_action_coverage(observations: Rows, actions: Rows, reference: tuple[Rows, Rows]) -> float:
    """SACo = u(D) / u(D_ref): 1 for the reference, as a rule the replay buffer of an online run of as many transitions.

    `reference`: its observations and actions, in the same bins.
    """
    return distinct_rows(observations, actions) / _reference(reference, 1)


def log_state_action_coverage(observations: Rows, actions: Rows, reference: tuple[Rows, Rows]) -> float:
    """lSACo = log u(D) / log u(D_ref)."""
    return math.log(distinct_rows(observations, actions)) / math.log(_reference(reference, 2))


def _reference(reference: tuple[Rows, Rows], least: int) -> int:
    found = distinct_rows(*reference)
    if found < least:
        raise ValueError(f"expected a reference of at least {least} different pairs, found {found}: give a fuller one")
    return found


def _counts(columns: Sequence[Rows]) -> np.ndarray:
    """How often each different row occurs. Rows get a number column by column, so that no product overflows."""
    found = [_matrix(c) for c in columns]
    if len({len(c) for c in found}) != 1:
        raise ValueError(f"expected columns of one length, found {[len(c) for c in found]}: one row per transition")
    label = np.zeros(len(found[0]), dtype=np.int64)
    for matrix in found:
        if matrix.dtype.kind not in "iub":
            raise ValueError(
                f"expected integer rows, found {matrix.dtype}: digitise(rows, low, high) puts them into bins"
            )
        for column in matrix.T:
            values, rank = np.unique(column, return_inverse=True)
            label = np.unique(label * len(values) + rank, return_inverse=True)[1]
    return np.bincount(label)


def _matrix(rows: Rows) -> np.ndarray:
    """[N] or [N, ...] -> [N, d]."""
    x = _numbers(rows)
    return x.reshape(len(x), -1) if x.size else x.reshape(len(x), 1 if x.ndim == 1 else 0)


def _numbers(x: Sequence[float] | Rows) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
