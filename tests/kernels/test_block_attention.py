"""What the kernel takes, and its bits; results are in tests/runtime/test_attention.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vericache_compile.kernels import block_attention
from vericache_compile.kernels.block_attention import Scores


def test_float32_and_bfloat16_on_the_cpu_are_served() -> None:
    assert block_attention.serves(torch.zeros(1, 1, 1, 16))
    assert block_attention.serves(torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16))
    assert not block_attention.serves(torch.zeros(1, 1, 1, 16, dtype=torch.float16))
    assert not block_attention.serves(torch.zeros(1, 1, 1, 16, device="meta"))


@pytest.mark.parametrize("odd", range(3))
def test_other_types_are_not_read_as_float32(odd: int) -> None:
    parts = [torch.zeros(1, 1, 256, 16, dtype=torch.bfloat16 if i == odd else torch.float32) for i in range(3)]
    with pytest.raises(AssertionError, match="float32"):
        block_attention.attend(parts[0][:, :, :1], parts[1], parts[2], [0], [[0]], 1.0)


@pytest.mark.parametrize("dtype", block_attention.TYPES)
@pytest.mark.parametrize(("heads", "window"), [(2, 2), (4, 8), (4, 16), (8, 16)])
def test_a_rows_bits_do_not_depend_on_where_its_window_starts(heads: int, window: int, dtype: torch.dtype) -> None:
    """Nor on the columns that the last block has, the rows beside it, or the batch: one token, many rounds."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 640, 16, generator=generator).to(dtype) for n in (heads, 2, 2))
    seen: dict[tuple[int, int], Tensor] = {}
    for first in (*range(244, 262), *range(500, 531), 7, 8, 9):
        starts = [first, first + 3, 17]
        own = torch.stack([q[b, :, start : start + window] for b, start in enumerate(starts)])
        rows = block_attention.attend(own, k, v, starts, [[0, 0]] * 3, 0.25)
        for b, start in enumerate(starts):
            for w in range(window):
                assert torch.equal(rows[b, :, w], seen.setdefault((b, start + w), rows[b, :, w])), (starts, b, w)


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 8), (8, 2), (24, 3), (4, 1)])
@pytest.mark.parametrize(("size", "value_size"), [(64, 64), (16, 32), (24, 24), (128, 64)])
@pytest.mark.parametrize("reach", [None, 7, 300])
@pytest.mark.parametrize("dtype", block_attention.TYPES)
def test_the_first_rows_of_a_window_alone_have_the_same_bits(
    heads: int, kv_heads: int, size: int, value_size: int, reach: int | None, dtype: torch.dtype
) -> None:
    """Few rows go another way: columns are lanes, not rows."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, heads, 16, size, generator=generator).to(dtype)
    k, v = (torch.randn(3, kv_heads, 768, n, generator=generator).to(dtype) for n in (size, value_size))
    k[:, :, 70] = v[:, :, 70] = float("nan")  # seen by the second row of the batch alone
    starts, pads = [600, 511, 3], [[71] * kv_heads, list(range(kv_heads)), [0] * kv_heads]
    bias, sinks = torch.randn(heads, 768, generator=generator), torch.randn(heads, generator=generator)
    for scores in (Scores(), Scores(soft_cap=5.0, bias=bias), Scores(bias=bias, relative=True, sinks=sinks)):
        whole = block_attention.attend(q, k, v, starts, pads, 0.2, scores, reach)
        assert whole[[0, 2]].isfinite().all()
        for rows in (1, 2, 3):
            few = block_attention.attend(q[:, :, :rows], k, v, starts, pads, 0.2, scores, reach)
            torch.testing.assert_close(few, whole[:, :, :rows], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("window", [1, 16])
@pytest.mark.parametrize("reach", [None, 90])
@pytest.mark.parametrize("size", [32, 21])
def test_bfloat16_is_widened_exactly_and_rounded_once(window: int, reach: int | None, size: int) -> None:
    """Keys and values with gaps between rows; an infinity and a NaN where a row sees them."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, window, size, generator=generator).bfloat16()
    k, v = (torch.randn(2, 2, 512, 80, generator=generator).bfloat16()[..., 8 : 8 + size] for _ in range(2))
    v[0, 0, 300], v[1, 0, 99, 3] = float("inf"), float("nan")
    how = ([330, 100], [[3, 70], [0, 99]], 0.3, Scores(), reach)
    made = block_attention.attend(q, k, v, *how)
    wide = block_attention.attend(q.float(), k.float(), v.float(), *how)
    torch.testing.assert_close(made, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert made[0, :3].isinf().any() and made[1, :3, :, 3].isnan().all() and made[1, 3:].isfinite().all()
