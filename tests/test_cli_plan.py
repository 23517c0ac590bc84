"""`vericache plan`: a choice with its arithmetic, from a configuration and numbers alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import LlamaConfig

from vericache_compile.cli import main

GPU = ["--device", "cuda", "--device-memory", "141", "--memory-bandwidth", "4800", "--link-bandwidth", "55"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the configuration of a model of 8B parameters, and no weights."""
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        dtype="bfloat16",
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return str(folder)


def plan(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> Any:
    assert main(["plan", *args]) == code
    return capsys.readouterr().out


def test_the_choice_and_its_arithmetic(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, "--model", model, "--context", "128000", "--batch", "5", *GPU)
    assert "resident verify" in out
    assert "round = draft + verify" in out
    assert "transfer = full KV" in out


def test_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(plan(capsys, "--model", model, "--context", "128000", "--batch", "5", "--json", *GPU))
    assert found["choice"] == "resident verify"
    assert found["load"]["kv"] == 32 * 2 * 8 * 128 * 2
    assert found["load"]["weights"] == pytest.approx(16.06e9, rel=0.01)
    assert {each["name"] for each in found["choices"]} >= {"swapped verify", "off (plain decoding)"}


def test_nothing_fits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "--model",
        model,
        "--context",
        "128000",
        "--device",
        "cuda",
        "--memory-bandwidth",
        "1",
        "--link-bandwidth",
        "1",
    ]
    assert "nothing fits" in plan(capsys, *args, "--device-memory", "8", code=1)


def test_a_cpu_needs_a_size(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    bandwidths = ["--memory-bandwidth", "20", "--link-bandwidth", "5"]
    assert main(["plan", "--model", model, "--context", "4000", "--device", "cpu", *bandwidths]) == 2
    assert "--device-memory" in capsys.readouterr().err
