"""`verify_attention` in Triton: right against a masked softmax, and a row's bits its own.

Shapes: B batch, H query heads, K KV heads, C columns, W window, D head size, E value head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile.kernels.verify_attention import (
    SPLIT,
    verify_attention,
    verify_attention_reference,
)
from vericache_compile.runtime.attention import BLOCK, attend_full

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
MOST = 64
"""Query rows of a tile."""
DEVICE_FIXTURE = [HealthCheck.function_scoped_fixture]


@dataclass(frozen=True)
class Cache:
    """Keys and values of every column, and one query per column."""

    q: Tensor
    """[B, H, C, D]."""
    keys: Tensor
    """[B, K, C, D]."""
    values: Tensor
    """[B, K, C, E]."""
    more: dict[str, Any]

    def arguments(self, starts: list[int], lefts: list[list[int]], window: int) -> tuple[Any, ...]:
        """What the kernel and its reference take, for the tokens at starts[b] + (0..window-1)."""
        q = torch.stack([self.q[b, :, start : start + window] for b, start in enumerate(starts)])
        bounds = (torch.tensor(x, device=q.device) for x in (starts, lefts))
        return (q, self.keys, self.values, *bounds, self.q.shape[3] ** -0.5)

    def attend(self, starts: list[int], lefts: list[list[int]], window: int) -> Tensor:
        return verify_attention(*self.arguments(starts, lefts, window), **self.more)


def make_cache(
    shape: tuple[int, int, int, int],
    columns: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    **more: Any,
) -> Cache:
    """A random cache of (H, K, D, E), spread so that attention is sharp."""
    heads, kv_heads, size, value_size = shape
    generator = torch.Generator().manual_seed(columns + heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    q, keys = normal(batch, heads, columns, size) * 2, normal(batch, kv_heads, columns, size)
    return Cache(q, keys, normal(batch, kv_heads, columns, value_size), more)


@settings(deadline=None, max_examples=8, suppress_health_check=DEVICE_FIXTURE)
@given(
    shape=st.sampled_from([(4, 2, 16, 16), (3, 1, 24, 40), (2, 2, 80, 64)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    window=st.sampled_from([1, 2, 8]),
    choice=st.sampled_from([{}, {"reach": 100}, {"soft_cap": 2.0}, {"sinks": True}, {"bias": False}, {"bias": True}]),
    data=st.data(),
)
def test_windows_equal_a_masked_softmax(
    device: torch.device, shape: Any, dtype: torch.dtype, window: int, choice: dict[str, Any], data: st.DataObject
) -> None:
    heads = torch.linspace(-2, 2, shape[0], device=device)
    if "sinks" in choice:
        choice = {"sinks": heads}
    if "bias" in choice:
        slopes = torch.full((2 * MOST, 2 * SPLIT), float("nan"), device=device)  # what lies behind them is not read
        slopes[: shape[0]] = heads[:, None] * torch.arange(2 * SPLIT, device=device) / 100
        choice = {"bias": slopes[: shape[0]], "relative": choice["bias"], "soft_cap": 2.0}
    cache = make_cache(shape, 2 * SPLIT, device, dtype, batch=2, **choice)
    starts = [data.draw(st.integers(0, 2 * SPLIT - window)) for _ in range(2)]
    lefts = [[data.draw(st.integers(0, start)) for _ in range(shape[1])] for start in starts]
    arguments = cache.arguments(starts, lefts, window)
    expected = verify_attention_reference(*arguments, **choice)
    made = verify_attention(*arguments, **choice)
    assert (made.dtype, made.shape) == (dtype, (2, shape[0], window, shape[3]))
    torch.testing.assert_close(made, expected, rtol=0, atol=TOLERANCE[dtype])


def test_it_equals_the_runtimes_reference(device: torch.device) -> None:
    cache = make_cache((4, 2, 16, 24), 2 * BLOCK, device)
    arguments = cache.arguments([300], [[5, 5]], 8)
    expected = attend_full(*arguments[:3], [300], [5], arguments[5])
    torch.testing.assert_close(verify_attention(*arguments), expected, rtol=0, atol=2e-6)
    assert SPLIT == BLOCK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"reach": 40, "soft_cap": 5.0}], ids=["plain", "sliding, capped"])
def test_a_rows_bits_do_not_depend_on_its_place_in_the_window(
    more: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """Each token from several places, before and after the border of a split; what lies beyond the window differs."""
    cache, window = make_cache((3, 1, 24, 16), 2 * SPLIT, device, dtype, **more), 16
    first: dict[int, Tensor] = {}
    for start in (SPLIT - 20, SPLIT - 13, SPLIT - 5, SPLIT - 1, SPLIT):
        keys, values = cache.keys.clone(), cache.values.clone()
        keys[:, :, start + window :], values[:, :, start + window :] = float("nan"), start
        out = replace(cache, keys=keys, values=values).attend([start], [[3]], window)
        for w in range(window):
            assert torch.equal(out[0, :, w], first.setdefault(start + w, out[0, :, w])), (start, w)
    assert len(first) == 36


def test_a_rows_bits_do_not_depend_on_the_rest_of_the_window(device: torch.device) -> None:
    """Another fill: later tokens, with their keys and values, are others."""
    cache, window = make_cache((4, 2, 16, 16), 2 * SPLIT, device), 8
    out = cache.attend([300], [[0, 7]], window)
    other = make_cache((4, 2, 16, 16), 3 * SPLIT, device)
    for stand in (1, 5):
        pairs = ((cache.q, other.q), (cache.keys, other.keys), (cache.values, other.values))
        end = 300 + stand
        joined = (torch.cat([own[:, :, :end], more[:, :, end : 2 * SPLIT]], dim=2) for own, more in pairs)
        made = Cache(*joined, {}).attend([300], [[0, 7]], window)
        assert torch.equal(made[:, :, :stand], out[:, :, :stand])
        assert not torch.equal(made[:, :, stand:], out[:, :, stand:])


def test_a_rows_bits_do_not_depend_on_the_batch_or_the_allocation(device: torch.device) -> None:
    cache = make_cache((4, 2, 16, 16), 3 * SPLIT, device, batch=3)
    starts, lefts = [600, 255, 30], [[0, 300], [250, 3], [30, 30]]
    out = cache.attend(starts, lefts, 4)
    for b, columns in enumerate((3 * SPLIT, 2 * SPLIT, SPLIT)):
        alone = Cache(*(x[b : b + 1, :, :columns] for x in (cache.q, cache.keys, cache.values)), {})
        assert torch.equal(out[b : b + 1], alone.attend(starts[b : b + 1], lefts[b : b + 1], 4)), b


def test_nothing_is_read_that_is_not_visible(device: torch.device) -> None:
    """NaN elsewhere: in the padding of one head, past the window, in a neighbouring row."""
    cache = make_cache((4, 2, 16, 24), 3 * SPLIT, device, batch=2)
    starts, lefts, window = [300, 520], [[257, 3], [0, 510]], 8
    clean = cache.attend(starts, lefts, window)
    for b, (start, row) in enumerate(zip(starts, lefts, strict=True)):
        for held in (cache.keys, cache.values):
            held[b, :, start + window :] = float("nan")
            for k, left in enumerate(row):
                held[b, k, :left] = float("nan")
    assert torch.equal(cache.attend(starts, lefts, window), clean)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_key_that_is_no_number_is_seen_by_all_that_may_see_it(number: float, device: torch.device) -> None:
    cache = make_cache((4, 2, 16, 16), SPLIT, device)
    clean = cache.attend([100], [[0, 0]], 8)
    cache.keys[:, :, 104] = number
    out = cache.attend([100], [[0, 0]], 8)
    assert torch.equal(out[:, :, :4], clean[:, :, :4])
    assert out[:, :, 4:].isnan().any()


def test_strided_inputs_are_read_as_they_lie(device: torch.device) -> None:
    cache = make_cache((4, 2, 16, 16), SPLIT, device)
    q, keys, values, *rest = cache.arguments([50], [[0, 0]], 4)
    expected = verify_attention(q, keys, values, *rest)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, keys, values)]
    assert torch.equal(verify_attention(*turned, *rest), expected)
    assert torch.equal(verify_attention(q.mT.contiguous().mT, keys, values, *rest), expected)
