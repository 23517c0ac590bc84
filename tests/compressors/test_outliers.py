"""The largest numbers of every vector, found one by one or together."""

from __future__ import annotations

import pytest
import torch

from vericache_compile.compressors.outliers import FEW, largest


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("count", [1, FEW, FEW + 1])
def test_as_topk(count: int, dim: int) -> None:
    x = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(largest(x, count, dim), x.topk(count, dim).indices)


def test_equal_numbers_are_taken_once_each() -> None:
    places = largest(torch.ones(2, 9), 3, 1)
    assert [len(set(row)) for row in places.tolist()] == [3, 3]
