"""Knorm: the shortest keys stay."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.knorm import Knorm
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def shortest(keys: Tensor, count: int) -> list[list[int]]:
    """Per head the positions of the `count` shortest of keys [K, S, D], ascending."""
    norms = [[math.sqrt(sum(float(x) ** 2 for x in key)) for key in head] for head in keys]
    return [sorted(sorted(range(len(head)), key=head.__getitem__)[:count]) for head in norms]


def test_the_choice_equals_the_naive_loops(random_row: Row) -> None:
    keys, values, _ = random_row(60)
    region = Knorm(keep=0.25, window=8).compress(keys, values, None)
    assert (region.covered, region.slots) == (52, 13)
    for head, kept in enumerate(shortest(keys[:, :52], 13)):
        assert torch.equal(region.keys[head], keys[head, kept])
        assert torch.equal(region.values[head], values[head, kept])


def test_extend_chooses_within_the_chunk(random_row: Row) -> None:
    keys, values, _ = random_row(60)
    region = Knorm(keep=0.25, window=20).compress(keys, values, None)
    longer = region.extend(keys[:, 40:], values[:, 40:], None)
    assert (longer.covered, longer.slots) == (60, 15)
    assert torch.equal(longer.keys[:, :10], region.keys)
    for head, kept in enumerate(shortest(keys[:, 40:], 5)):
        assert torch.equal(longer.keys[head, 10:], keys[head, 40:][kept])


def test_a_row_within_the_window_stays_exact(random_row: Row) -> None:
    keys, values, _ = random_row(32)
    assert Knorm().compress(keys, values, None).covered == 0
    assert Knorm(window=0).compress(keys, values, None).covered == 32


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"keep": 1.1}, {"window": -1}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Knorm(**wrong)  # type: ignore[arg-type]
