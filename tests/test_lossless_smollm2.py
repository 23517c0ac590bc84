"""Tokens of real weights on real text are those of plain greedy decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import BATCHES, COMPRESSORS, NEW, PROMPTS, WINDOWS
from transformers import PreTrainedModel

from vericache_compile import stats


def _run_smollm2(model: PreTrainedModel, inputs: dict[str, torch.Tensor], count: int, **options: Any) -> None:
    model._compiled_call_impl = None
    settings = {"max_new_tokens": count, "do_sample": False}
    plain = model.generate(**inputs, **settings)
    model.compile(backend="vericache", options=options)
    ours = model.generate(**inputs, **settings)
    model._compiled_call_impl = None
    assert torch.equal(ours, plain)
    assert stats(model)["rounds"] > 0


def _document(ids: torch.Tensor, tokens: int, batch: int) -> dict[str, torch.Tensor]:
    rows = torch.stack([ids[0, 500 * b : 500 * b + tokens] for b in range(batch)])
    mask = torch.ones_like(rows)
    for b in range(1, batch):
        rows[b, : tokens * b // 4], mask[b, : tokens * b // 4] = 2, 0
    return {"input_ids": rows, "attention_mask": mask}


@pytest.mark.parametrize(
    ("compressor", "window", "tokens", "batch"),
    [
        ("kivi", 8, 700, 1),
        ("streaming", 16, 31, 3),
        ("none", 32, 2, 1),
        ("snapkv", 16, 3000, 1),
    ],
)
def test_smollm2_gives_plain_tokens(
    smollm2: PreTrainedModel, document_ids: torch.Tensor, compressor: str, window: int, tokens: int, batch: int
) -> None:
    """A chosen part of the grid on real weights and real text, with compiled segments."""
    _run_smollm2(smollm2, _document(document_ids, tokens, batch), 48, **COMPRESSORS[compressor], window=window)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_smollm2_whole_grid(smollm2: PreTrainedModel, document_ids: torch.Tensor, compressor: str, window: int) -> None:
    """The whole grid on real weights and real text."""
    for batch in BATCHES:
        for tokens in PROMPTS:
            options = {**COMPRESSORS[compressor], "window": window, "inductor": False}
            _run_smollm2(smollm2, _document(document_ids, tokens, batch), NEW, **options)
