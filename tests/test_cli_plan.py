"""`vericache plan`: a choice with its arithmetic, from a configuration and numbers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, make_tiny
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    T5Config,
)

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


def test_room_for_a_repetition_is_planned_with(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of `kvzip`, which has no draft cache yet while it takes that room."""
    words = ["--model", model, "--context", "1000", *GPU, "--json", "--compressor"]
    kvzip, adakv = (json.loads(plan(capsys, *words, name)) for name in ("kvzip(keep=0.1)", "adakv(keep=0.1)"))
    assert (kvzip["load"]["repeated"], adakv["load"]["repeated"]) == (1000, 0)
    sizes = [{each["name"]: each["device_bytes"] for each in made["choices"]} for made in (kvzip, adakv)]
    assert sizes[0]["off (plain decoding)"] == sizes[1]["off (plain decoding)"]
    whole = kvzip["load"]["weights"] + 2048 * kvzip["load"]["held_kv"]
    assert sizes[0]["resident verify"] == whole > sizes[1]["resident verify"]


def test_sliding_windows_are_planned_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen2Config(num_hidden_layers=2, layer_types=kinds, sliding_window=100, use_sliding_window=True, **sizes)
    config.save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--context", "1000", "--dtype", "float32", "--compressor", "none", "--json"]
    load = json.loads(plan(capsys, *words, *GPU))["load"]
    site = 2 * 2 * 32 * 4
    assert load["kv"] == load["draft_kv"] == pytest.approx(1.1 * site)
    assert (load["held_kv"], load["site_kv"], load["sliding_kv"]) == (2 * site, site, site)


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


def held_and_planned(
    model: Any,
    prompt: torch.Tensor,
    new: int,
    options: dict[str, Any],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> tuple[dict[str, int], dict[str, Any]]:
    """Bytes of KV that a call holds at its end, and the plan for it; drafts read the model's own weights."""
    options = {**options, "window": 8, "draft_dtype": "same"}
    model.config.save_pretrained(folder)
    model.compile(backend="vericache", options={**options, "inductor": False})
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
    batch, context = prompt.shape[0], prompt.shape[1] + new
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--model", str(folder), "--context", str(context), "--batch", str(batch), "--json", "--dtype", "float32"]
    found = json.loads(plan(capsys, *words, *GPU[2:], "--device", "cpu"))
    name = "swapped verify" if options["placement"] == "host" else "resident verify"
    [chosen] = [each for each in found["choices"] if each["name"] == name]
    chosen["beside"] = chosen["device_bytes"] - found["load"]["weights"]
    return stats(model)["bytes"], chosen


def prompt_of(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("method", "staging"),
    [
        ({"compressor": "snapkv", "keep": 0.25}, 0.4),
        pytest.param({"compressor": "int8"}, 64.0, marks=pytest.mark.slow),
        pytest.param({"compressor": "int8(residual=500)"}, 64.0, marks=pytest.mark.slow),
        pytest.param({"compressor": "snapkv", "keep": 0.25}, 64.0, marks=pytest.mark.slow),
        pytest.param({"compressor": "int8"}, 0.4, marks=pytest.mark.slow),
    ],
)
def test_what_is_planned_is_what_is_held(
    method: dict[str, Any], staging: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes of KV on the device, within 5 %."""
    options = {**method, "placement": "host", "staging_mb": staging}
    held, swapped = held_and_planned(make_tiny("llama", layers=8), prompt_of(3, 1900), 40, options, tmp_path, capsys)
    assert (swapped["staging_bytes"] < held["full"]) is (staging < 1)
    assert held["draft"] + held["staging"] == pytest.approx(swapped["beside"], rel=0.05)


@pytest.mark.parametrize(
    ("new", "placement"),
    [
        (300, "host"),
        pytest.param(1200, "device", marks=pytest.mark.slow),
        pytest.param(300, "device", marks=pytest.mark.slow),
        pytest.param(1200, "host", marks=pytest.mark.slow),
    ],
)
def test_a_cache_that_has_grown_is_no_larger_than_planned(
    new: int, placement: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"compressor": "snapkv", "keep": 0.25, "placement": placement, "staging_mb": 64.0}
    held, chosen = held_and_planned(make_tiny("llama"), prompt_of(1, 2000), new, options, tmp_path, capsys)
    assert held["draft"] + held["staging"] + held["full_on_device"] == pytest.approx(chosen["beside"], rel=0.05)


@pytest.mark.parametrize("placement", [pytest.param("device", marks=pytest.mark.slow), "host"])
def test_windows_are_planned_with_every_column_that_is_held(
    placement: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the window's first column crosses a block: then the most comes."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, num_hidden_layers=6, layer_types=kinds, sliding_window=64, head_dim=16, **sizes
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    options = {"compressor": "snapkv", "keep": 0.25, "placement": placement, "staging_mb": 64.0}
    held, chosen = held_and_planned(model, prompt_of(1, 2080), 40, options, tmp_path, capsys)
    assert held["draft"] + held["staging"] + held["full_on_device"] == pytest.approx(chosen["beside"], rel=0.05)


def test_many_rows_are_not_planned_with_int8_weights(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As `spell_products` has it: more than 16 rows read bfloat16, here the model's own."""
    words = ["--model", model, "--context", "1000", "--draft-dtype", "int8", "--json", *GPU[2:], "--device", "cpu"]
    load = {rows: json.loads(plan(capsys, *words, "--batch", str(rows)))["load"] for rows in (16, 17)}
    assert load[16]["draft_weights"] == pytest.approx(load[16]["weights"] * 1.0625 / 2)
    assert load[16]["few"] is None
    assert load[17]["draft_weights"] == load[17]["weights"]
    assert load[17]["few"] == [16, load[16]["draft_weights"]]
