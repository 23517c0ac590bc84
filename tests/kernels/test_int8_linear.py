"""Products with int8 copies of weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile import ops
from vericache_compile.kernels.int8_linear import int8_linear, int8_linear_reference, quantize, serves

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not serves(CPU), reason="no C++ compiler")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 35),
    size=st.sampled_from([1, 31, 32, 33, 100, 256]),
    outs=st.lists(st.sampled_from([1, 15, 16, 17, 64]), min_size=1, max_size=3),
)
def test_products_are_those_of_codes_times_scales(rows: int, size: int, outs: list[int]) -> None:
    x, weights = draw(rows, size), [draw(count, size, seed=i) for i, count in enumerate(outs)]
    codes, scales = zip(*map(quantize, weights), strict=True)
    made = int8_linear(x, codes, scales, outs)
    expected = int8_linear_reference(x, codes, scales, outs)
    for own, right, weight in zip(made, expected, weights, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-4)
        step = weight.abs().amax(1) / 127  # an error of half a step per input, of numbers around 1
        assert bool(((own - x @ weight.t()).abs() <= 4 * step * size**0.5 + 1e-5).all())


def test_codes_are_the_nearest_and_outputs_of_zeros_stay_zero() -> None:
    weight = draw(20, 70) * torch.rand(20, 1)
    weight[3].zero_()
    codes, scales = quantize(weight)
    assert (codes.dtype, codes.shape) == (torch.int8, (2, 96, 16))
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (2, 3, 16))
    [read] = int8_linear_reference(torch.eye(70), [codes], [scales], [20])
    groups = torch.nn.functional.pad(weight, (0, 26)).view(20, 3, 32)
    step = (groups.abs().amax(-1, keepdim=True) / 127).expand(-1, -1, 32).flatten(1)[:, :70]
    assert bool(((read.t() - weight).abs() <= step * 0.51).all())
    assert not read[:, 3].any()


def test_rows_are_multiplied_alike_however_many_there_are() -> None:
    weight = draw(45, 200)
    codes, scales = quantize(weight)
    x = draw(23, 200, seed=1)
    [whole] = int8_linear(x, [codes], [scales], [45])
    for rows in (slice(0, 1), slice(3, 5), slice(4, 12), slice(7, 23)):
        [part] = int8_linear(x[rows], [codes], [scales], [45])
        torch.testing.assert_close(part, whole[rows], rtol=1e-5, atol=1e-5)


def test_rows_with_gaps_are_read_where_they_lie() -> None:
    codes, scales = quantize(draw(16, 64))
    x = draw(64, 6, seed=1).t()
    assert torch.equal(
        int8_linear(x, [codes], [scales], [16])[0], int8_linear(x.contiguous(), [codes], [scales], [16])[0]
    )


def test_the_operator_is_the_kernel() -> None:
    codes, scales = quantize(draw(48, 64))
    x = draw(3, 64, seed=1)
    [made] = ops.INT8_LINEAR(x, [codes], [scales], [48])
    assert torch.equal(made, int8_linear(x, [codes], [scales], [48])[0])
    torch.library.opcheck(ops.INT8_LINEAR, (x, [codes, codes], [scales, scales], [48, 48]))
