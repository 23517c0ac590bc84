"""Tokens of real weights on real text are those of plain greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from models import BATCHES, COMPRESSORS, NEW, PROMPTS, WINDOWS
from torch import Tensor
from transformers import PreTrainedModel

from vericache_compile import stats
from vericache_compile.compressors.table import COMPRESSORS as METHODS
from vericache_compile.testing import Switch, gather_soon, generate_rows

Plain = Callable[[int, int, int], Tensor]


@pytest.fixture(scope="module")
def plain(smollm2: PreTrainedModel, document_ids: Tensor) -> Plain:
    """Plain greedy tokens: (prompt tokens, batch, new tokens)."""

    @cache
    def tokens_of(tokens: int, batch: int, count: int) -> Tensor:
        smollm2._compiled_call_impl = None
        return smollm2.generate(**_document(document_ids, tokens, batch), max_new_tokens=count, do_sample=False)

    return tokens_of


def _run_smollm2(model: PreTrainedModel, prompt: dict[str, Tensor], expected: Tensor, **options: Any) -> None:
    model.compile(backend="vericache", options=options)
    ours = model.generate(**prompt, max_new_tokens=expected.shape[1] - prompt["input_ids"].shape[1], do_sample=False)
    model._compiled_call_impl = None
    assert torch.equal(ours, expected)
    assert stats(model)["rounds"] > 0


def _document(ids: Tensor, tokens: int, batch: int) -> dict[str, Tensor]:
    rows = torch.stack([ids[0, 500 * b : 500 * b + tokens] for b in range(batch)])
    mask = torch.ones_like(rows)
    for b in range(1, batch):
        rows[b, : tokens * b // 4], mask[b, : tokens * b // 4] = 2, 0
    return {"input_ids": rows, "attention_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compressor", "window", "tokens", "batch"),
    [
        ("kivi", 8, 700, 1),
        ("streaming", 16, 31, 3),
        ("none", 32, 2, 1),
        ("snapkv", 16, 1200, 1),
        ("snapkv", 16, 3000, 1),
    ],
)
def test_smollm2_gives_plain_tokens(
    smollm2: PreTrainedModel,
    document_ids: Tensor,
    plain: Plain,
    compressor: str,
    window: int,
    tokens: int,
    batch: int,
) -> None:
    """A chosen part of the grid on real weights and real text, with compiled segments."""
    options = {**COMPRESSORS[compressor], "window": window}
    _run_smollm2(smollm2, _document(document_ids, tokens, batch), plain(tokens, batch, 48), **options)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_smollm2_whole_grid(
    smollm2: PreTrainedModel, document_ids: Tensor, plain: Plain, compressor: str, window: int
) -> None:
    """The whole grid on real weights and real text."""
    for batch in BATCHES:
        for tokens in PROMPTS:
            options = {**COMPRESSORS[compressor], "window": window, "inductor": False}
            _run_smollm2(smollm2, _document(document_ids, tokens, batch), plain(tokens, batch, NEW), **options)


class Expected(NamedTuple):
    """SmolLM2 compiled with a switch, a prompt, plain's tokens, and the rows over no compression."""

    model: PreTrainedModel
    switch: Switch
    prompt: dict[str, Tensor]
    tokens: Tensor
    rows: Tensor


@pytest.fixture(scope="module")
def expected(smollm2: PreTrainedModel, document_ids: Tensor) -> Iterator[Expected]:
    """Three rows of real text, two of them padded."""
    prompt, switch = _document(document_ids, 700, 3), Switch()
    smollm2._compiled_call_impl = None
    tokens, _ = generate_rows(smollm2, prompt, NEW)
    switch.options = {"compressor": "none", "inductor": False}
    smollm2.compile(backend=switch)
    yield Expected(smollm2, switch, prompt, tokens, generate_rows(smollm2, prompt, NEW)[1])
    smollm2._compiled_call_impl = None


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_gives_plain_tokens_and_the_bits_of_none(
    expected: Expected, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens join what is compressed, too."""
    gather_soon(monkeypatch)
    expected.switch.options = {"compressor": name, "inductor": False}
    tokens, rows = generate_rows(expected.model, expected.prompt, NEW)
    assert torch.equal(tokens, expected.tokens)
    assert torch.equal(rows, expected.rows)
    assert stats(expected.model)["rounds"] > 0
