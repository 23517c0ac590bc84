"""What the kernel takes, and its bits; results are in tests/runtime/test_attention.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vericache_compile.kernels import block_attention


def test_float32_on_the_cpu_is_served() -> None:
    assert block_attention.serves(torch.zeros(1, 1, 1, 16))
    assert not block_attention.serves(torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16))
    assert not block_attention.serves(torch.zeros(1, 1, 1, 16, device="meta"))


@pytest.mark.parametrize("odd", range(3))
def test_other_types_are_not_read_as_float32(odd: int) -> None:
    parts = [torch.zeros(1, 1, 256, 16, dtype=torch.bfloat16 if i == odd else torch.float32) for i in range(3)]
    with pytest.raises(AssertionError, match="float32"):
        block_attention.attend(parts[0][:, :, :1], parts[1], parts[2], [0], [[0]], 1.0)


@pytest.mark.parametrize(("heads", "window"), [(2, 2), (4, 8), (4, 16), (8, 16)])
def test_a_rows_bits_do_not_depend_on_where_its_window_starts(heads: int, window: int) -> None:
    """Nor on the columns that the last block has, the rows beside it, or the batch: one token, many rounds."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 640, 16, generator=generator) for n in (heads, 2, 2))
    seen: dict[tuple[int, int], Tensor] = {}
    for first in (*range(244, 262), *range(500, 531), 7, 8, 9):
        starts = [first, first + 3, 17]
        own = torch.stack([q[b, :, start : start + window] for b, start in enumerate(starts)])
        rows = block_attention.attend(own, k, v, starts, [[0, 0]] * 3, 0.25)
        for b, start in enumerate(starts):
            for w in range(window):
                assert torch.equal(rows[b, :, w], seen.setdefault((b, start + w), rows[b, :, w])), (starts, b, w)
