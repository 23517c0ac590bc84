"""`row_invariant_linear`, in Triton and in C++: right, and a row's bits a function of that row alone."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile import ops
from vericache_compile.kernels import row_invariant_linear as kernel
from vericache_compile.kernels.row_invariant_linear import (
    costs_by_row,
    is_row_invariant,
    row_invariant_by_head,
    row_invariant_linear,
    row_invariant_linear_reference,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DEVICE_FIXTURE = [HealthCheck.function_scoped_fixture]


def draw(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@settings(deadline=None, max_examples=25, suppress_health_check=DEVICE_FIXTURE)
@given(
    leading=st.sampled_from([(1,), (5,), (2, 3), (16, 2, 1), (33,)]),
    size=st.sampled_from([1, 24, 64, 70, 200]),
    outs=st.sampled_from([1, 32, 45]),
    dtype=st.sampled_from(list(TOLERANCE)),
    biased=st.booleans(),
    turned=st.booleans(),
)
def test_products_equal_those_in_float32(
    device: torch.device,
    leading: tuple[int, ...],
    size: int,
    outs: int,
    dtype: torch.dtype,
    biased: bool,
    turned: bool,
) -> None:
    x = draw(device, dtype, *leading, size)
    weight = draw(device, dtype, size, outs, seed=1).t() if turned else draw(device, dtype, outs, size, seed=1)
    bias = draw(device, dtype, outs, seed=2) if biased else None
    made = row_invariant_linear(x, weight, bias)
    assert made.shape == (*leading, outs)
    assert made.is_contiguous()
    expected = row_invariant_linear_reference(x, weight, bias)
    torch.testing.assert_close(made, expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_rows_bits_do_not_depend_on_its_place_or_on_the_others(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = draw(device, dtype, 48, 200), draw(device, dtype, 45, 200, seed=1)
    made = row_invariant_linear(x, weight, None)
    for rows in (1, 2, 5, 16, 17, 48):
        places = torch.randperm(48, generator=torch.Generator().manual_seed(rows))[:rows]
        assert torch.equal(row_invariant_linear(x[places], weight, None), made[places]), rows
        others = draw(device, dtype, rows, 200, seed=3)
        others[-1] = x[0]
        assert torch.equal(row_invariant_linear(others, weight, None)[-1], made[0]), rows


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_each_heads_rows_have_their_own_weight(dtype: torch.dtype, turned: bool, device: torch.device) -> None:
    x = draw(device, dtype, 20, 5, 3, 70).transpose(1, 2)[:, :, 2]
    weight = draw(device, dtype, 3, 45, 70, seed=1)
    weight = weight.mT.contiguous().mT if turned else weight
    made = row_invariant_by_head(x, weight)
    for head in range(3):
        assert torch.equal(made[:, head], row_invariant_linear(x[:, head], weight[head], None)), head
    assert torch.equal(ops.heads_mm(x, weight.mT), made), "the canonical operator takes it"


def test_strided_rows_are_read_as_they_lie(device: torch.device) -> None:
    x, weight = draw(device, torch.float32, 6, 80), draw(device, torch.float32, 20, 40, seed=1)
    for view in (x[:, :40], x[:, ::2], x.t()[:40].t()):
        made = row_invariant_linear(view, weight, None)
        assert torch.equal(made, row_invariant_linear(view.contiguous(), weight, None))


def test_the_canonical_operator_takes_it_where_it_serves(device: torch.device) -> None:
    x, weight = draw(device, torch.float32, 4, 2, 40), draw(device, torch.float32, 20, 40, seed=1)
    assert is_row_invariant(weight)
    assert not is_row_invariant(weight.to(torch.float64))
    assert torch.equal(ops.LINEAR(x, weight, None), row_invariant_linear(x, weight, None))


CPU = torch.device("cpu")


@patch.object(kernel, "multiplies_bfloat16", lambda: False)
@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 150),
    size=st.sampled_from([1, 7, 16, 24, 70, 1100]),
    outs=st.sampled_from([1, 3, 32, 45]),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_on_the_cpu_a_row_is_a_function_of_itself(
    rows: int, size: int, outs: int, biased: bool, dtype: torch.dtype, threads: int, data: st.DataObject
) -> None:
    """Right against float64, and the same bits among any others, by any number of threads."""
    x, weight = draw(CPU, dtype, rows, size), draw(CPU, dtype, outs, size, seed=1)
    bias = draw(CPU, dtype, outs, seed=2) if biased else None
    before = torch.get_num_threads()
    made = row_invariant_linear(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    near = {"rtol": 1e-5, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2**-8, "atol": 1e-4}
    torch.testing.assert_close(made.double(), expected, **near)
    places = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20))
    torch.set_num_threads(threads)
    try:
        assert torch.equal(row_invariant_linear(x[places], weight, bias), made[places])
    finally:
        torch.set_num_threads(before)
    others = torch.full((rows + 1, size), float("nan"), dtype=dtype)
    others[rows // 2] = x[0]
    assert torch.equal(row_invariant_linear(others, weight, bias)[rows // 2], made[0])


def test_the_cpu_takes_weights_as_they_lie_in_a_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bfloat16 where oneDNN does not."""
    weight = torch.zeros(4, 6)
    assert is_row_invariant(weight)
    assert costs_by_row(weight)
    for other in (weight.t(), weight.half(), weight.double(), weight[:, :3], weight[None]):
        assert not is_row_invariant(other)
    for there in (True, False):
        monkeypatch.setattr(kernel, "multiplies_bfloat16", lambda there=there: there)
        assert costs_by_row(weight.bfloat16()) is not there


def test_what_does_not_fit_is_not_read() -> None:
    x, weight = torch.zeros(4, 6), torch.zeros(5, 6)
    for odd in ((x[:, :3], weight, None), (x, weight, torch.zeros(1)), (x, weight, torch.zeros(5).double())):
        with pytest.raises(AssertionError):
            row_invariant_linear(*odd)
    assert torch.equal(row_invariant_linear(x[:0], weight, None), torch.zeros(0, 5))
    assert torch.equal(row_invariant_linear(x[:, :0], weight[:, :0].contiguous(), torch.ones(5)), torch.ones(4, 5))


@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_of_a_window_only_what_is_wanted_is_computed(wanted: int) -> None:
    """The rows that are wanted have the bits that they have among all; the others are the first one's."""
    x, weight = draw(CPU, torch.float32, 5, 3, 1, 40), draw(CPU, torch.float32, 20, 40, seed=1)
    whole = ops.LINEAR(x, weight, None, True)
    token = ops.WANTED.set(wanted)
    try:
        made, other = ops.LINEAR(x, weight, None, True), ops.LINEAR(x, weight, None)
    finally:
        ops.WANTED.reset(token)
    assert torch.equal(made[:wanted], whole[:wanted])
    assert torch.equal(made[wanted:], whole[:1].expand_as(whole[wanted:]))
    assert torch.equal(other, whole), "rows that are no window's"
