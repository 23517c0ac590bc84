"""LagKV against its formula, one chunk, token and channel at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.lagkv import LagKV
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def stand_out(chunk: Tensor, following: Tensor) -> list[float]:
    """Softmax over the tokens of chunk [L, D] of the deviation over channels, scaled by the chunk that follows."""
    lows, highs = following.double().amin(0).tolist(), following.double().amax(0).tolist()
    spreads = []
    for token in chunk.double().tolist():
        spreads.append(statistics.stdev((x - a) / (b - a) for x, a, b in zip(token, lows, highs, strict=True)))
    weights = [math.exp(spread - max(spreads)) for spread in spreads]
    return [weight / sum(weights) for weight in weights]


def naive_choice(keys: Tensor, values: Tensor, lag: int, count: int) -> list[int]:
    """Positions kept of one head's keys [S, D] and values [S, Dv]: `count` in each chunk that has a next one."""
    kept: list[int] = []
    for start in range(0, keys.shape[0] - 2 * lag + 1, lag):
        own, following = slice(start, start + lag), slice(start + lag, start + 2 * lag)
        sides = zip(stand_out(keys[own], keys[following]), stand_out(values[own], values[following]), strict=True)
        scores = [sum(side) / 2 for side in sides]
        kept += sorted(start + token for token in sorted(range(lag), key=scores.__getitem__)[-count:])
    return kept


def test_the_choice_equals_the_naive_loops(random_row: Row) -> None:
    keys, values, _ = random_row(77)
    region = LagKV(keep=0.25, lag=16, sinks=4).compress(keys, values, None)
    assert (region.covered, region.slots) == (4 + 3 * 16, 4 + 3 * 4)
    for head in range(2):
        kept = [*range(4), *(4 + x for x in naive_choice(keys[head, 4:68], values[head, 4:68], 16, 4))]
        assert torch.equal(region.keys[head], keys[head, kept])
        assert torch.equal(region.values[head], values[head, kept])


def test_extending_keeps_what_compressing_at_once_would_keep(random_row: Row) -> None:
    keys, values, _ = random_row(200)
    method = LagKV(keep=0.3, lag=16)
    region = method.compress(keys[:, :70], values[:, :70], None)
    for end in (75, 110, 200):
        region = region.extend(keys[:, region.covered : end], values[:, region.covered : end], None)
    whole = method.compress(keys, values, None)
    assert region.covered == whole.covered == 4 + 11 * 16
    assert torch.equal(region.keys, whole.keys)
    assert torch.equal(region.values, whole.values)


@pytest.mark.parametrize(("tokens", "covered"), [(0, 0), (3, 0), (35, 0), (36, 20), (51, 20), (52, 36)])
def test_chunks_without_a_next_one_stay_exact(random_row: Row, tokens: int, covered: int) -> None:
    keys, values, _ = random_row(tokens)
    assert LagKV(lag=16).compress(keys, values, None).covered == covered


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"lag": 0}, {"sinks": -1}, {"sinks": 128}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        LagKV(**wrong)  # type: ignore[arg-type]


def test_a_channel_that_is_constant_over_a_chunk_says_nothing() -> None:
    keys = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(0))
    keys[:, :, 3] = 1.0
    scores = LagKV(keep=0.5, lag=10, sinks=0)._stand_out(keys)
    assert scores.isfinite().all()
