"""`draft_attention` in Triton against its reference: dense and packed regions, lengths per row, heads of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile.compressors.int8 import Int8
from vericache_compile.compressors.kivi import Kivi
from vericache_compile.compressors.quantizer import QuantizedKV, Quantizer
from vericache_compile.compressors.turboquant import TurboQuant
from vericache_compile.kernels.draft_attention import (
    dequantise_reference,
    draft_attention,
    draft_attention_reference,
    region_lefts,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
METHODS = [Kivi(bits=2), Kivi(bits=4), Kivi(bits=2, group=4), Kivi(bits=4, group=64), Int8(), Int8(group=5)]
SIZES = [(20, 40), (32, 64), (16, 16)]
"""Of keys and values: tiles are made of whole groups, or not."""
DEVICE_FIXTURE = [HealthCheck.function_scoped_fixture]


def draw(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def pack(method: Quantizer, tokens: int, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int]) -> Any:
    """A region of two KV heads over `tokens` random tokens."""
    keys, values = (draw(device, dtype, 2, tokens + method.residual, size, seed=size) for size in sizes)
    region = method.compress(keys, values, None)
    assert isinstance(region, QuantizedKV)
    assert region.packed is not None
    return region


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_kernels_view_of_a_region_is_what_the_method_gives(method: Quantizer, dtype: torch.dtype) -> None:
    region = pack(method, 100, torch.device("cpu"), dtype, (20, 40))
    for numbers, side in zip(region.materialize(), region.packed, strict=True):
        assert all(part.is_contiguous() for part in (side.codes, side.scale, side.zero_or_scale))
        torch.testing.assert_close(dequantise_reference(side).to(dtype), numbers, rtol=0, atol=4 * TOLERANCE[dtype])


def test_a_method_without_a_kernel_has_no_packed_form() -> None:
    region = TurboQuant().compress(torch.randn(2, 100, 16), torch.randn(2, 100, 16), None)
    assert region.packed is None


@settings(deadline=None, max_examples=5, suppress_health_check=DEVICE_FIXTURE)
@given(
    heads=st.sampled_from([2, 4, 6]),
    dtype=st.sampled_from(list(TOLERANCE)),
    choice=st.sampled_from([{}, {"reach": 100}, {"soft_cap": 2.0}]),
    data=st.data(),
)
def test_dense_regions_and_tails_equal_a_masked_softmax(
    device: torch.device, heads: int, dtype: torch.dtype, choice: dict[str, Any], data: st.DataObject
) -> None:
    newest = [data.draw(st.integers(0, 599)) for _ in range(2)]
    lefts = [[data.draw(st.integers(0, last)) for _ in range(2)] for last in newest]
    q = draw(device, dtype, 2, heads, 1, 24)
    keys, values = draw(device, dtype, 2, 2, 600, 24, seed=1), draw(device, dtype, 2, 2, 600, 16, seed=2)
    arguments = (q, keys, values, torch.tensor(newest, device=device), torch.tensor(lefts, device=device), 0.2)
    expected = draft_attention_reference(*arguments, **choice)
    torch.testing.assert_close(draft_attention(*arguments, **choice), expected, rtol=0, atol=TOLERANCE[dtype])


@settings(deadline=None, max_examples=10, suppress_health_check=DEVICE_FIXTURE)
@given(
    method=st.sampled_from(METHODS),
    heads=st.sampled_from([2, 6]),
    dtype=st.sampled_from(list(TOLERANCE)),
    tokens=st.lists(st.sampled_from([0, 32, 100, 288]), min_size=2, max_size=2),
    sizes=st.sampled_from(SIZES),
    soft_cap=st.sampled_from([None, 2.0]),
    roomy=st.booleans(),
    data=st.data(),
)
def test_packed_regions_and_tails_equal_dequantising_first(
    device: torch.device,
    method: Quantizer,
    heads: int,
    dtype: torch.dtype,
    tokens: list[int],
    sizes: tuple[int, int],
    soft_cap: float | None,
    roomy: bool,
    data: st.DataObject,
) -> None:
    held = [pack(method, count, device, dtype, sizes) for count in tokens]
    if roomy:
        held[0].leave_room(300)
    regions = [region.packed for region in held]
    newest = torch.tensor([data.draw(st.integers(0, 89)) for _ in range(2)], device=device)
    q = draw(device, dtype, 2, heads, 1, sizes[0])
    keys, values = (draw(device, dtype, 2, 2, 90, size, seed=size) for size in sizes)
    for b, last in enumerate(newest.tolist()):
        keys[b, :, last + 1 :] = values[b, :, last + 1 :] = float("nan")
    lefts = torch.tensor(region_lefts(regions, 2), device=device)
    covered = torch.tensor([side.tokens for side, _ in regions], device=device)
    arguments = (q, keys, values, newest, lefts, 0.3, regions, covered)
    expected = draft_attention_reference(*arguments, soft_cap=soft_cap)
    made = draft_attention(*arguments, soft_cap=soft_cap)
    torch.testing.assert_close(made, expected, rtol=0, atol=2 * TOLERANCE[dtype])


def test_lengths_are_read_on_the_device_at_each_launch(device: torch.device) -> None:
    """The same tensors with other lengths in them: what a replayed graph does."""
    q, keys = draw(device, torch.float32, 1, 2, 1, 16), draw(device, torch.float32, 1, 2, 90, 16, seed=1)
    newest, lefts = torch.tensor([3], device=device), torch.tensor([[0, 0]], device=device)
    arguments = (q, keys, keys, newest, lefts, 0.3)
    before = draft_attention(*arguments)
    newest += 50
    made = draft_attention(*arguments)
    assert not torch.equal(made, before)
    torch.testing.assert_close(made, draft_attention_reference(*arguments), rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", [Kivi(bits=2), Int8()], ids=str)
def test_a_region_that_grows_in_its_room_is_read_by_the_same_launch(device: torch.device, method: Quantizer) -> None:
    """The same tensors, with more tokens in them and other counts: what a replayed graph does."""
    regions = [pack(method, count, device, torch.float32, (16, 16)) for count in (64, 320)]
    for region in regions:
        region.leave_room(300)
    q, keys = draw(device, torch.float32, 2, 4, 1, 16), draw(device, torch.float32, 2, 2, 90, 16, seed=1)
    newest, given = torch.tensor([3, 70], device=device), [region.packed for region in regions]
    lefts = torch.tensor(region_lefts(given, 2), device=device)
    covered = torch.tensor([region.covered for region in regions], device=device)
    arguments = (q, keys, keys, newest, lefts, 0.3, given, covered)
    before = draft_attention(*arguments)
    more = draw(device, torch.float32, 2, 256, 16, seed=2)
    grown = [region.extend(more, more, None) for region in regions]
    lefts.copy_(torch.tensor(region_lefts([region.packed for region in grown], 2)))
    covered += 256
    made = draft_attention(*arguments)
    whole = [region.packed for region in grown]
    places = [[side.codes.data_ptr() for sides in held for side in sides] for held in (given, whole)]
    assert places[0] == places[1]
    torch.testing.assert_close(made, draft_attention_reference(*arguments[:6], whole, covered), rtol=0, atol=4e-6)
    assert not torch.equal(made, before)
