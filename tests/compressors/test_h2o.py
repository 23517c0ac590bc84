"""H2O: half of the budget to the largest sums of attention, half to the newest tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.facts import Facts
from vericache_compile.compressors.h2o import H2O
from vericache_compile.compressors.window_attention import mean_attention
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def naive(drawn: list[float], slots: int, recent: float) -> list[int]:
    """The newest, and of the others those that drew most."""
    newest = int(recent * slots)
    old = range(len(drawn) - newest)
    heavy = sorted(old, key=lambda j: -drawn[j])[: slots - newest]
    return sorted([*heavy, *range(len(drawn) - newest, len(drawn))])


@pytest.mark.parametrize("recent", [0.0, 0.5, 1.0])
def test_heavy_hitters_and_the_newest_stay(random_row: Row, recent: float) -> None:
    keys, values, queries = random_row(50)
    drawn = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    region = H2O(keep=0.2, recent=recent).knowing(Facts(attention=drawn)).compress(keys, values, queries)
    for head in range(2):
        kept = naive(drawn[head].tolist(), 10, recent)
        assert torch.equal(region.materialize()[0][head], keys[head, kept])
        assert torch.equal(region.materialize()[1][head], values[head, kept])


def test_tokens_that_join_compete_by_what_they_drew(random_row: Row) -> None:
    keys, values, queries = random_row(90)
    drawn = torch.rand(2, 90, generator=torch.Generator().manual_seed(0))
    region = H2O(keep=0.2).knowing(Facts(attention=drawn[:, :50])).compress(keys[:, :50], values[:, :50], queries)
    longer = region.knowing(Facts(attention=drawn[:, 50:])).extend(keys[:, 50:], values[:, 50:], queries)
    assert torch.equal(longer.materialize()[0][:, :10], region.materialize()[0])
    for head in range(2):
        kept = [50 + j for j in naive(drawn[head, 50:].tolist(), 8, 0.5)]
        assert torch.equal(longer.materialize()[0][head, 10:], keys[head, kept])


def test_the_last_queries_stand_in_for_sums_that_nobody_knows(random_row: Row) -> None:
    keys, values, queries = random_row(50)
    told = H2O(keep=0.2).knowing(Facts(attention=mean_attention(keys, queries)))
    expected, alone = told.compress(keys, values, queries), H2O(keep=0.2).compress(keys, values, queries)
    assert torch.equal(expected.materialize()[0], alone.materialize()[0])


@pytest.mark.parametrize("wrong", [{"recent": 1.5}, {"recent": True}, {"refresh": -1}, {"keep": 0}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        H2O(**wrong)  # type: ignore[arg-type]
