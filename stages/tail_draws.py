"""Systematic draws from the tail of a distribution.

S points, evenly spaced over the tail's mass from one uniform start, fall into ids in proportion to
their probability: an id of probability p is drawn S·p/tail times on average, and never more than one
time off it. The ids are laid out in the order (v mod G, v ÷ G) with G = ⌊V / 32⌋, the V mod 32 ids
from 32·G on last of all; so a point is placed by the sums of G groups and then within a group of 32,
and not by a running sum over the whole vocabulary.

Shapes: R rows, V vocabulary, S draws, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 32


def draw(weights_RV: Tensor, uniform_R: Tensor, draws: int) -> Tensor:
    """Draws from weights, by points (u + i)/S of their sum.

    Group sums are float32 sums of 32 numbers; everything summed over groups is float64, so an id's
    probability is right to some 1e-6 of itself.

    Args:
        weights_RV: [R, V] ≥ 0, not normalised; 0 where nothing may be drawn.
        uniform_R: float64 [R], u in [0, 1).
        draws: S ≥ 1.

    Returns:
        int64 ids [R, S] of positive weight, wherever the row has any (else in range, and to be
        replaced). A row's depend on the row alone.
    """
    width = weights_RV.shape[-1]
    depth = min(DEPTH, width)
    groups = width // depth
    whole = depth * groups
    slices = weights_RV[:, :whole].view(-1, depth, groups).sum(1)
    rest = weights_RV[:, whole:].sum(-1, keepdim=True)
    ends = torch.cat([slices, rest], -1).cumsum(-1, dtype=torch.float64)  # [R, G + 1]
    total = ends[:, -1:]
    steps = torch.arange(draws, dtype=torch.float64, device=ends.device)
    points = _under((uniform_R[:, None] + steps) / draws * total, total)
    group = torch.searchsorted(ends, points, right=True).clamp_max_(groups)
    begin = torch.where(group > 0, ends.gather(-1, (group - 1).clamp_min_(0)), 0.0)
    share = (points - begin) / (ends.gather(-1, group) - begin)

    place = torch.arange(depth, device=ends.device)
    group = group[..., None]
    ids = torch.where(group < groups, group + place * groups, whole + place)  # [R, S, depth]
    inside = weights_RV.gather(-1, ids.clamp_max(width - 1).flatten(1)).view(ids.shape)
    inside_ends = inside.masked_fill_(ids >= width, 0.0).cumsum(-1, dtype=torch.float64)
    sums = inside_ends[..., -1:]
    at = torch.searchsorted(inside_ends, _under(share[..., None] * sums, sums), right=True)
    return ids.gather(-1, at.clamp_max_(depth - 1))[..., 0].clamp_max_(width - 1)


def _under(points: Tensor, total: Tensor) -> Tensor:
    """Keeps rounding from pushing a point out of [0, total): every point then lies in some weight."""
    return torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
