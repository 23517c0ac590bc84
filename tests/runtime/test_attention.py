"""Attention over fixed blocks: right against a plain softmax, and its bits a function of token and window size alone.

Shapes: B batch, H query heads, K KV heads, C columns, W window, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from vericache_compile.kernels import native
from vericache_compile.kernels.block_attention import BLOCK
from vericache_compile.runtime.attention import Visible, _merge, attend_compressed, attend_full

WINDOWS = (2, 4, 8, 16, 32)
HEADS = ((4, 4), (4, 2), (9, 3), (8, 1))
"""(H, K): plain, grouped, SmolLM2's odd group of three, and one KV head for all."""
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Cache:
    """Keys and values of every column, and one query per column."""

    q: Tensor
    """[B, H, C, D]."""
    keys: Tensor
    """[B, K, C, D]."""
    values: Tensor
    """[B, K, C, E]."""
    scale: float
    reach: int | None = None
    """Columns that a token of a sliding layer sees."""

    def attend(
        self, starts: list[int], pads: list[int], window: int, garbage: float = 0.0, wanted: int | None = None
    ) -> Tensor:
        """`attend_full` for the tokens at starts[b] + (0..window-1); `garbage` is what lies beyond them."""
        q = torch.stack([self.q[b, :, start : start + window] for b, start in enumerate(starts)])
        columns = -(-(max(starts) + window) // BLOCK) * BLOCK
        keys, values = self.keys[:, :, :columns].clone(), self.values[:, :, :columns].clone()
        for b, start in enumerate(starts):
            keys[b, :, start + window :], values[b, :, start + window :] = garbage, -garbage
        return attend_full(q, keys, values, starts, pads, self.scale, self.reach, wanted=wanted)


def make_cache(
    columns: int,
    heads: int,
    kv_heads: int,
    size: int,
    value_size: int,
    dtype: torch.dtype,
    batch: int = 1,
    spread: float = 1.0,
) -> Cache:
    """A random cache; `spread` makes attention sharper."""
    generator = torch.Generator().manual_seed(columns + heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q, keys = normal(batch, heads, columns, size) * spread, normal(batch, kv_heads, columns, size)
    return Cache(q, keys, normal(batch, kv_heads, columns, value_size), size**-0.5)


def plain_attention(cache: Cache, starts: list[int], pads: list[int], window: int) -> Tensor:
    """Masked softmax in float64, head by head and token by token: [B, H, W, E]."""
    heads, kv_heads = cache.q.shape[1], cache.keys.shape[1]
    rows = []
    for b, (start, pad) in enumerate(zip(starts, pads, strict=True)):
        keys = cache.keys[b].double().repeat_interleave(heads // kv_heads, dim=0)
        values = cache.values[b].double().repeat_interleave(heads // kv_heads, dim=0)
        tokens = []
        for column in range(start, start + window):
            pad = pad if cache.reach is None else max(pad, column + 1 - cache.reach)
            scores = keys[:, pad : column + 1] @ cache.q[b, :, column].double().unsqueeze(-1) * cache.scale
            tokens.append((scores.softmax(dim=1) * values[:, pad : column + 1]).sum(dim=1))
        rows.append(torch.stack(tokens, dim=1))
    return torch.stack(rows)


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Our kernel, and what runs where it does not serve."""
    if request.param == "reference":
        monkeypatch.setattr(native, "load", lambda: None)
    chosen: str = request.param
    return chosen


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """A number of threads for torch's kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "value_size"), [(16, 16), (64, 64), (24, 16)])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_windows_equal_plain_attention(
    heads: int, kv_heads: int, size: int, value_size: int, dtype: torch.dtype
) -> None:
    cache = make_cache(3 * BLOCK, heads, kv_heads, size, value_size, dtype)
    places = [(0, 0), (1, 1), (5, 3), (250, 0), (254, 17), (255, 255), (256, 256), (257, 200), (500, 300), (511, 509)]
    for window in WINDOWS:
        for start, pad in places:
            out = cache.attend([start], [pad], window, garbage=7.0)
            assert out.shape == (1, heads, window, value_size)
            assert out.dtype == dtype
            expected = plain_attention(cache, [start], [pad], window)
            worst = float((out.double() - expected).abs().max())
            assert worst < TOLERANCE[dtype], f"window {window}, start {start}, pad {pad}"


def test_rows_of_a_batch_keep_their_own_starts_and_padding() -> None:
    cache = make_cache(4 * BLOCK, 4, 2, 16, 16, torch.float32, batch=3)
    starts, pads = [700, 255, 30], [0, 250, 30]
    out = cache.attend(starts, pads, 8, garbage=50.0)
    torch.testing.assert_close(out.double(), plain_attention(cache, starts, pads, 8), rtol=0, atol=2e-6)
    for b, (start, pad) in enumerate(zip(starts, pads, strict=True)):
        alone = Cache(cache.q[b : b + 1], cache.keys[b : b + 1], cache.values[b : b + 1], cache.scale)
        assert torch.equal(out[b], alone.attend([start], [pad], 8)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reach", [1, 5, 16, 255, 256, 300])
def test_a_sliding_layer_sees_its_newest_columns(reach: int, dtype: torch.dtype) -> None:
    cache = replace(make_cache(4 * BLOCK, 4, 2, 16, 24, dtype, batch=2), reach=reach)
    for starts, pads in (([0, 3], [0, 2]), ([250, 500], [0, 490]), ([511, 700], [255, 3]), ([255, 256], [0, 0])):
        out = cache.attend(starts, pads, 8, garbage=9.0)
        expected = plain_attention(cache, starts, pads, 8)
        assert float((out.double() - expected).abs().max()) < TOLERANCE[dtype], f"starts {starts}, pads {pads}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reach", [5, 256, 270])
def test_a_sliding_row_has_the_same_bits_wherever_the_window_starts(reach: int, dtype: torch.dtype) -> None:
    cache = replace(make_cache(4 * BLOCK, 4, 2, 16, 16, dtype), reach=reach)
    for border in (BLOCK, BLOCK + reach, 2 * BLOCK + reach):
        slide(cache, 8, 3, border, 3)


def slide(cache: Cache, window: int, pad: int, border: int, step: int) -> None:
    """Slide the window over a block border and compare the bits of each token's row from place to place."""
    first: dict[int, Tensor] = {}
    for start in range(max(border - 2 * window, pad), border + window, step):
        out = cache.attend([start], [pad], window, garbage=float(start))
        for i in range(window):
            kept = first.setdefault(start + i, out[0, :, i])
            assert torch.equal(kept, out[0, :, i]), f"token {start + i} at place {i}, pad {pad}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 64), (24, 16)], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_row_has_the_same_bits_wherever_the_window_starts(
    window: int, heads: int, kv_heads: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Every token is attended from several places in the window; those near a border before and after it."""
    cache = make_cache(3 * BLOCK, heads, kv_heads, *size, dtype, spread=3.0)
    step = max(window // 4 - 1, 1)
    slide(cache, window, 3, BLOCK, step)
    slide(cache, window, 300, 2 * BLOCK, step)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(16, 16), (64, 64), (24, 16)], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.usefixtures("threads")
def test_a_row_has_the_same_bits_at_each_place_of_the_window(
    window: int, heads: int, kv_heads: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """The same from every place, with one thread and with two."""
    cache = make_cache(3 * BLOCK, heads, kv_heads, *size, dtype, spread=3.0)
    for pad in (0, 3, 300):
        for border in (BLOCK, 2 * BLOCK):
            slide(cache, window, pad, border, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_size", [16, 24])
@pytest.mark.parametrize("garbage", [1e-30, 1.0, 1e4, -1e4])
def test_what_lies_beyond_the_window_is_never_seen(garbage: float, value_size: int, dtype: torch.dtype) -> None:
    cache = make_cache(2 * BLOCK, 4, 2, 16, value_size, dtype)
    for start in (0, 1, 100, 247, 248, 250, 255, 256):
        clean = cache.attend([start], [0], 8)
        assert not clean.isnan().any()
        assert torch.equal(clean, cache.attend([start], [0], 8, garbage))


@pytest.mark.parametrize("value_size", [16, 24])
def test_what_lies_in_the_padding_is_never_seen(value_size: int) -> None:
    cache = make_cache(3 * BLOCK, 4, 2, 16, value_size, torch.float32)
    for pad in (1, 100, 255, 256, 257, 500):
        clean = cache.attend([513], [pad], 4)
        keys, values = cache.keys.clone(), cache.values.clone()
        keys[:, :, :pad], values[:, :, :pad] = 1e4, -1e4
        assert torch.equal(clean, Cache(cache.q, keys, values, cache.scale).attend([513], [pad], 4))


def test_a_longer_allocation_changes_no_bit() -> None:
    cache = make_cache(2 * BLOCK, 4, 2, 16, 16, torch.float32)
    q = cache.q[:, :, 100:108]
    short = attend_full(q, cache.keys[:, :, :BLOCK], cache.values[:, :, :BLOCK], [100], [0], cache.scale)
    assert torch.equal(short, attend_full(q, cache.keys, cache.values, [100], [0], cache.scale))


def test_a_block_that_a_row_cannot_see_adds_exactly_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(3, 2, 5, 8, generator=generator)
    lse = torch.randn(3, 2, 5, generator=generator)
    lowest = torch.finfo(torch.float32).min
    for hidden in (lowest, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float16).min):
        padded = torch.full_like(lse[:1], hidden)
        more_out, more_lse = torch.cat([out[:1] * 100, out, out[:1] * 100]), torch.cat([padded, lse, padded])
        assert torch.equal(_merge(out, lse), _merge(more_out, more_lse))


def test_blocks_merge_into_the_softmax_over_all_of_them() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(4, 2, 3, BLOCK, generator=generator, dtype=torch.float64) * 4
    values = torch.randn(4, 2, BLOCK, 6, generator=generator, dtype=torch.float64)
    whole = scores.transpose(0, 1).transpose(1, 2).reshape(2, 3, 4 * BLOCK).softmax(-1)
    expected = whole @ values.transpose(0, 1).reshape(2, 4 * BLOCK, 6)
    torch.testing.assert_close(_merge(scores.softmax(-1) @ values, scores.logsumexp(-1)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("value_size", [16, 24])
@pytest.mark.parametrize("ragged", [False, True])
def test_compressed_attention_reads_the_visible_slots(
    heads: int, kv_heads: int, value_size: int, dtype: torch.dtype, ragged: bool
) -> None:
    """Rows of different lengths, aligned anywhere, and heads of different counts: only the shown slots count."""
    cache = make_cache(2 * BLOCK, heads, kv_heads, 16, value_size, dtype, batch=3)
    lefts = tuple(tuple(left + 10 * k * ragged for k in range(kv_heads)) for left in (0, 7, 270))
    visible, masks = Visible(lefts, (2 * BLOCK, 63, 301)), dict[Visible, Tensor | None]()
    q = cache.q[:, :, :1]
    out = attend_compressed(q, cache.keys, cache.values, visible, cache.scale, masks)
    assert out.shape == (3, heads, 1, value_size)
    assert torch.equal(out, attend_compressed(q, cache.keys, cache.values, visible, cache.scale, masks))
    group = heads // kv_heads
    for b, (row, right) in enumerate(zip(*visible, strict=True)):
        for k, left in enumerate(row):
            keys, values = cache.keys[b : b + 1, k : k + 1, left:right], cache.values[b : b + 1, k : k + 1, left:right]
            last, own = right - left - 1, slice(k * group, (k + 1) * group)
            alone = Cache(q[b : b + 1, own].expand(-1, -1, last + 1, -1), keys, values, cache.scale)
            expected = plain_attention(alone, [last], [0], 1)
            torch.testing.assert_close(out[b : b + 1, own].double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_rows_that_read_the_same_slots_need_no_mask(path: str) -> None:
    cache, masks = make_cache(60, 4, 2, 16, 16, torch.float32), dict[Visible, Tensor | None]()
    out = attend_compressed(
        cache.q[:, :, 39:40], cache.keys, cache.values, Visible(((0, 0),), (40,)), cache.scale, masks
    )
    torch.testing.assert_close(out.double(), plain_attention(cache, [39], [0], 1), rtol=0, atol=2e-6)
    assert list(masks.values()) == ([] if path == "kernel" else [None])


def test_the_kernel_reads_nothing_that_is_not_visible(path: str) -> None:
    """NaN elsewhere: in the padding, past the window, in a neighbouring row."""
    if path == "reference":
        pytest.skip("torch's kernels multiply what they hide by zero; the runtime leaves no NaN where they look")
    cache = make_cache(3 * BLOCK, 4, 2, 16, 24, torch.float32, batch=2)
    starts, pads, window = [300, 520], [257, 3], 8
    clean = cache.attend(starts, pads, window)
    for b, (start, pad) in enumerate(zip(starts, pads, strict=True)):
        for held in (cache.keys, cache.values):
            held[b, :, :pad] = held[b, :, start + window :] = float("nan")
    assert torch.equal(cache.attend(starts, pads, window, garbage=float("nan")), clean)


@pytest.mark.parametrize("reach", [None, 40])
@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_rows_that_are_wanted_have_the_bits_that_they_have_among_all(wanted: int, reach: int | None, path: str) -> None:
    """What the kernel gives for the others is the first row's, and their keys are not looked at."""
    cache = replace(make_cache(3 * BLOCK, 4, 2, 16, 24, torch.float32, batch=2), reach=reach)
    starts, pads, window = [509, 20], [3, 0], 8
    whole = cache.attend(starts, pads, window)
    if path == "kernel":
        for b, start in enumerate(starts):
            for held in (cache.keys, cache.values):
                held[b, :, start + max(wanted, 2) :] = float("nan")
    made = cache.attend(starts, pads, window, wanted=wanted)
    assert torch.equal(made[:, :, :wanted], whole[:, :, :wanted])
    if path == "kernel":
        later = made[:, :, max(wanted, 2) :]
        assert torch.equal(later, whole[:, :, :1].expand_as(later))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_key_that_is_no_number_is_seen_by_all_that_may_see_it(number: float, path: str) -> None:
    """As in a plain softmax, and by no row before it."""
    if path == "reference":
        pytest.skip("torch's kernels add masks to scores, and a NaN stays one")
    cache = make_cache(2 * BLOCK, 4, 2, 16, 16, torch.float32)
    clean = cache.attend([100], [0], 8)
    cache.keys[:, :, 104] = number
    out = cache.attend([100], [0], 8)
    assert torch.equal(out[:, :, :4], clean[:, :, :4])
    assert bool(out[:, :, 4:].isnan().all()) == bool(plain_attention(cache, [104], [0], 4).isnan().all())
