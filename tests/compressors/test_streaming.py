"""StreamingLLM: which tokens stay is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile.compressors.streaming import Streaming, StreamingKV
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def numbered(tokens: int) -> tuple[Tensor, Tensor]:
    """A row whose keys say their position and whose values say its negative."""
    positions = torch.arange(tokens, dtype=torch.float32).view(1, -1, 1)
    return positions.expand(2, tokens, 4), -positions.expand(2, tokens, 6)


def kept_positions(region: StreamingKV) -> list[int]:
    """The positions in a region of a numbered row, the same in every head and channel."""
    keys, values = region.materialize()
    positions = keys[0, :, 0]
    assert torch.equal(keys, positions.view(1, -1, 1).expand_as(keys))
    assert torch.equal(values, -positions.view(1, -1, 1).expand_as(values))
    return [int(position) for position in positions]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, []),
        (1, [0]),
        (4, [0, 1, 2, 3]),
        (5, [0, 1, 2, 3, 4]),
        (6, [0, 1, 2, 3, 5]),
        (25, [0, 1, 2, 3, 24]),
        (26, [0, 1, 2, 3, 24, 25]),
        (50, [0, 1, 2, 3, 44, 45, 46, 47, 48, 49]),
    ],
)
def test_the_sinks_and_the_most_recent_tokens_stay(tokens: int, expected: list[int]) -> None:
    region = Streaming(keep=0.2).compress(*numbered(tokens), None)
    assert kept_positions(region) == expected
    assert (region.covered, region.slots) == (tokens, len(expected))


@settings(deadline=None)
@given(tokens=st.integers(0, 200), thousandths=st.integers(1, 1000), sinks=st.integers(0, 8))
def test_slots_follow_the_formula(tokens: int, thousandths: int, sinks: int) -> None:
    region = Streaming(keep=thousandths / 1000, sinks=sinks).compress(*numbered(tokens), None)

    slots = min(tokens, max(sinks + 1, ceil(thousandths * tokens / 1000)))
    first = min(sinks, slots)
    assert kept_positions(region) == [*range(first), *range(tokens - slots + first, tokens)]


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 120), min_size=2, max_size=4), keep=st.floats(0.01, 1.0))
def test_extending_keeps_what_compressing_at_once_would_keep(cuts: list[int], keep: float) -> None:
    method, total = Streaming(keep=keep), sum(cuts)
    keys, values = numbered(total)

    start = cuts[0]
    region = method.compress(keys[:, :start], values[:, :start], None)
    for length in cuts[1:]:
        region = region.extend(keys[:, start : start + length], values[:, start : start + length], None)
        start += length

    assert region.covered == total
    assert kept_positions(region) == kept_positions(method.compress(keys, values, None))


def test_keys_keep_their_rotation(random_row: Row) -> None:
    keys, values, _ = random_row(30)
    region = Streaming(keep=0.3).compress(keys, values, None)
    assert torch.equal(region.keys, torch.cat([keys[:, :4], keys[:, 25:]], dim=1))
    assert torch.equal(region.values, torch.cat([values[:, :4], values[:, 25:]], dim=1))


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"keep": 1.5}, {"sinks": -1}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Streaming(**wrong)  # type: ignore[arg-type]
