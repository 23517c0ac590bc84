"""int8 and fp8 against their formula, one group at a time; the error is half a step of the group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile.compressors.fp8 import Fp8
from vericache_compile.compressors.int8 import Int8
from vericache_compile.compressors.rounding import ByteQuantizer
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]
METHODS = pytest.mark.parametrize("kind", [Int8, Fp8])


def naive(x: Tensor, kind: type[ByteQuantizer], channels: int) -> Tensor:
    out = torch.empty_like(x)
    for head in range(x.shape[0]):
        for token in range(x.shape[1]):
            for start in range(0, x.shape[2], channels):
                group = x[head, token, start : start + channels]
                scale = max(abs(float(number)) for number in group) / kind.largest
                steps = [float(number) / scale for number in group]
                if kind is Int8:
                    codes = [float(round(step)) for step in steps]
                else:
                    codes = [nearest_fp8(step) for step in steps]
                out[head, token, start : start + channels] = torch.tensor([code * scale for code in codes])
    return out


def fp8_numbers() -> list[float]:
    """All finite numbers of e4m3: sign, 4 bits of exponent with bias 7, 3 of mantissa; the last code is NaN."""
    numbers = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    numbers += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return numbers + [-number for number in numbers]


def nearest_fp8(step: float) -> float:
    return min(fp8_numbers(), key=lambda number: abs(number - step))


@METHODS
def test_numbers_equal_the_naive_loops(random_row: Row, kind: type[ByteQuantizer]) -> None:
    keys, values, _ = random_row(6, size=16, value_size=12)
    region = kind(group=8).compress(keys, values, None)
    assert region.covered == region.slots == 6
    torch.testing.assert_close(region.materialize()[0], naive(keys, kind, 8), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(region.materialize()[1], naive(values, kind, 6), atol=1e-5, rtol=1e-5)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), spread=st.floats(1e-2, 100.0))
def test_the_error_is_small(
    random_row: Row, kind: type[ByteQuantizer], dtype: torch.dtype, seed: int, spread: float
) -> None:
    keys, values, _ = random_row(20, size=32, seed=seed)
    keys = (keys * spread).to(dtype)
    read, _ = kind().compress(keys, values, None).materialize()
    assert read.dtype == dtype
    step = keys.double().abs().amax(2, keepdim=True) / kind.largest
    half = step / 2 if kind is Int8 else torch.maximum(keys.double().abs() / 16, step * 2**-9)
    rounding = 4 * torch.finfo(dtype).eps * keys.double().abs().amax(2, keepdim=True)
    assert ((read.double() - keys.double()).abs() <= half + rounding).all()


@METHODS
def test_bytes_are_a_byte_a_number_and_the_scales(random_row: Row, kind: type[ByteQuantizer]) -> None:
    keys, values, _ = random_row(10, size=64, value_size=64, dtype=torch.bfloat16)
    assert kind().compress(keys, values, None).nbytes == 2 * 2 * 10 * (64 + 2 * 2)


@METHODS
def test_extending_gives_the_bytes_that_quantising_at_once_gives(random_row: Row, kind: type[ByteQuantizer]) -> None:
    keys, values, _ = random_row(30)
    region = kind().compress(keys[:, :11], values[:, :11], None).extend(keys[:, 11:], values[:, 11:], None)
    whole = kind().compress(keys, values, None)
    assert region.covered == whole.covered == 30
    assert all(map(torch.equal, region.materialize(), whole.materialize()))


@METHODS
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_spoils_only_its_group(
    random_row: Row, kind: type[ByteQuantizer], poison: float
) -> None:
    keys, values, _ = random_row(8, size=16)
    keys[1, 3, 2], keys[0, 0] = poison, 0.0
    read, _ = kind(group=8).compress(keys, values, None).materialize()
    assert not read[1, 3, :8].isfinite().any()
    read[1, 3, :8] = 0
    assert read.isfinite().all()
    assert not read[0, 0].any()


@METHODS
def test_the_residual_stays_exact(random_row: Row, kind: type[ByteQuantizer]) -> None:
    keys, values, _ = random_row(40)
    assert kind(residual=32).compress(keys, values, None).covered == 8
    assert kind(residual=50).compress(keys, values, None).covered == 0


@METHODS
@pytest.mark.parametrize("wrong", [{"group": 0}, {"residual": -1}])
def test_values_out_of_range_are_option_errors(kind: type[ByteQuantizer], wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        kind(**wrong)
