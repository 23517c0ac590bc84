"""C functions are called at once, or recorded and then called again and again."""

from __future__ import annotations

import ctypes
from threading import Thread

import pytest
import torch

from vericache_compile import ops
from vericache_compile.kernels import block_attention, native
from vericache_compile.kernels.calls import MOST, Calls, NotRecordedError, recording
from vericache_compile.kernels.draft_step import begin_step, end_step, write_rows
from vericache_compile.kernels.int8_linear import quantize

pytestmark = pytest.mark.skipif(native.load() is None, reason="no C++ compiler")


def whole(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def test_what_is_recorded_runs_when_it_is_replayed_on_what_lies_there_then() -> None:
    x, weight = torch.zeros(1, 64), torch.randn(16, 64)
    codes, scales = quantize(weight)
    same = torch.eye(16)
    with Calls() as calls:
        [made] = ops.INT8_LINEAR(x, [codes], [scales], [16])
        again = ops.LINEAR(made, same, None)
    for _ in range(3):
        x.normal_()
        calls.replay()
        [expected] = ops.INT8_LINEAR(x, [codes], [scales], [16])
        assert torch.equal(made, expected)
        assert torch.equal(again, expected)


def test_attention_and_steps_read_places_when_they_run() -> None:
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16)
    keys, values = torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    columns, positions, lefts = whole(5, 280), whole(5, 280).view(2, 1), whole(0, 2, 3, 0).view(2, 2)
    shifts, places, shown = whole(1, 2, 0, 1).view(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), positions.clone()
    tokens, drafted, place = whole(0, 0).view(2, 1), torch.zeros(4, 2, dtype=torch.int64), whole(0)
    forced, first, token = torch.tensor([[False], [True]]), whole(7, 8).view(2, 1), whole(11, 12).view(2, 1)
    with Calls() as calls:
        begin_step(columns, shifts, positions, 281, places, shown)
        write_rows(k, keys, places[0, 0])
        made = block_attention.attend_at(q, keys, values, places[0, 0], lefts, 0.25)
        end_step(token, forced, first, tokens, drafted, place, positions, columns)
    assert columns.tolist() == [5, 280], "nothing has run"
    for step in range(2):
        was = keys.clone()
        calls.replay()
        at = [6 + step, 282 + step]
        for b in range(2):
            was[b, :, at[b]] = k[b, :, 0]
        assert torch.equal(keys, was)
        assert torch.equal(made, block_attention.attend(q, keys, values, at, lefts.tolist(), 0.25))
    assert (columns.tolist(), positions.tolist()) == ([7, 282], [[7], [282]])
    assert shown.tolist() == [[6], [280]], "below the limit"
    assert places[0].tolist() == [[7, 283], [6, 282]]
    assert (tokens.tolist(), drafted.tolist()) == ([[11], [8]], [[0, 0], [11, 8], [11, 8], [0, 0]])


@pytest.mark.parametrize("inference", [False, True])
def test_what_torch_computes_is_refused(inference: bool) -> None:
    """In inference mode, too, where torch calls a copy a view."""
    x, weight = torch.zeros(40, 64), torch.randn(16, 64)
    codes, scales = quantize(weight)
    place = whole(0)
    other, rows = torch.randn(16, 40), torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    for compute in (
        lambda: x + 1,
        lambda: x.t().contiguous(),
        lambda: x.to(torch.float64),
        lambda: x.t().reshape(-1),
        lambda: write_rows(rows, x.view(1, 1, 40, 64), place),
        lambda: ops.INT8_LINEAR(x.t()[:, :32], [codes[:, :32]], [scales[:, :1]], [16]),
        lambda: ops.LINEAR(x.t(), other, None),
        lambda: x[0, 0].item(),
    ):
        with torch.inference_mode(inference), pytest.raises(NotRecordedError, match="is torch's"), Calls():
            compute()
        assert recording() is None
    with torch.inference_mode(inference), Calls():
        assert x.view(-1)[3:].view(-1, 1).t().new_empty(4).shape == (4,), "room and views are no computation"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_read_how_many_tokens_there_are_when_they_run(dtype: torch.dtype) -> None:
    """By our kernel, and by oneDNN, which recordings call through Python."""
    x, weight, bias = torch.zeros(8, 3, 64, dtype=dtype), torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    wanted = (ctypes.c_int64 * 1)(8)
    ops.LINEAR(x, weight, bias)  # what a CPU can is asked once
    before = ops.WANTED.set(wanted)
    try:
        with Calls() as calls:
            made = ops.LINEAR(x, weight, bias, True)
    finally:
        ops.WANTED.reset(before)
    for count in (8, 1, 5):
        x.normal_()
        wanted[0] = count
        calls.replay()
        assert torch.equal(made[:count], ops.LINEAR(x, weight, bias)[:count])
        assert torch.equal(made[count:], made[:1].expand_as(made[count:])), "harmless beyond"


def test_a_function_has_no_more_arguments_than_can_be_passed() -> None:
    with pytest.raises(NotRecordedError, match=f"a function of {MOST + 1} arguments"), Calls() as calls:
        calls.add(0, [0] * (MOST + 1))


@pytest.mark.parametrize("count", [0, 1, 6, 7, 50, MOST])
def test_every_number_of_arguments_arrives(count: int) -> None:
    seen: list[tuple[int, ...]] = []
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * count)(lambda *given: seen.append(given))
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    numbers = [(1 << 40) + i for i in range(count)]
    with Calls() as calls:
        calls.add(address, numbers, held=function)
    calls.replay()
    calls.replay()
    assert seen == [tuple(numbers)] * 2


def test_rows_take_the_type_of_their_buffer() -> None:
    """As under autocast, which makes keys and values of another type than the cache's."""
    buffer, row = torch.zeros(2, 1, 8, 16), torch.randn(2, 1, 1, 16).bfloat16()
    write_rows(row, buffer, whole(3, 5))
    expected = torch.zeros(2, 1, 8, 16)
    expected[0, :, 3], expected[1, :, 5] = row[0, :, 0].float(), row[1, :, 0].float()
    assert torch.equal(buffer, expected)
    with pytest.raises(AssertionError, match="a row per row"):
        write_rows(row[..., :8].float(), buffer, whole(3, 5))


def test_other_threads_call_while_one_records() -> None:
    columns = [whole(1), whole(1)]

    def step(columns: torch.Tensor) -> None:
        end_step(*(whole(0).view(1, 1) for _ in range(4)), torch.zeros(2, 1).long(), whole(0), whole(0), columns)

    with Calls() as calls:
        thread = Thread(target=step, args=(columns[0],))
        thread.start()
        thread.join()
        place, drafted = torch.empty(1, dtype=torch.int64), torch.empty((2, 1), dtype=torch.int64)
        given = torch.empty((1, 1), dtype=torch.int64)
        end_step(given, given, given, given, drafted, place, given, columns[1])
    assert [int(each) for each in columns] == [2, 1]
    place.zero_()
    calls.replay()
    assert int(columns[1]) == 2
