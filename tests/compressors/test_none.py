"""No compression: the region is the row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile.compressors.none import NoCompression

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


@settings(deadline=None)
@given(tokens=st.integers(0, 40), more=st.integers(0, 40))
def test_every_token_is_kept_exactly(random_row: Row, tokens: int, more: int) -> None:
    keys, values, _ = random_row(tokens + more)

    region = NoCompression().compress(keys[:, :tokens], values[:, :tokens], None)
    assert (region.covered, region.slots) == (tokens, tokens)
    assert torch.equal(region.keys, keys[:, :tokens])

    longer = region.extend(keys[:, tokens:], values[:, tokens:], None)
    assert (longer.covered, longer.slots) == (tokens + more, tokens + more)
    assert torch.equal(longer.materialize()[0], keys)
    assert torch.equal(longer.materialize()[1], values)


def test_it_reads_no_queries_and_takes_no_parameters() -> None:
    assert NoCompression().queries == 0
    assert NoCompression.parameters == ()
