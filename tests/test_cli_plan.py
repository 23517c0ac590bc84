"""`vericache plan`: a choice with its arithmetic, from a configuration and numbers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, make_tiny
from transformers import DeepseekV3Config, LlamaConfig, Qwen2Config, T5Config

from vericache_compile import stats
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
    assert "transfer = 80% of full KV" in out


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


def test_a_size_of_the_ring_is_planned_with(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", model, "--context", "128000", "--batch", "5", "--staging-mb", "16384", "--json"]
    made = {each["name"]: each for each in json.loads(plan(capsys, *words, *GPU))["choices"]}
    assert made["swapped verify"]["staging_bytes"] == 16 << 30


def test_sliding_windows_are_planned_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen2Config(num_hidden_layers=2, layer_types=kinds, sliding_window=100, use_sliding_window=True, **sizes)
    config.save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--context", "1000", "--dtype", "float32", "--compressor", "none", "--json"]
    load = json.loads(plan(capsys, *words, *GPU))["load"]
    assert load["kv"] == load["draft_kv"] == pytest.approx(1.1 * 2 * 2 * 32 * 4)


def test_a_latent_cache_is_planned_with_its_own_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
    own = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 3}
    DeepseekV3Config(num_hidden_layers=3, **own, **sizes).save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--context", "1000", "--dtype", "float32", "--compressor", "none", "--json"]
    load = json.loads(plan(capsys, *words, *GPU))["load"]
    assert load["kv"] == load["draft_kv"] == pytest.approx(3 * (24 + 8) * 4)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--model", "{folder}/none"], "the model's configuration cannot be read"),
        (["--model", "{folder}"], "the model's configuration cannot be read"),
        (["--device", "foo"], "no such device"),
        (["--device", "foo", "--window", "7"], "window=7"),
    ],
)
def test_wrong_input_is_said_in_three_parts(
    words: list[str], found: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    T5Config().save_pretrained(tmp_path)
    given = [word.format(folder=tmp_path) for word in words]
    assert main(["plan", "--model", model, "--context", "1000", *GPU, *given]) == 2
    said = capsys.readouterr().err
    assert found in said
    assert "where: " in said
    assert "fix: " in said


@pytest.mark.parametrize("staging", [64.0, 0.4])
@pytest.mark.parametrize("method", [{"compressor": "snapkv", "keep": 0.25}, {"compressor": "int8"}])
def test_what_is_planned_is_what_is_held(
    method: dict[str, Any], staging: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes of KV on the device, within 5 %, of rounds whose drafts read the model's own weights."""
    model, new = make_tiny("llama", layers=8), 40
    model.config.save_pretrained(tmp_path)
    options = {**method, "staging_mb": staging, "window": 8, "draft_dtype": "same"}
    model.compile(backend="vericache", options={**options, "placement": "host", "inductor": False})
    prompt = torch.randint(5, VOCABULARY, (3, 2000), generator=torch.Generator().manual_seed(0))
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
    held = stats(model)["bytes"]
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--model", str(tmp_path), "--context", str(2000 + new), "--batch", "3", "--json", "--dtype", "float32"]
    found = json.loads(plan(capsys, *words, *GPU[2:], "--device", "cpu"))
    [swapped] = [each for each in found["choices"] if each["name"] == "swapped verify"]
    planned = swapped["device_bytes"] - found["load"]["weights"]
    assert (swapped["staging_bytes"] < held["full"]) is (staging < 1)
    assert held["draft"] + held["staging"] == pytest.approx(planned, rel=0.05)
