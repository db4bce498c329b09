"""Systematic draws from the tail of a distribution.

S points, evenly spaced over the tail's mass from one uniform start, fall into ids in proportion to
their probability: an id of probability p is drawn S·p/tail times on average, and never more than one
time off it. The ids are laid out in the order (v mod G, v ÷ G) with G = ⌊V / 32⌋, the V mod 32 ids
from 32·G on last of all; so a point is placed by the sums of G groups and then within a group of 32,
and not by a running sum over the whole vocabulary.

Shapes: R rows, V vocabulary, S draws, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEPTH = 32


def groups_of(width: int) -> tuple[int, int]:
    """Returns (ids of a group, G) of a vocabulary of this width."""
    depth = min(DEPTH, width)
    return depth, width // depth


def sum_groups(weights_RV: Tensor) -> Tensor:
    """Returns the sums [R, G + 1] of the groups' weights; the last is that of the ids beyond."""
    depth, groups = groups_of(weights_RV.shape[-1])
    whole = depth * groups
    rest = weights_RV[:, whole:].sum(-1, keepdim=True)
    return torch.cat([weights_RV[:, :whole].view(-1, depth, groups).sum(1), rest], -1)


def group_of(ids: Tensor, width: int) -> Tensor:
    """Returns the group of each id, the column of its sum."""
    depth, groups = groups_of(width)
    return torch.where(ids < depth * groups, ids % groups, groups)


def draw(
    sums_RG: Tensor,
    weights_at: Callable[[Tensor], Tensor],
    width: int,
    uniform_R: Tensor,
    draws: int,
) -> Tensor:
    """Draws from weights, by points (u + i)/S of their sum.

    Group sums are float32 sums of 32 numbers; everything summed over groups is float64, so an id's
    probability is right to some 1e-6 of itself.

    Args:
        sums_RG: [R, G + 1], of the groups' weights.
        weights_at: ids [R, n] → their weights [R, n], ≥ 0 and not normalised, 0 where nothing may be
            drawn.
        width: V.
        uniform_R: float64 [R], u in [0, 1).
        draws: S ≥ 1.

    Returns:
        int64 ids [R, S] of positive weight, wherever the row has any (else in range, and to be
        replaced). A row's depend on the row alone.
    """
    depth, groups = groups_of(width)
    whole = depth * groups
    ends = sums_RG.cumsum(-1, dtype=torch.float64)
    total = ends[:, -1:]
    steps = torch.arange(draws, dtype=torch.float64, device=ends.device)
    points = _under((uniform_R[:, None] + steps) / draws * total, total)
    group = torch.searchsorted(ends, points, right=True).clamp_max_(groups)
    begin = torch.where(group > 0, ends.gather(-1, (group - 1).clamp_min_(0)), 0.0)
    share = (points - begin) / (ends.gather(-1, group) - begin)

    place = torch.arange(depth, device=ends.device)
    group = group[..., None]
    ids = torch.where(group < groups, group + place * groups, whole + place)  # [R, S, depth]
    inside = weights_at(ids.clamp_max(width - 1).flatten(1)).view(ids.shape)
    inside_ends = inside.masked_fill(ids >= width, 0.0).cumsum(-1, dtype=torch.float64)
    sums = inside_ends[..., -1:]
    at = torch.searchsorted(inside_ends, _under(share[..., None] * sums, sums), right=True)
    return ids.gather(-1, at.clamp_max_(depth - 1))[..., 0].clamp_max_(width - 1)


def _under(points: Tensor, total: Tensor) -> Tensor:
    """Keeps rounding from pushing a point out of [0, total): every point then lies in some weight."""
    return torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
