"""Random legal arguments of `generate`: the compiled model's tokens are the plain model's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from callers import OPTIONS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import make_prompt, make_tiny
from transformers import DynamicCache, PreTrainedModel

from vericache_compile import stats

Asked = tuple[int, int, dict[str, Any]]


@pytest.fixture(scope="module", params=["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    """A plain model and the same one compiled; the second kind has sliding layers."""
    model = make_tiny(request.param)
    model.compile(backend="vericache", options=OPTIONS)
    yield make_tiny(request.param), model
    assert stats(model)["rounds"] > 0


@st.composite
def asks(draw: st.DrawFn) -> Asked:
    """Tokens of the prompt, rows of the batch, and what else generate is asked for."""
    tokens, batch = draw(st.integers(2, 60)), draw(st.integers(1, 3))
    asked: dict[str, Any] = {"max_new_tokens": draw(st.integers(1, 40)), "do_sample": draw(st.booleans())}
    optional = {
        "repetition_penalty": st.floats(0.8, 1.5),
        "no_repeat_ngram_size": st.integers(1, 3),
        "min_new_tokens": st.integers(1, 10),
        "eos_token_id": st.integers(1, 96),
        "bad_words_ids": st.just([[3], [5, 6]]),
        "sequence_bias": st.just({(8,): 1.5, (9, 10): -2.0}),
        "forced_eos_token_id": st.integers(3, 96),
        "guidance_scale": st.floats(1.1, 2.0),
        "exponential_decay_length_penalty": st.just((5, 1.1)),
        "output_scores": st.just(value=True),
        "return_dict_in_generate": st.just(value=True),
    }
    way = draw(st.sampled_from(["plain", "beams", "chunks", "static", "lookup", "assistant", "cache"]))
    if way == "beams":
        asked["num_beams"] = draw(st.integers(2, 3))
        asked["num_return_sequences"] = draw(st.integers(1, asked["num_beams"]))
    elif way == "chunks" and tokens > 2:
        asked["prefill_chunk_size"] = draw(st.integers(1, tokens))
    elif way == "static":
        asked["cache_implementation"] = "static"
    elif way == "lookup":
        batch, asked["do_sample"], asked["prompt_lookup_num_tokens"] = 1, False, draw(st.integers(1, 4))
    elif way == "assistant":
        batch, asked["assistant_model"] = 1, draw(st.integers(0, 2))
    elif way == "cache":
        asked["past_key_values"] = DynamicCache
    if asked["do_sample"]:
        optional |= {"temperature": st.floats(0.3, 1.5), "top_k": st.integers(2, 90), "top_p": st.floats(0.5, 1.0)}
        optional |= {"typical_p": st.floats(0.5, 0.95), "min_p": st.floats(0.01, 0.2)}
    chosen = draw(st.sets(st.sampled_from(sorted(optional)), max_size=3))
    if "exponential_decay_length_penalty" in chosen:
        chosen.add("eos_token_id")  # whose score is what it raises
    return tokens, batch, asked | {name: draw(optional[name]) for name in sorted(chosen)}


def answer(model: PreTrainedModel, ask: Asked) -> torch.Tensor:
    tokens, batch, asked = ask
    asked = {name: value() if value is DynamicCache else value for name, value in asked.items()}
    if "assistant_model" in asked:
        asked["assistant_model"] = make_tiny("llama", seed=asked["assistant_model"])
    torch.manual_seed(11)
    made = model.generate(**make_prompt(tokens, batch), **asked)
    return made if isinstance(made, torch.Tensor) else made.sequences


def check(pair: tuple[PreTrainedModel, PreTrainedModel], ask: Asked) -> None:
    plain, compiled = pair
    assert torch.equal(answer(compiled, ask), answer(plain, ask))


SETTINGS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=2, derandomize=True, **SETTINGS)
@given(ask=asks())
def test_random_arguments(pair: tuple[PreTrainedModel, PreTrainedModel], ask: Asked) -> None:
    check(pair, ask)


@pytest.mark.slow
@settings(max_examples=150, **SETTINGS)
@given(ask=asks())
def test_many_random_arguments(pair: tuple[PreTrainedModel, PreTrainedModel], ask: Asked) -> None:
    check(pair, ask)
