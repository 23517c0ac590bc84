"""The nearest of a few levels, by a search or by a table."""

from __future__ import annotations

import pytest
import torch

from vericache_compile.compressors.levels import nearest


@pytest.mark.parametrize("spread", [1.0, 1e-3, 5.0, 0.0])
@pytest.mark.parametrize("crowded", [False, True])
def test_the_nearest_level_is_the_nearest(spread: float, crowded: bool) -> None:
    """Of many numbers too, which are looked up in a table; levels may lie closer than its bins, or all in one place."""
    generator = torch.Generator().manual_seed(2)
    levels = (spread * (2 * torch.rand(64, generator=generator) - 1)).sort().values
    if crowded:
        levels[:8] = levels[8]
    x = 3 * torch.rand(2, 9000, 3, generator=generator) - 1.5
    x[0, :64, 0], x[1, :63, 1] = levels, (levels[1:] + levels[:-1]) / 2
    found = levels[nearest(x, levels).long()]
    best = (x[..., None] - levels).abs().min(dim=-1).values
    torch.testing.assert_close((x - found).abs(), best, rtol=0, atol=1e-6)
