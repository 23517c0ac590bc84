"""Outliers apart: a few numbers of every vector are stored as they are, with their places; the rest is quantised.

A vector runs along dimension `dim` of a tensor; n numbers are taken of each. Places take a byte where vectors have at
most 256 numbers.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

FEW: Final = 4
"""As many largest numbers as a CPU finds sooner one by one."""


class Outliers(NamedTuple):
    """n numbers of each vector, in place of the vector's own extent."""

    numbers: Tensor
    """In the dtype of the cache."""
    places: Tensor
    """Where they stand in their vector: uint8, or int16 in vectors of more than 256."""


def outlier_count(fraction: float, length: int) -> int:
    """Numbers to take of a vector: `fraction` of them, rounded, but at least one where there are two or more."""
    return min(max(round(fraction * length), 1), length // 2)


def largest(x: Tensor, count: int, dim: int) -> Tensor:
    """Places (int64) of the `count` largest numbers of each vector of x along `dim`, largest first.

    Where only -inf is left, a place may come again.
    """
    if x.device.type != "cpu" or not 0 < count <= FEW:
        return x.topk(count, dim).indices
    places, rest = [], x.clone()
    for _ in range(count):  # a search for one is vectorised
        places.append(rest.max(dim, keepdim=True).indices)
        rest.scatter_(dim, places[-1], float("-inf"))
    return torch.cat(places, dim)


def take_outliers(x: Tensor, places: Tensor, dim: int) -> Outliers:
    """The numbers of x at `places` (int64) of each vector along `dim`."""
    small = torch.uint8 if x.shape[dim] <= 256 else torch.int16
    return Outliers(x.gather(dim, places), places.to(small))


def put_outliers(x: Tensor, outliers: Outliers, dim: int) -> Tensor:
    """x with the outliers back in their places, in place."""
    return x.scatter_(dim, outliers.places.long(), outliers.numbers)
