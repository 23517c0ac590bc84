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
