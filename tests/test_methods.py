"""Every compression method by its name, end to end: tokens are those of plain greedy decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import Switch, make_prompt, make_tiny
from transformers import PreTrainedModel

from vericache_compile import stats
from vericache_compile.compressors.table import COMPRESSORS
from vericache_compile.runtime import rounds

GATHER = 8
"""Tokens that gather in a tail here before they are compressed in, so that few new tokens do it twice."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Not here: the model is captured once for all methods."""


@pytest.fixture(scope="module")
def switched() -> Iterator[tuple[PreTrainedModel, Switch]]:
    """A small model with grouped queries, compiled under options that each test sets."""
    torch._dynamo.reset()
    model, switch = make_tiny("llama"), Switch()
    model.compile(backend=switch)
    yield model, switch
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "text",
    [
        "snapkv(keep=0.1, refresh=12)",
        "h2o(keep=0.1, refresh=12)",
        "kvzip(keep=0.1, refresh=30)",
        "0: quest(whole=0, page=4, keep=0.1), rest: clusterkv(whole=0, keep=0.1)",
        pytest.param("0: none, rest: streaming(keep=0.1, refresh=12) | int8", marks=pytest.mark.slow),
        pytest.param("chunkkv(keep=0.2, reuse=2)", marks=pytest.mark.slow),
    ],
)
def test_long_outputs_are_plain(
    switched: tuple[PreTrainedModel, Switch], text: str, plain_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that is compressed anew several times, or chosen from at every step, changes no token."""
    model, switch = switched
    switch.options = {"compressor": text, "window": 4, "inductor": False}
    monkeypatch.setattr(rounds, "CHUNK", GATHER)
    ours = model.generate(**make_prompt(120, 3), max_new_tokens=80, do_sample=False)
    assert torch.equal(ours, plain_tokens("llama", 120, 3, 80))
    refreshes = stats(model)["refreshes"]
    assert refreshes >= 2 if "refresh" in text else refreshes == 0


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_tokens_are_plain(
    switched: tuple[PreTrainedModel, Switch], name: str, batch: int, plain_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, switch = switched
    switch.options = {"compressor": name, "window": 4, "inductor": False}
    monkeypatch.setattr(rounds, "CHUNK", GATHER)
    for tokens, count in ((9, 5), (300, 30)):
        ours = model.generate(**make_prompt(tokens, batch), max_new_tokens=count, do_sample=False)
        assert torch.equal(ours, plain_tokens("llama", tokens, batch, count)), f"prompt of {tokens}"
    assert stats(model)["rounds"] > 0
