"""Budgets stand before any method that has one: across layers, across the heads of a layer, or both."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.spec import parse
from vericache_compile.errors import OptionError
from vericache_compile.testing import check_tokens

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]
LAYERS = 4


def regions(text: str, row: tuple[Tensor, Tensor, Tensor]) -> list[Any]:
    """What a compressor makes of one row at each of four sites."""
    keys, values, queries = row
    keys = keys.clone()
    keys[0, ::9] *= 4  # head 0 draws much attention to few tokens
    return [parse(text, {}).for_layer(layer, LAYERS).compress(keys, values, queries) for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("name", "budget"),
    [("pyramidkv(keep=0.3)", "pyramid | snapkv(keep=0.3)"), ("adakv(keep=0.3)", "ada | snapkv(keep=0.3)")],
)
def test_the_named_methods_are_snapkv_with_a_budget(random_row: Row, name: str, budget: str) -> None:
    for one, other in zip(*(regions(text, random_row(132)) for text in (name, budget)), strict=True):
        assert (one.covered, one.slots, one.head_slots) == (other.covered, other.slots, other.head_slots)
        assert all(torch.equal(*pair) for pair in zip(one.materialize(), other.materialize(), strict=True))


@pytest.mark.parametrize(
    "method", ["knorm(keep=0.4)", "streaming(keep=0.4)", "quest(keep=0.4, whole=0)", "adakv(keep=0.4)"]
)
def test_layers_share_what_a_method_keeps(random_row: Row, method: str) -> None:
    """More in the first layers; on average what was asked for."""
    methods = [parse(f"pyramid(beta=4) | {method}", {}).for_layer(layer, LAYERS) for layer in range(LAYERS)]
    keeps = [vars(each)["keep"] for each in methods]
    assert keeps == pytest.approx([0.7, 0.5, 0.3, 0.1])


@pytest.mark.parametrize(
    "method", ["knorm(keep=0.3)", "expected_attention(keep=0.3)", "keydiff(keep=0.3)", "h2o(keep=0.3)"]
)
def test_heads_share_what_a_layer_keeps(random_row: Row, method: str) -> None:
    [even, *_] = regions(method, random_row(132))
    [shared, *_] = regions(f"ada(floor=0) | {method}", random_row(132))
    assert sum(shared.head_slots) == 2 * even.slots
    assert shared.nbytes == even.nbytes
    assert shared.covered == even.covered


def test_scores_may_be_whole_numbers_and_a_pyramid_steep(random_row: Row) -> None:
    assert sum(regions("ada | streaming(keep=0.3)", random_row(132))[0].head_slots) == 2 * 40
    assert [each.slots for each in regions("pyramid(beta=1e17) | streaming(keep=0.2)", random_row(132))][-1] == 5


def test_both_at_once_and_bits(random_row: Row) -> None:
    slots = [sum(region.head_slots) for region in regions("pyramid(beta=4) | ada | knorm(keep=0.4)", random_row(132))]
    assert slots == [140, 100, 60, 20]
    chain = [region.slots for region in regions("pyramid(beta=4) | knorm(keep=0.4) | kivi", random_row(132))]
    assert chain == [70, 50, 30, 10]


def test_the_option_keep_reaches_the_method() -> None:
    made: Any = parse("pyramid | ada | knorm", {"keep": 0.6})
    assert made.method.scorer.keep == 0.6


@pytest.mark.parametrize("heads", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tokens_are_plain_ones(heads: int) -> None:
    check_tokens(
        "pyramid(beta=3) | ada(floor=0.1) | expected_attention(keep=0.3)", heads, tokens=300, batch=3, count=30
    )


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("pyramid", "is a budget", "a method after it"),
        ("pyramid | kivi", "'kivi' has no budget to spread", "pyramid | snapkv"),
        ("pyramid | pyramidkv", "'pyramidkv' spreads its budget itself", "pyramidkv alone"),
        ("pyramid | chunkkv(reuse=4)", "reuse=4: layers that share", "leave out reuse"),
        ("pyramid | chunkkv(reuse=2) | kivi", "reuse=2: layers that share", "leave out reuse"),
        ("ada | chunkkv", "'chunkkv' cannot share its budget out", "ada | snapkv"),
        ("ada | snapkv | kivi", "'chain' cannot share its budget out", "ada | snapkv"),
        ("pyramid(beta=0.5) | snapkv", "beta=0.5", "from 1 up"),
        ("pyramid(bet=2) | snapkv", "bet=2", "did you mean 'beta'"),
        ("ada(floor=2) | snapkv", "floor=2", r"\[0, 1\]"),
        ("snapkv | pyramid(beta=2)", "'pyramid(beta=2)' is a budget", r"before the method, as in pyramid \|"),
        ("pyramd | snapkv", "compressor='pyramd'", "did you mean 'pyramid'"),
        ("adda(floor=0) | snapkv", "compressor='adda'", "did you mean 'ada'"),
        ("snapkv | kivi | kivi", "snapkv | kivi | kivi", "any budgets, then one method"),
    ],
)
def test_what_cannot_be_is_refused(text: str, found: str, fix: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse(text, {})
    assert found in str(raised.value)
    assert re.search(fix, str(raised.value))
