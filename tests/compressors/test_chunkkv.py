"""ChunkKV: whole chunks, by the attention to them of all heads together."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.chunkkv import ChunkKV
from vericache_compile.compressors.facts import Facts
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def naive_chunks(keys: Tensor, queries: Tensor, chunks: int, size: int, *, among: bool) -> list[float]:
    """Mean attention to each chunk, summed over heads; `among`: queries are those of the last tokens of the keys."""
    keys, queries = keys.double(), queries.double()
    heads, rows, width = queries.shape
    tokens = keys.shape[1]
    scores = [0.0] * chunks
    for head in range(heads):
        own = keys[head * keys.shape[0] // heads]
        for row in range(rows):
            seen = tokens - rows + row + 1 if among else tokens
            weights = [math.exp(float(queries[head, row] @ key) / math.sqrt(width)) for key in own[:seen]]
            for chunk in range(chunks):
                scores[chunk] += sum(weights[chunk * size : (chunk + 1) * size]) / sum(weights) / size
    return scores


def positions(scores: list[float], count: int, size: int) -> list[int]:
    best = sorted(sorted(range(len(scores)), key=scores.__getitem__)[-count:])
    return [chunk * size + token for chunk in best for token in range(size)]


def test_the_choice_equals_the_naive_loops(random_row: Row) -> None:
    keys, values, queries = random_row(77, queries=8)
    region = ChunkKV(keep=0.3, window=8, chunk=5).compress(keys, values, queries)
    assert (region.covered, region.slots) == (65, 20)
    kept = positions(naive_chunks(keys, queries, 13, 5, among=True), 4, 5)
    assert torch.equal(region.keys, keys[:, kept])
    assert torch.equal(region.values, values[:, kept])


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_extend_covers_whole_chunks_by_later_queries(random_row: Row, rows: int) -> None:
    keys, values, queries = random_row(77, queries=rows)
    region = ChunkKV(keep=0.3, window=8, chunk=5).compress(keys, values, queries)
    more, more_values, _ = random_row(44, seed=1)
    longer = region.extend(more, more_values, queries)
    assert (longer.covered, longer.slots) == (105, 35)
    kept = positions(naive_chunks(more, queries, 8, 5, among=False), 3, 5)
    assert torch.equal(longer.keys[:, 20:], more[:, kept])


@pytest.mark.parametrize(("tokens", "covered"), [(0, 0), (32, 0), (41, 0), (42, 10), (51, 10), (52, 20)])
def test_only_whole_chunks_before_the_window_are_covered(random_row: Row, tokens: int, covered: int) -> None:
    assert ChunkKV().compress(*random_row(tokens)).covered == covered


def test_adjacent_layers_share_the_choice_of_the_first(random_row: Row) -> None:
    rows = [random_row(200, seed=seed) for seed in range(4)]
    shared: dict[object, Tensor] = {}
    kept = []
    for layer, row in enumerate(rows):
        method = ChunkKV(keep=0.2, reuse=2).knowing(Facts(layer=layer, shared=shared))
        assert isinstance(method, ChunkKV)
        kept.append(method.choose(*row, 160))
    alone = [ChunkKV(keep=0.2).choose(*row, 160) for row in rows]
    assert all(torch.equal(kept[layer], alone[layer - layer % 2]) for layer in range(4))
    assert not torch.equal(alone[0], alone[1])
    assert len(shared) == 2


def test_layers_are_told_of_each_other_only_where_they_share(random_row: Row) -> None:
    assert ChunkKV().wants == {"queries"}
    assert ChunkKV(reuse=2).wants == {"queries", "shared"}
    shared: dict[object, Tensor] = {}
    ChunkKV().knowing(Facts(shared=shared)).compress(*random_row(200))
    assert not shared


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"window": 0}, {"chunk": 0}, {"chunk": 33}, {"reuse": 0}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        ChunkKV(**wrong)  # type: ignore[arg-type]
