"""RotateKV: the rotation is Walsh and Hadamard's, channels are dealt out, outlier channels cost less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.kivi import quantize_values
from vericache_compile.compressors.rotatekv import RotateKV, block_size, deal, hadamard, turn
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]

CPU = torch.device("cpu")


def fast_transform(numbers: list[float]) -> list[float]:
    """The fast Walsh-Hadamard transform, orthonormal, by butterflies."""
    size, out, step = len(numbers), list(numbers), 1
    while step < size:
        for begin in range(0, size, 2 * step):
            for i in range(begin, begin + step):
                out[i], out[i + step] = out[i] + out[i + step], out[i] - out[i + step]
        step *= 2
    return [number / size**0.5 for number in out]


def naive(x: Tensor, bits: int, group: int) -> Tensor:
    """One token at a time, channels of all heads together."""
    flat = x.transpose(0, 1).flatten(1)
    sizes = flat.abs().mean(0).tolist()
    ranked = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    hand = block_size(len(sizes))
    blocks = len(sizes) // hand
    order = [ranked[place * blocks + block] for block in range(blocks) for place in range(hand)]
    out = torch.empty_like(flat)
    for row, token in zip(out, flat.tolist(), strict=True):
        dealt = [token[channel] for channel in order]
        turned = torch.tensor([y for b in range(blocks) for y in fast_transform(dealt[b * hand : (b + 1) * hand])])
        for part in turned.split(group):
            low, scale = part.min().clone(), (part.max() - part.min()) / (2**bits - 1)
            part.copy_(((part - low) / scale).round() * scale + low)
        back = [y for b in range(blocks) for y in fast_transform(turned[b * hand : (b + 1) * hand].tolist())]
        row[torch.tensor(order)] = torch.tensor(back)
    return out.unflatten(1, (x.shape[0], -1)).transpose(0, 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_numbers_equal_the_naive_loops(random_row: Row, bits: int) -> None:
    keys, values, _ = random_row(68)
    read_keys, read_values = RotateKV(bits=bits, residual=0).compress(keys, values, None).materialize()
    torch.testing.assert_close(read_keys[:, 4:], naive(keys[:, 4:], bits, 32), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read_values[:, 4:], naive(values[:, 4:], bits, 24), atol=1e-4, rtol=1e-4)
    assert torch.equal(read_keys[:, :4], keys[:, :4])


@pytest.mark.parametrize(("channels", "size"), [(192, 64), (32, 32), (24, 8), (5, 1), (1024, 256)])
def test_a_rotation_takes_a_power_of_two_and_undoes_itself(channels: int, size: int) -> None:
    assert block_size(channels) == size
    x = torch.randn(1, 3, channels, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn(turn(x)), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(turn(x)[0, 0, :size], torch.tensor(fast_transform(x[0, 0, :size].tolist())))
    assert torch.equal(hadamard(CPU, size), hadamard(CPU, size).T)


def test_outliers_are_dealt_to_different_blocks() -> None:
    sizes = torch.ones(192)
    sizes[[0, 1, 2]] = 50.0
    order = deal(sizes).tolist()
    assert sorted(order) == list(range(192))
    assert sorted(order.index(channel) // 64 for channel in (0, 1, 2)) == [0, 1, 2]


def test_an_outlier_channel_costs_less_than_without_rotation(random_row: Row) -> None:
    keys, values, _ = random_row(128, size=64)
    keys = keys.clone()
    keys[:, :, 5] *= 8
    method = RotateKV(bits=4, residual=0, sinks=0)
    ours = method.compress(keys, values, None).materialize()[0]
    flat = keys.transpose(0, 1).flatten(1).unsqueeze(0)
    packed = quantize_values(flat, 4, 32, 32)
    theirs = method.decode(packed, packed, (torch.arange(128).view(2, 64),) * 2)  # the shape of the error counts only
    assert theirs[0].shape == keys.shape
    steps = packed.scale.repeat_interleave(32, 2).view(128, 2, 64).transpose(0, 1)
    plain_error = float((steps.square() / 12).sum().sqrt())
    assert float((ours - keys).norm()) < 0.8 * plain_error


def test_later_tokens_are_read_by_the_same_order(random_row: Row) -> None:
    keys, values, _ = random_row(200)
    method = RotateKV(sinks=0)
    region = method.compress(keys[:, :100], values[:, :100], None)
    longer = region.extend(keys[:, 64:170], values[:, 64:170], None)
    assert (region.covered, longer.covered) == (64, 160)
    assert all(map(torch.equal, longer.fit, region.fit))
    assert torch.equal(longer.materialize()[0][:, :64], region.materialize()[0])
    assert float((longer.materialize()[0] - keys[:, :160]).abs().max()) < 0.5


@pytest.mark.parametrize("wrong", [{"bits": 3}, {"group": 0}, {"sinks": -1}, {"residual": -1}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        RotateKV(**wrong)
