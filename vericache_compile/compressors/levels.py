"""Numbers as the nearest of a few levels."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

BINS: Final = 8192


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """uint8 index of the level nearest to each number of x, none of them NaN; levels [L] are float32, ascending.

    A search per number is slow on a CPU. There a table says how many bounds lie before each of many narrow bins, and
    one comparison whether the next is passed too; that is exact where no bin has two.
    """
    x, bounds = x.float(), (levels[1:] + levels[:-1]) / 2
    if x.device.type == "cpu" and x.numel() > BINS:
        low, span = bounds[0], bounds[-1] - bounds[0]
        before = torch.bucketize(low + torch.arange(BINS + 1, device=x.device) * (span / BINS), bounds)
        if span > 0 and int(before.diff().max()) < 2:
            bins = ((x - low) * (BINS / span)).clamp_(0, BINS - 1).int().flatten()
            following = F.pad(bounds, (0, 1), value=float("inf"))[before]
            index, passed = before.to(torch.uint8).index_select(0, bins), x.flatten() > following.index_select(0, bins)
            return (index + passed).view_as(x)
    return torch.bucketize(x, bounds).to(torch.uint8)
