"""`vericache explain`: its tables, its JSON, and its exit codes."""

from __future__ import annotations

import json

import pytest
import torch
from models import make_tiny
from torch import Tensor
from transformers import AttentionInterface

from vericache_compile import cli_explain
from vericache_compile.cli import main

ARGUMENTS = ["explain", "--window", "4", "--draft-dtype", "same"]


def test_json_is_the_explanation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli_explain, "load", lambda *args: (make_tiny("llama", layers=3), None))
    assert main([*ARGUMENTS, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["window"] == 4
    assert [site["layer"] for site in made["sites"]] == [0, 1, 2]
    assert made["not_taken"] == []


@pytest.mark.slow
def test_tables_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(cli_explain, "load", lambda *args: (make_tiny("gpt2", layers=3), None))
    assert main(ARGUMENTS) == 0
    text = capsys.readouterr().out
    assert "0-2" in text
    assert "4, 3 of them distinct" in text
    assert "at 4,096 tokens" in text


def attend_by_relu(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: object
) -> tuple[Tensor, None]:
    """Attention without a softmax."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return ((q @ k.mT).relu() @ v).transpose(1, 2), None


def test_a_model_that_is_not_taken_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny("llama", layers=3)
    AttentionInterface.register("relu", attend_by_relu)
    model.set_attn_implementation("relu")
    monkeypatch.setattr(cli_explain, "load", lambda *args: (model, None))
    assert main(ARGUMENTS) == 1
    text = capsys.readouterr().out
    assert "not taken (graph 0): no scaled_dot_product_attention call" in text
    assert "where: " in text
    assert 'fix: load the model with attn_implementation="sdpa"' in text


def test_equal_layers_are_one_row() -> None:
    site = dict.fromkeys(cli_explain.SITE, 1)
    sites = [site | {"layer": layer, "heads": 1 + (layer == 2)} for layer in range(4)]
    assert [row[:2] for row in cli_explain.site_rows(sites)] == [("0-1", "1"), ("2", "2"), ("3", "1")]
