"""GEAR: outliers are exact, the low-rank part is near the best there is, and both make the error smaller."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.gear import Gear, low_rank, start
from vericache_compile.compressors.kivi import Kivi
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]

CPU = torch.device("cpu")


def naive_group(numbers: Tensor, bits: int) -> Tensor:
    low, high = numbers.min(), numbers.max()
    scale = (high - low) / (2**bits - 1)
    return torch.stack([((x - low) / scale).round() * scale + low for x in numbers])


def ends(numbers: Tensor, count: int) -> Tensor:
    """Places of the `count` smallest and largest numbers of a vector."""
    order = numbers.argsort()
    return torch.cat([order[:count], order[-count:]])


def naive_vector(numbers: Tensor, bits: int, group: int, count: int) -> Tensor:
    """One vector: its `count` largest and smallest apart, the rest quantised in groups with the mean in their place."""
    apart = ends(numbers, count)
    plain = numbers.clone()
    plain[apart] = numbers.mean()
    read = torch.cat([naive_group(part, bits) for part in plain.split(group)])
    read[apart] = numbers[apart]
    return read


def naive_low_rank(error: Tensor, rank: int, seed: int) -> Tensor:
    """Algorithm 2, for one head and block [b, D]."""
    right = start(CPU, error.shape[1], rank, seed)
    for turn in range(3):
        if turn == 2:
            right = torch.linalg.qr(right).Q
        left = error @ right
        if turn == 2:
            left = torch.linalg.qr(left).Q
        right = error.T @ left
    return left @ right.T


def naive(x: Tensor, bits: int, seed: int, *, per_channel: bool) -> Tensor:
    out = torch.empty_like(x)
    for head in range(x.shape[0]):
        for begin in range(0, x.shape[1], 128):
            block = x[head, begin : begin + 128]
            if per_channel:
                read = torch.stack([naive_vector(column, bits, 32, 1) for column in block.T], dim=1)
            else:
                read = torch.stack([naive_vector(token, bits, len(token), 1) for token in block])
            made = read + naive_low_rank(block - read, 2, seed)
            for mine, numbers in zip(*((made.T, block.T) if per_channel else (made, block)), strict=True):
                mine[ends(numbers, 1)] = numbers[ends(numbers, 1)]
            out[head, begin : begin + 128] = made
    return out


@pytest.mark.parametrize("bits", [2, 4])
def test_numbers_equal_the_naive_loops(random_row: Row, bits: int) -> None:
    keys, values, _ = random_row(256)
    read_keys, read_values = Gear(bits=bits, residual=0, seed=5).compress(keys, values, None).materialize()
    torch.testing.assert_close(read_keys, naive(keys, bits, 5, per_channel=True), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read_values, naive(values, bits, 5, per_channel=False), atol=1e-4, rtol=1e-4)


def test_outliers_are_exact(random_row: Row) -> None:
    keys, values, _ = random_row(128)
    read_keys, read_values = Gear(bits=2, residual=0).compress(keys, values, None).materialize()
    for read, x, dim in ((read_keys, keys, 1), (read_values, values, 2)):
        for places in (x.argmax(dim, keepdim=True), x.argmin(dim, keepdim=True)):
            assert torch.equal(read.gather(dim, places), x.gather(dim, places))


def test_an_outlier_costs_its_neighbours_nothing(random_row: Row) -> None:
    keys, values, _ = random_row(128)
    keys[0, 7, 3], values[1, 9, 2] = 1000.0, -1000.0
    read_keys, read_values = Gear(bits=2, residual=0).compress(keys, values, None).materialize()
    assert float((read_keys - keys).abs().max()) < 1.5
    assert float((read_values - values).abs().max()) < 1.5


def test_the_error_is_less_than_without(random_row: Row) -> None:
    keys, values, _ = random_row(256)
    gear = Gear(bits=2, residual=0).compress(keys, values, None).materialize()
    kivi = Kivi(bits=2, residual=0).compress(keys, values, None).materialize()
    for ours, theirs, real in zip(gear, kivi, (keys, values), strict=True):
        assert float((ours - real).norm()) < 0.9 * float((theirs - real).norm())


def test_the_low_rank_part_is_near_the_best(random_row: Row) -> None:
    error = random_row(128, size=24)[0].clone()
    error += 3 * torch.randn(2, 128, 1, generator=torch.Generator().manual_seed(1)) @ torch.ones(1, 24)
    left, right = low_rank(error, 2, 0)
    missed = (error - left @ right.mT).square().sum((1, 2))
    best = torch.linalg.svdvals(error)[:, 2:].square().sum(1)
    assert (missed <= 1.1 * best).all()
    torch.testing.assert_close(left.mT @ left, torch.eye(2).expand(2, 2, 2), atol=1e-4, rtol=0)


def test_extending_gives_what_quantising_at_once_gives(random_row: Row) -> None:
    keys, values, _ = random_row(420)
    method = Gear()
    region = method.compress(keys[:, :200], values[:, :200], None)
    longer = region.extend(keys[:, 128:400], values[:, 128:400], None)
    whole = method.compress(keys[:, :416], values[:, :416], None)
    assert (region.covered, longer.covered, whole.covered) == (128, 384, 384)
    for mine, theirs in zip((*longer.keys, *longer.values), (*whole.keys, *whole.values), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_a_number_that_is_not_finite_spoils_its_block_only(random_row: Row) -> None:
    keys, values, _ = random_row(256)
    clean, _ = Gear(residual=0).compress(keys, values, None).materialize()
    keys[1, 200, 3] = float("nan")
    read, _ = Gear(residual=0).compress(keys, values, None).materialize()
    assert read[1, 200, 3].isnan()
    torch.testing.assert_close(read[0], clean[0])
    torch.testing.assert_close(read[1, :128], clean[1, :128])


@pytest.mark.parametrize(
    "wrong", [{"bits": 3}, {"group": 48}, {"group": 2}, {"outliers": 0}, {"rank": 0}, {"residual": -1}, {"seed": -1}]
)
def test_values_out_of_range_are_option_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Gear(**wrong)
