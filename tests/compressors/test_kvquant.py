"""KVQuant: the codebook fits the numbers, outliers are exact, ranges are those of the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import make_prompt, make_tiny
from noted import note_gradients
from torch import Tensor

from vericache_compile.compressors.kivi import Kivi
from vericache_compile.compressors.kvquant import KVQuant, Ranges, k_means
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def farthest(numbers: list[float], middle: float, count: int) -> list[int]:
    """Places of the `count` numbers farthest from a middle."""
    return sorted(range(len(numbers)), key=lambda i: -abs(numbers[i] - middle))[:count]


def naive_keys(keys: Tensor, fit: Ranges, outliers: int) -> Tensor:
    """One channel and number at a time; of each 128 tokens those farthest out are exact."""
    out = torch.empty_like(keys)
    levels = fit.key_levels.tolist()
    for head in range(keys.shape[0]):
        for channel in range(keys.shape[2]):
            low, high = float(fit.low[head, 0, channel]), float(fit.high[head, 0, channel])
            middle, half = (high + low) / 2, (high - low) / 2
            for begin in range(0, keys.shape[1], 128):
                numbers = keys[head, begin : begin + 128, channel].tolist()
                read = [middle + half * min(levels, key=lambda x, n=n: abs(x - (n - middle) / half)) for n in numbers]  # type: ignore[misc]
                for place in farthest(numbers, middle, outliers):
                    read[place] = numbers[place]
                out[head, begin : begin + 128, channel] = torch.tensor(read)
    return out


def naive_values(values: Tensor, fit: Ranges, outliers: int) -> Tensor:
    """One token at a time, all heads together; the numbers farthest from the mean are exact."""
    out = torch.empty_like(values)
    levels = fit.value_levels.tolist()
    for token in range(values.shape[1]):
        numbers = values[:, token].flatten().tolist()
        mean = sum(numbers) / len(numbers)
        apart = farthest(numbers, mean, outliers)
        rest = [mean if i in apart else number for i, number in enumerate(numbers)]
        middle, half = (max(rest) + min(rest)) / 2, (max(rest) - min(rest)) / 2
        read = [middle + half * min(levels, key=lambda x, n=n: abs(x - (n - middle) / half)) for n in numbers]  # type: ignore[misc]
        for place in apart:
            read[place] = numbers[place]
        out[:, token] = torch.tensor(read).view(values.shape[0], -1)
    return out


@pytest.mark.parametrize(
    ("bits", "outliers", "counts"), [(2, 0.01, (1, 1)), (3, 0.02, (3, 1)), (4, 0.08, (10, 2)), (5, 0.01, (1, 1))]
)
def test_numbers_equal_the_naive_loops(random_row: Row, bits: int, outliers: float, counts: tuple[int, int]) -> None:
    """Of 128 numbers of a key channel, and 24 of a value, so many are outliers (fractions at which none tie)."""
    keys, values, _ = random_row(257)
    region = KVQuant(bits=bits, outliers=outliers, residual=0).compress(keys, values, None)
    fit = Ranges(*region.fit)
    read_keys, read_values = region.materialize()
    torch.testing.assert_close(read_keys[:, 1:], naive_keys(keys[:, 1:], fit, counts[0]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read_values[:, 1:], naive_values(values[:, 1:], fit, counts[1]), atol=1e-4, rtol=1e-4)
    assert torch.equal(read_keys[:, :1], keys[:, :1])
    assert torch.equal(read_values[:, :1], values[:, :1])


def test_a_spike_in_a_channel_that_is_else_one_number_is_exact(random_row: Row) -> None:
    """The trimmed range is one point there."""
    keys, values, _ = random_row(256)
    keys[:, :, 3] = 0.5
    keys[0, 50, 3], keys[1, 200, 3] = 100.0, -100.0
    read, _ = KVQuant(residual=0, sinks=0).compress(keys, values, None).materialize()
    assert torch.equal(read[:, :, 3], keys[:, :, 3])


def test_ranges_leave_one_percent_out(random_row: Row) -> None:
    keys, values, _ = random_row(1024)
    fit = Ranges(*KVQuant(outliers=0.01).fit(keys, values, None))
    ordered = keys.sort(1).values
    assert torch.equal(fit.low[:, 0], ordered[:, 5])
    assert torch.equal(fit.high[:, 0], ordered[:, -6])


@pytest.mark.parametrize(("heads", "tokens", "size"), [(2, 4096, 64), (3, 2910, 64), (8, 1024, 96)])
def test_k_means_sees_every_channel(heads: int, tokens: int, size: int) -> None:
    """A level at each channel's number: it is there only where the channel was looked at."""
    channels = torch.linspace(-1, 1, size)
    assert len(set(k_means(channels.expand(heads, tokens, size), None, size).tolist())) == size


def test_the_codebook_is_lloyds(random_row: Row) -> None:
    """Every level is the mean of what is nearest to it, and weights count."""
    x = random_row(512)[0].clamp(-1, 1)
    for weights in (None, x.square() + 0.01):
        levels = k_means(x, weights, 4)
        numbers, mass = x.flatten(), torch.ones(x.numel()) if weights is None else weights.flatten()
        cell = (numbers.unsqueeze(1) - levels).abs().argmin(1)
        means = torch.stack([(numbers * mass)[cell == i].sum() / mass[cell == i].sum() for i in range(4)])
        torch.testing.assert_close(means, levels, atol=5e-3, rtol=0)
    assert not torch.allclose(k_means(x, None, 4), levels)


def naive_levels(numbers: list[float], weights: list[float], count: int) -> list[float]:
    """Weighted k-means in one dimension, 20 turns from quantiles."""
    ordered = sorted(numbers)
    levels = [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]
    for _ in range(20):
        mass, moment = [0.0] * count, [0.0] * count
        for number, weight in zip(numbers, weights, strict=True):
            own = min(range(count), key=lambda i, x=number: abs(x - levels[i]))  # type: ignore[misc]
            mass[own] += weight
            moment[own] += weight * number
        levels = [m / w if w else level for m, w, level in zip(moment, mass, levels, strict=True)]
    return levels


def test_what_is_learned_weighs_numbers_by_squared_gradients() -> None:
    model, ids = make_tiny("llama"), make_prompt(48)["input_ids"].view(2, 24)
    learned = KVQuant(bits=2).learn(model, ids, ())
    for layer, (keys, values, key_slopes, value_slopes) in enumerate(note_gradients(model, ids)):
        low, high = keys.amin(1, keepdim=True), keys.amax(1, keepdim=True)  # 1 % of 48 tokens is none
        scaled = ((2 * keys - low - high) / (high - low)).flatten().tolist()
        expected = naive_levels(scaled, key_slopes.square().flatten().tolist(), 4)
        assert learned[f"{layer}.key_levels"].tolist() == pytest.approx(expected, abs=1e-4)
        scaled = []
        for numbers in values.transpose(0, 1).flatten(1).tolist():  # of 32 numbers one is apart
            middle = sum(numbers) / len(numbers)
            (apart,) = farthest(numbers, middle, 1)
            rest = [*numbers[:apart], *numbers[apart + 1 :]]
            low_, high_ = min(rest), max(rest)
            scaled += [min(max((2 * x - low_ - high_) / (high_ - low_), -1), 1) for x in numbers]
        weights = value_slopes.square().transpose(0, 1).flatten().tolist()
        assert learned[f"{layer}.value_levels"].tolist() == pytest.approx(naive_levels(scaled, weights, 4), abs=1e-4)


def test_numbers_that_pile_up_are_read_better_than_in_even_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 256, 16, generator=generator) ** 3
    ours, _ = KVQuant(bits=2, residual=0, sinks=0).compress(keys, keys, None).materialize()
    theirs, _ = Kivi(bits=2, residual=0).compress(keys, keys, None).materialize()
    assert float((ours - keys).norm()) < 0.8 * float((theirs - keys).norm())


def test_later_tokens_are_read_by_the_same_fit(random_row: Row) -> None:
    keys, values, _ = random_row(400)
    method = KVQuant(sinks=0)
    region = method.compress(keys[:, :200], values[:, :200], None)
    longer = region.extend(keys[:, 128:300], values[:, 128:300], None)
    assert (region.covered, longer.covered) == (128, 256)
    assert all(map(torch.equal, longer.fit, region.fit))
    apart = method.decode(*method.encode(keys[:, 128:256], values[:, 128:256], region.fit), region.fit)
    for read, before, later in zip(longer.materialize(), region.materialize(), apart, strict=True):
        assert torch.equal(read, torch.cat([before, later], dim=1))


def test_a_region_of_nothing_takes_its_fit_from_what_joins(random_row: Row) -> None:
    keys, values, _ = random_row(200)
    empty = KVQuant().compress(keys[:, :40], values[:, :40], None)
    assert (empty.covered, empty.nbytes) == (0, 0)
    longer = empty.extend(keys, values, None)
    assert longer.covered == 129
    assert float((longer.materialize()[0] - keys[:, :129]).abs().max()) < 0.5


def test_nan_is_no_crash_and_spoils_no_other_head(random_row: Row) -> None:
    keys, values, _ = random_row(160)
    keys[1, 5] = float("nan")
    read, _ = KVQuant(residual=0).compress(keys, values, None).materialize()
    assert read[0].isfinite().all()


@pytest.mark.parametrize("wrong", [{"bits": 7}, {"outliers": 1}, {"sinks": -1}, {"residual": -1}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        KVQuant(**wrong)
