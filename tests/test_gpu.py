"""On a GPU: plain tokens, canonical bits, drafts that wait for nothing. All of it skips where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import make_prompt, make_tiny
from test_canonical import CHOICES, compiled, logits_of
from torch import Tensor
from transformers import PreTrainedModel

from vericache_compile import check
from vericache_compile.runtime import pieces
from vericache_compile.runtime.draft_step import DraftStep

pytestmark = pytest.mark.gpu
WINDOW = {"window": 8}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    made: PreTrainedModel = make_tiny("llama").to("cuda", request.param)
    return made


def prompt(batch: int) -> dict[str, Tensor]:
    return {name: x.to("cuda") for name, x in make_prompt(500, batch).items()}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("inductor", [False, True])
def test_rows_are_bit_equal_whatever_is_drafted(model: PreTrainedModel, inductor: bool, batch: int) -> None:
    switch = compiled(model)
    first = logits_of(model, switch, prompt(batch), 40, **CHOICES[0], **WINDOW, inductor=inductor)
    for choice in (*CHOICES[1:], {"compressor": "int8"}, {"compressor": "turboquant"}, {"placement": "host"}):
        made = logits_of(model, switch, prompt(batch), 40, **choice, **WINDOW, inductor=inductor)
        assert torch.equal(made, first), choice


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_bit_equal_through_a_ring_of_one_slot(model: PreTrainedModel, batch: int) -> None:
    """Slots are used again and again, tails compressed in, and what drafts dropped is set apart."""
    switch, how = compiled(model), {**WINDOW, "inductor": False}
    first = logits_of(model, switch, prompt(batch), 150, **how)
    for choice in ({}, {"compressor": "kivi"}, {"compressor": "adakv"}, {"placement": "disk"}):
        elsewhere = {"placement": "host", "staging_mb": 0.001, **choice, **how}
        with torch.inference_mode():
            assert torch.equal(logits_of(model, switch, prompt(batch), 150, **elsewhere), first), choice


def test_tokens_are_plain_ones(model: PreTrainedModel) -> None:
    report = check(model, prompt(1), max_new_tokens=40, compressor="kivi", inductor=False, **WINDOW)
    assert report.identical or (report.margin is not None and report.margin < 0.25), str(report)


@pytest.mark.parametrize(
    "compressor", ["streaming", "adakv", "int8", "fp8", "kivi", "turboquant", "rotatekv", "kvquant", "spark", "cskv"]
)
def test_a_draft_is_replayed_and_waits_for_nothing(
    model: PreTrainedModel, compressor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DraftStep.draft
    replayed: list[bool] = []

    def draft(self: DraftStep, *args: Any) -> Tensor:
        if not self._step.replays:
            return original(self, *args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            replayed.append(True)

    monkeypatch.setattr(DraftStep, "draft", draft)
    logits_of(model, compiled(model), prompt(2), 40, compressor=compressor, **WINDOW)
    assert replayed


@pytest.mark.parametrize("placement", ["device", "host"])
def test_verify_is_replayed_piece_by_piece(
    model: PreTrainedModel, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And rows are those of the launches, to the bit."""
    switch = compiled(model)
    with monkeypatch.context() as launched:
        launched.setattr(pieces, "serves", lambda device, plan: False)
        expected = logits_of(model, switch, prompt(3), 40, placement=placement, **WINDOW)
    made: list[pieces.Piece] = []
    original = pieces.Piece.__init__

    def note(self: pieces.Piece, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(pieces.Piece, "__init__", note)
    assert torch.equal(logits_of(model, switch, prompt(3), 40, placement=placement, **WINDOW), expected)
    assert made
    assert all(piece._captured.replays for piece in made)
