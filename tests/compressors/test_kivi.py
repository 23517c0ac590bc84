"""KIVI: the packing loses nothing, and the quantisation no more than half a step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile.compressors.kivi import Kivi, dequantize_keys, dequantize_values
from vericache_compile.compressors.quantizer import channel_group, pack, unpack
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def naive_group(numbers: Tensor, bits: int) -> Tensor:
    """One group, quantised and read back."""
    low, high = numbers.min(), numbers.max()
    scale = (high - low) / (2**bits - 1)
    return torch.stack([((x - low) / scale).round() * scale + low for x in numbers])


def naive_keys(keys: Tensor, bits: int, group: int) -> Tensor:
    out = torch.empty_like(keys)
    for head in range(keys.shape[0]):
        for start in range(0, keys.shape[1], group):
            for channel in range(keys.shape[2]):
                numbers = keys[head, start : start + group, channel]
                out[head, start : start + group, channel] = naive_group(numbers, bits)
    return out


def naive_values(values: Tensor, bits: int, channels: int) -> Tensor:
    out = torch.empty_like(values)
    for head in range(values.shape[0]):
        for token in range(values.shape[1]):
            for start in range(0, values.shape[2], channels):
                numbers = values[head, token, start : start + channels]
                out[head, token, start : start + channels] = naive_group(numbers, bits)
    return out


def error_bound(low: Tensor, high: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Half a step, plus what is lost by rounding the scale, the product and the sum to the scale's dtype."""
    kind, scale = torch.finfo(scale.dtype), scale.double()
    exact, levels = (high - low).double() / (2**bits - 1), 2**bits - 1
    rounding = kind.eps * (levels * scale + low.abs().double() + high.abs().double())
    return scale / 2 + levels * (exact - scale).abs() + rounding + kind.smallest_normal


@pytest.mark.parametrize("bits", [2, 4])
def test_numbers_equal_the_naive_loops(random_row: Row, bits: int) -> None:
    keys, values, _ = random_row(64, size=5, value_size=12)
    region = Kivi(bits=bits, group=16, residual=0).compress(keys, values, None)
    read_keys, read_values = region.materialize()
    torch.testing.assert_close(read_keys, naive_keys(keys, bits, group=16))
    torch.testing.assert_close(read_values, naive_values(values, bits, channels=12))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), spread=st.floats(1e-3, 100.0), shift=st.floats(-50.0, 50.0))
def test_the_error_is_at_most_half_a_step(
    random_row: Row, dtype: torch.dtype, bits: int, seed: int, spread: float, shift: float
) -> None:
    keys, values, _ = random_row(64, size=6, value_size=40, seed=seed)
    keys, values = (keys * spread + shift).to(dtype), (values * spread + shift).to(dtype)
    region = Kivi(bits=bits, residual=0).compress(keys, values, None)
    read_keys, read_values = region.materialize()
    assert read_keys.dtype == read_values.dtype == dtype

    groups = keys.unflatten(1, (2, 32))
    bound = error_bound(groups.amin(2), groups.amax(2), region.keys.scale, bits)
    assert ((read_keys.double() - keys.double()).unflatten(1, (2, 32)).abs() <= bound.unsqueeze(2)).all()

    groups = values.unflatten(2, (2, 20))
    bound = error_bound(groups.amin(3), groups.amax(3), region.values.scale, bits)
    assert ((read_values.double() - values.double()).unflatten(2, (2, 20)).abs() <= bound.unsqueeze(3)).all()


@settings(deadline=None)
@given(bits=st.sampled_from([2, 4]), groups=st.integers(0, 3), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_packing_there_and_back_is_exact(bits: int, groups: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, groups, 32, size), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, groups, 4 * bits, size)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)


def test_a_byte_holds_tokens_that_lie_apart_in_the_group() -> None:
    four_bits = torch.tensor([1, 2, 3, 4], dtype=torch.uint8).view(1, 1, 4, 1)
    assert pack(four_bits, 4).flatten().tolist() == [0x31, 0x42]
    two_bits = torch.tensor([0, 1, 2, 3], dtype=torch.uint8).view(1, 1, 4, 1)
    assert pack(two_bits, 2).flatten().tolist() == [0b11_10_01_00]


@settings(deadline=None)
@given(tokens=st.integers(0, 140), more=st.integers(0, 100), bits=st.sampled_from([2, 4]))
def test_only_whole_groups_before_the_residual_are_covered(random_row: Row, tokens: int, more: int, bits: int) -> None:
    keys, values, _ = random_row(tokens)
    region = Kivi(bits=bits).compress(keys, values, None)
    assert region.covered == region.slots == max((tokens - 32) // 32, 0) * 32
    assert region.materialize()[0].shape == (2, region.covered, 16)
    assert region.materialize()[1].shape == (2, region.covered, 12)

    chunk, chunk_values, _ = random_row(more, seed=1)
    longer = region.extend(chunk, chunk_values, None)
    assert longer.covered == longer.slots == region.covered + more // 32 * 32


@pytest.mark.parametrize("bits", [2, 4])
def test_extending_gives_the_bytes_that_quantising_at_once_gives(random_row: Row, bits: int) -> None:
    keys, values, _ = random_row(160)
    method = Kivi(bits=bits)
    region = method.compress(keys[:, :100], values[:, :100], None)
    longer = region.extend(keys[:, 64:150], values[:, 64:150], None)
    whole = method.compress(keys, values, None)
    assert (region.covered, longer.covered, whole.covered) == (64, 128, 128)
    for mine, theirs in zip((*longer.keys, *longer.values), (*whole.keys, *whole.values), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("bits", "expected"), [(4, 2.0), (2, 1.0)])
def test_four_bits_take_half_a_byte_and_two_a_quarter(random_row: Row, bits: int, expected: float) -> None:
    keys, values, _ = random_row(128, size=32, value_size=32, dtype=torch.float16)
    region = Kivi(bits=bits, residual=0).compress(keys, values, None)
    codes = region.keys.packed.nbytes + region.values.packed.nbytes
    assert codes == 2 * 128 * 32 * bits * 2 // 8
    assert region.nbytes == codes + 4 * (2 * 4 * 32) * 2  # scale and zero of keys and values, 2 bytes each


@pytest.mark.parametrize(("channels", "expected"), [(64, 32), (32, 32), (80, 20), (12, 12), (7, 7), (37, 1), (1, 1)])
def test_value_groups_divide_the_head(channels: int, expected: int) -> None:
    assert channel_group(channels, 32) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_constant_group_is_exact(bits: int, dtype: torch.dtype) -> None:
    row = torch.full((1, 32, 8), 0.3, dtype=dtype)
    region = Kivi(bits=bits, residual=0).compress(row, row, None)
    assert torch.equal(region.materialize()[0], row)
    assert torch.equal(region.materialize()[1], row)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_number_that_is_not_finite_spoils_only_its_group(random_row: Row, bits: int, poison: float) -> None:
    keys, values, _ = random_row(64)
    method = Kivi(bits=bits, residual=0)
    clean_keys, clean_values = method.compress(keys, values, None).materialize()
    keys[1, 40, 3], values[0, 5, 2] = poison, poison

    read_keys, read_values = method.compress(keys, values, None).materialize()

    assert not read_keys[1, 40, 3].isfinite()
    assert not read_values[0, 5, 2].isfinite()
    spoilt_keys, spoilt_values = torch.zeros_like(keys).bool(), torch.zeros_like(values).bool()
    spoilt_keys[1, 32:, 3], spoilt_values[0, 5] = True, True
    assert torch.equal(read_keys[~spoilt_keys], clean_keys[~spoilt_keys])
    assert torch.equal(read_values[~spoilt_values], clean_values[~spoilt_values])


@pytest.mark.parametrize("bits", [2, 4])
def test_dequantisation_is_captured_whole(random_row: Row, bits: int) -> None:
    keys, values, _ = random_row(96)
    region = Kivi(bits=bits).compress(keys, values, None)
    for function, packed in ((dequantize_keys, region.keys), (dequantize_values, region.values)):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert torch.equal(compiled(*packed, bits), function(*packed, bits))


@pytest.mark.parametrize(
    "wrong", [{"bits": 3}, {"bits": 8}, {"bits": 4.0}, {"group": 0}, {"group": 3}, {"residual": -1}]
)
def test_values_out_of_range_are_option_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Kivi(**wrong)
