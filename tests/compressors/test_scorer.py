"""What methods that drop tokens share: what joins a region, and what a row's first tokens are."""

from __future__ import annotations

import pytest
import torch

from vericache_compile.compressors.spec import parse

HEADS, SIZE, SINKS = 2, 8, 4


@pytest.mark.parametrize("first", [0, 20])
@pytest.mark.parametrize(
    "text",
    [
        "lagkv(keep=0.2, lag=16)",
        "expected_attention(keep=0.2)",
        "ada | expected_attention(keep=0.2)",
        "pyramid | lagkv(keep=0.2, lag=16)",
        "expected_attention(keep=0.2) | int8",
        "refreekv(threshold=0.9)",
        "streaming(keep=0.2)",
    ],
)
def test_a_rows_first_tokens_stay_where_nothing_was_covered_at_first(text: str, first: int) -> None:
    """A short row leaves its region empty: the tokens that join it then are the row's first."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(HEADS, 600, SIZE, generator=generator) for _ in range(2))
    queries = torch.randn(2 * HEADS, 64, SIZE, generator=generator)
    method = parse(text, {}).for_layer(1, 2)
    region = method.compress(keys[:, :first], values[:, :first], queries[:, -max(first, 1) :])
    for end in (280, 560):
        region = region.extend(keys[:, region.covered : end], values[:, region.covered : end], queries)
    assert 280 < region.covered <= 560
    held = region.materialize()[0]
    for head in range(HEADS):
        distances = torch.cdist(keys[head, :SINKS], held[head]).amin(dim=1)
        assert distances.max() < 0.1, "each of them is there, quantised or not"


@pytest.mark.parametrize(
    ("text", "tail"),
    [
        ("snapkv(window=64)", 64),
        ("adakv(window=64)", 64),
        ("ada | snapkv(window=64)", 64),
        ("kvreviver(window=64)", 64),
        ("kivi(residual=128)", 128),
        ("snapkv(window=64) | kivi", 64),
        ("recalkv(residual=100)", 100),
        ("spark(window=64)", 64),
        ("h2o", 0),
    ],
)
def test_what_a_method_leaves_to_the_tail_is_said(text: str, tail: int) -> None:
    assert parse(text, {}).least_tail == tail
