"""PackKV: no number is off by more than half a step, the packing loses nothing, alike tokens take fewer bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.packkv import PackKV, block_order, round_tokens
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def naive_codes(x: Tensor, share: float) -> list[list[list[int]]]:
    """Codes [K][S][D], one token at a time."""
    made = []
    for head in x.tolist():
        tokens = []
        for token in head:
            low, step = min(token), (max(token) - min(token)) * share
            tokens.append([round((number - low) / step) for number in token])
        made.append(tokens)
    return made


def naive_bits(codes: list[list[int]]) -> int:
    """Bits of the codes [S][D] of one head: per 16 tokens and channel as many as the range takes, and a byte."""
    total = 0
    for begin in range(0, len(codes), 16):
        for channel in zip(*codes[begin : begin + 16], strict=True):
            total += 16 * (max(channel) - min(channel)).bit_length() + 8
    return total


def test_numbers_and_order_equal_the_naive_loops(random_row: Row) -> None:
    keys, values, _ = random_row(128)
    region = PackKV(residual=0).compress(keys, values, None)
    read_keys, read_values = region.materialize()
    codes = {0.1: naive_codes(keys, 0.1), 0.2: naive_codes(values, 0.2)}
    bits = 0
    for head in range(2):
        order: list[int] = []
        for begin in (0, 64):
            medians = [sorted(token)[(len(token) - 1) // 2] for token in codes[0.2][head][begin : begin + 64]]
            order += sorted(range(begin, begin + 64), key=lambda i, m=medians, b=begin: m[i - b])  # type: ignore[misc]
        for real, read, share in ((keys, read_keys, 0.1), (values, read_values, 0.2)):
            for slot, token in enumerate(order):
                low, high = real[head, token].min(), real[head, token].max()
                expected = torch.tensor(codes[share][head][token]) * (high - low) * share + low
                torch.testing.assert_close(read[head, slot], expected, atol=1e-5, rtol=1e-5)
            bits += naive_bits([codes[share][head][token] for token in order])
    assert region.nbytes == bits // 8 + 2 * 2 * 2 * 128 * 4  # and a step and a low per vector, 4 bytes each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_number_is_off_by_more_than_half_a_step(random_row: Row, dtype: torch.dtype) -> None:
    keys, values, _ = random_row(192, dtype=dtype)
    region = PackKV(residual=0).compress(keys, values, None)
    order = block_order(round_tokens(values, 0.2)[0]).unsqueeze(2)
    for real, read, share in zip((keys, values), region.materialize(), (0.1, 0.2), strict=True):
        real = real.take_along_dim(order, 1).float()
        spread = real.amax(2, keepdim=True) - real.amin(2, keepdim=True)
        rounding = 12 * torch.finfo(dtype).eps * real.abs().amax(2, keepdim=True)
        assert ((read.float() - real).abs() <= share / 2 * spread + rounding).all()


def test_keys_and_values_of_a_token_stay_together(random_row: Row) -> None:
    keys, values, _ = random_row(64)
    values[..., 0] = keys[..., 0]
    keys[..., 1:], values[..., 1:] = keys[..., 1:].clamp(-0.1, 0.1), values[..., 1:].clamp(-0.1, 0.1)
    read_keys, read_values = PackKV(residual=0).compress(keys, values, None).materialize()
    assert float((read_keys[..., 0] - read_values[..., 0]).abs().max()) < 0.5
    torch.testing.assert_close(read_keys[..., 0].sort(1).values, keys[..., 0].sort(1).values, atol=0.2, rtol=0)


def test_tokens_that_are_alike_take_fewer_bits(random_row: Row) -> None:
    keys, values, _ = random_row(64)
    same = keys[:, :1].expand(-1, 64, -1), values[:, :1].expand(-1, 64, -1)
    loose, tight = (PackKV(residual=0).compress(*row, None) for row in ((keys, values), same))
    assert tight.keys[0].numel() == tight.values[0].numel() == 0
    assert loose.keys[0].numel() > 0
    torch.testing.assert_close(tight.materialize()[0], same[0], atol=0.3, rtol=0)


def test_extending_gives_the_bytes_that_quantising_at_once_gives(random_row: Row) -> None:
    keys, values, _ = random_row(240)
    method = PackKV()
    region = method.compress(keys[:, :100], values[:, :100], None)
    longer = region.extend(keys[:, 64:200], values[:, 64:200], None)
    whole = method.compress(keys[:, :230], values[:, :230], None)
    assert (region.covered, longer.covered, whole.covered) == (64, 192, 192)
    for mine, theirs in zip((*longer.keys, *longer.values), (*whole.keys, *whole.values), strict=True):
        assert torch.equal(mine, theirs)


def test_a_number_that_is_not_finite_spoils_its_token_only(random_row: Row) -> None:
    keys, values, _ = random_row(64)
    keys[1, 40, 3] = float("nan")
    read, _ = PackKV(residual=0).compress(keys, values, None).materialize()
    spoilt = read.isnan().any(2)
    assert spoilt.sum() == 1
    assert read[~spoilt].isfinite().all()


@pytest.mark.parametrize("wrong", [{"key_step": 0.05}, {"value_step": 1.5}, {"residual": -1}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        PackKV(**wrong)  # type: ignore[arg-type]
