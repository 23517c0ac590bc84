"""PyramidKV: budgets fall linearly over the layers, and their mean is what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile.compressors.chain import Chain
from vericache_compile.compressors.kivi import Kivi
from vericache_compile.compressors.pyramidkv import PyramidKV
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def naive_budget(layer: int, layers: int, tokens: int, keep: float, beta: float) -> float:
    """The paper's budget of a layer for `tokens` tokens, before rounding."""
    mean = tokens * keep
    low = mean / beta
    high = 2 * mean - low
    if high > tokens:
        high = tokens
        low = 2 * mean - high
    step = (high - low) / (layers - 1)
    return high - layer * step


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 0.52, 0.8, 1.0])
def test_slots_follow_the_formula(random_row: Row, keep: float) -> None:
    keys, values, queries = random_row(132)
    method = PyramidKV(keep=keep)
    for layer in range(6):
        region = method.for_layer(layer, 6).compress(keys, values, queries)
        assert region.slots == max(1, ceil(naive_budget(layer, 6, 100, keep, 20) - 1e-6))
        chosen = SnapKV(keep=region.slots / 100).compress(keys, values, queries)
        assert torch.equal(region.materialize()[0], chosen.keys)


@given(keep=st.floats(0.01, 1.0), layers=st.integers(1, 40), beta=st.floats(1, 50))
def test_the_mean_is_kept_and_no_layer_is_out_of_range(keep: float, layers: int, beta: float) -> None:
    method = PyramidKV(keep=keep, beta=beta)
    shares = [method.for_layer(layer, layers).keep for layer in range(layers)]
    assert sum(shares) / layers == pytest.approx(keep)
    assert shares == sorted(shares, reverse=True)
    assert all(0 < share <= 1 for share in shares)


def test_it_goes_into_a_chain(random_row: Row) -> None:
    keys, values, queries = random_row(132)
    chain = Chain(PyramidKV(keep=0.4), Kivi())
    slots = [chain.for_layer(layer, 3).compress(keys, values, queries).slots for layer in range(3)]
    assert slots == [78, 40, 2]


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"beta": 0.5}, {"window": 0}, {"kernel": 2}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        PyramidKV(**wrong)  # type: ignore[arg-type]
