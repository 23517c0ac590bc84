"""explain: the table of a model that is taken, and for others the reason, the line, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Toy
from models import make_prompt, make_tiny
from torch import Tensor, nn

from vericache_compile import explain
from vericache_compile.api import state_of
from vericache_compile.explanation import AT_TOKENS, Explanation
from vericache_compile.sweep_models import make_model

OPTIONS = {"window": 4, "compressor": "snapkv", "keep": 0.25, "draft_dtype": "same"}


def explain_toy(model: Toy, *more: Any) -> Explanation:
    """A toy's decode step over a cache of six columns that may grow."""
    cache = [torch.randn(1, model.kv_heads, 6, model.size, dtype=model.to_q.weight.dtype) for _ in range(2)]
    for held in cache:
        torch._dynamo.maybe_mark_dynamic(held, 2)
    return explain(model, torch.ones(1, 1, dtype=torch.int64), *cache, *more, options=OPTIONS)


def test_a_model_that_is_taken() -> None:
    model = make_tiny("llama", layers=3)
    made = explain(model, **make_prompt(7), options=OPTIONS)
    assert [graph["runs_as"] for graph in made.graphs][-1] == "decode"
    assert made.not_taken == []
    assert [(site["layer"], site["heads"], site["kv_heads"], site["head_size"]) for site in made.sites] == [
        (layer, 4, 2, 16) for layer in range(3)
    ]
    assert made.cache_bytes_per_token["full"] == 3 * 2 * (16 + 16) * 4
    assert made.cache_bytes_per_token["compressed"] == pytest.approx(made.cache_bytes_per_token["full"] / 4)
    assert made.segments == {"draft": {"total": 4, "distinct": 3}, "verify": {"total": 4, "distinct": 3}}
    assert set(made.nodes) == {"captured", "draft", "verify"}
    json.dumps(made.as_dict())


def test_bytes_per_step_are_weights_and_cache() -> None:
    model = make_tiny("llama")
    made = explain(model, **make_prompt(7), options=OPTIONS)
    step, token = made.bytes_per_step, int(made.cache_bytes_per_token["full"])
    weights = sum(p.numel() * 4 for p in model.parameters()) - model.get_input_embeddings().weight.numel() * 4
    assert step["weights"] == pytest.approx(weights, rel=0.02)
    assert step["full"] == step["weights"] + (AT_TOKENS + 1) * token
    assert step["verify"] == step["weights"] + (AT_TOKENS + 4) * token
    assert step["draft"] < step["full"] < step["verify"]


def test_int8_drafts_read_fewer_bytes_of_weights() -> None:
    made = explain(make_tiny("llama"), **make_prompt(7), options=OPTIONS | {"draft_dtype": "int8"})
    assert made.bytes_per_step["draft_weights"] < 0.5 * made.bytes_per_step["weights"]


def test_nothing_is_compiled_and_nothing_is_left_behind() -> None:
    model = make_tiny("gpt2")
    plain = model.generate(**make_prompt(7), max_new_tokens=5, do_sample=False)
    explain(model, **make_prompt(7), options=OPTIONS)
    assert state_of(list(model.parameters())) is None
    assert model._compiled_call_impl is None
    assert torch.equal(model.generate(**make_prompt(7), max_new_tokens=5, do_sample=False), plain)


def test_it_can_be_dumped(tmp_path: Path) -> None:
    explain(make_tiny("llama"), **make_prompt(7), options=OPTIONS | {"dump": str(tmp_path)})
    decode = sorted(tmp_path.iterdir())[-1]
    assert (decode / "11_partition.py").exists()
    assert not (decode / "11_lower.py").exists()


def test_a_graph_break_is_named_with_its_line() -> None:
    class Broken(Toy):
        def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().finish(x, past)

    made = explain_toy(Broken())
    assert made.not_taken[0]["found"].startswith("a graph break")
    assert "test_explanation.py" in made.not_taken[0]["where"]
    assert "out of forward" in made.not_taken[0]["fix"]


@pytest.mark.slow
def test_what_is_done_to_scores_is_shown() -> None:
    made = explain(make_model("bloom", "eager"), **make_prompt(7, batch=2), options=OPTIONS)
    assert {site["mask"] for site in made.sites} == {"causal with left padding (proved), ALiBi"}
    made = explain(make_model("gpt_oss", "eager"), **make_prompt(7), options=OPTIONS)
    shown = ["causal with left padding, window 16 (proved), sinks", "causal with left padding (proved), sinks"]
    assert [site["mask"] for site in made.sites] == shown
    assert made.not_taken == []


def test_a_call_without_a_cache_is_told_to_use_one() -> None:
    made = explain(make_tiny("llama"), **make_prompt(7), use_cache=False, options=OPTIONS)
    [reason] = made.not_taken
    assert "not returned" in reason["found"]
    assert "use_cache=True" in reason["fix"]
    assert "sdpa_attention.py" in reason["where"]


def test_a_mask_of_another_kind_is_named_with_its_line() -> None:
    class Banded(Toy):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
            even = torch.arange(k.shape[2]) % 2 == (k.shape[2] - 1) % 2
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=even[None], enable_gqa=True)

    [reason] = explain_toy(Banded()).not_taken
    assert "not causal with left padding" in reason["found"]
    assert "test_explanation.py" in reason["where"]


@pytest.mark.slow
def test_attention_spelled_out_has_the_same_sites() -> None:
    model = make_tiny("llama")
    fused = explain(model, **make_prompt(7), options=OPTIONS)
    model.set_attn_implementation("eager")
    spelled = explain(model, **make_prompt(7), options=OPTIONS)
    sites = [[site | {"source": "", "mask": ""} for site in made.sites] for made in (fused, spelled)]
    assert sites[0] == sites[1]
    assert spelled.not_taken == []


def test_one_call_over_a_cache_of_one_length_says_what_is_missing() -> None:
    model = Toy()
    made = explain(model, torch.ones(1, 1, dtype=torch.int64), *(torch.randn(1, 2, 6, 8) for _ in range(2)))
    assert [graph["runs_as"] for graph in made.graphs] == ["captured"]
    assert "no decode step" in made.not_taken[0]["found"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cache_that_cannot_carry_a_name_is_not_called_taken(dtype: torch.dtype) -> None:
    """A type that the backend refuses, and one in which 8 elements per head are too few."""
    made = explain_toy(Toy().to(dtype))
    assert {graph["runs_as"] for graph in made.graphs} == {"not taken"}
    [reason] = made.not_taken
    assert str(dtype) in reason["found"]
    assert "at least 16 elements" in reason["fix"]
