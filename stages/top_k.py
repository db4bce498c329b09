"""Exact top-k over long rows on a CPU, where torch.topk would look at every entry as a pair.

A row of W entries is seen as [depth, W/depth]; the maximum over depth is one vectorised pass, and the
k groups of largest maximum hold the k largest entries (up to ties). So two small selections are left,
among W/depth maxima and among k·depth candidates, and NumPy's SIMD partition does both. depth ≈
√(W/2k) makes them about equally dear; a candidate costs a cache line as well.

W = 49,152, k = 64 takes about a third of torch.topk's 100 to 120 µs. Short rows, where the groups
would be few, and GPUs take torch.topk itself.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import torch
from torch import Tensor

from storage.types import AnyArray, Int64

LEAST_DEPTH = 4


def top_k(values_RW: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k largest entries of each row, largest first, and where they stand.

    Args:
        values_RW: [R, W], the last dimension contiguous.
        k: 1 ≤ k ≤ W.

    Returns:
        Values [R, k], those of torch.topk; int64 indices [R, k], distinct within a row. Among equal
        values the choice depends on the row alone, but need not be torch.topk's.
    """
    depth = isqrt(values_RW.shape[-1] // (2 * k))
    if values_RW.device.type != "cpu" or depth < LEAST_DEPTH:
        return values_RW.topk(k, dim=-1)
    groups = values_RW.shape[-1] // depth
    whole = depth * groups  # fewer than `depth` columns lie beyond
    slices = values_RW[:, :whole].view(-1, depth, groups)
    chosen = _largest(slices.amax(1).numpy(), k)
    index = torch.from_numpy(chosen)[:, None, :].expand(-1, depth, -1)
    candidates = slices.gather(2, index).flatten(1)
    if whole < values_RW.shape[-1]:
        candidates = torch.cat([candidates, values_RW[:, whole:]], -1)
    at, top = _ordered(candidates.numpy(), k)
    part, group = np.divmod(at, k)
    ids = part * groups + np.take_along_axis(chosen, group, 1)
    ids = np.where(part < depth, ids, at + (whole - depth * k))
    return torch.from_numpy(top), torch.from_numpy(ids)


def _ordered(values: AnyArray, k: int) -> tuple[Int64, AnyArray]:
    """Returns the columns of each row's k largest entries, largest first, and these entries."""
    at = _largest(values, k)
    order = np.take_along_axis(values, at, 1).argsort(axis=1)[:, ::-1]
    at = np.take_along_axis(at, order, 1)
    return at, np.take_along_axis(values, at, 1)


def _largest(values: AnyArray, k: int) -> Int64:
    """Returns the columns of each row's k largest entries (NaN counts as largest), in any order."""
    first = values.shape[1] - k
    return np.argpartition(values, first, axis=1)[:, first:]
