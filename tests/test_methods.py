"""Every compression method by its name, end to end: tokens are those of plain greedy decoding."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from vericache_compile import stats
from vericache_compile.compressors.table import COMPRESSORS, make_compressor
from vericache_compile.testing import (
    KV_HEADS,
    check_long_output,
    check_tokens,
    gather_soon,
    make_prompt,
    tiny_model,
)


@pytest.fixture(autouse=True)
def gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens gather in a tail before they are compressed in."""
    gather_soon(monkeypatch)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("heads", [pytest.param(n, marks=pytest.mark.slow) if n == 4 else n for n in KV_HEADS.values()])
@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_tokens_are_plain(name: str, heads: int, batch: int) -> None:
    for tokens, count in ((9, 5), (300, 30)):
        check_tokens(name, heads, tokens=tokens, batch=batch, count=count)
    assert stats(tiny_model(heads)[0])["rounds"] > 0


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("snapkv(keep=0.1, refresh=12)", marks=pytest.mark.slow),
        "h2o(keep=0.1, refresh=12)",
        pytest.param("kvzip(keep=0.1, refresh=30)", marks=pytest.mark.slow),
        "kivi",
        "0: quest(whole=0, page=4, keep=0.1), rest: clusterkv(whole=0, keep=0.1)",
        pytest.param("0: none, rest: streaming(keep=0.1, refresh=12) | int8", marks=pytest.mark.slow),
        pytest.param("chunkkv(keep=0.2, reuse=2)", marks=pytest.mark.slow),
    ],
)
def test_long_outputs_are_plain(text: str) -> None:
    """A cache that is compressed anew several times, or that later tokens join, or that every step chooses from."""
    check_long_output(text, tokens=120, batch=3, count=80)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_long_outputs_of_every_method_are_plain(name: str) -> None:
    """Compressed anew every 24 tokens, where the method can be, and joined by later ones."""
    refreshed = any(field.name == "refresh" for field in fields(make_compressor(name)))
    texts = [name, f"{name}(refresh=24)"] if refreshed else [name]
    count = {"gear": 180, "kvquant": 180, "lagkv": 290}.get(name, 150)  # two of their blocks
    for text in texts:
        check_long_output(text, tokens=120, batch=1, count=count)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h2o", "expected_attention"])
def test_what_is_noted_can_be_added_to_in_any_mode(name: str) -> None:
    """A prefill under inference_mode, then steps under no_grad and inference_mode by turns."""
    from transformers import DynamicCache

    model, switch = tiny_model(2)
    switch.options = {"compressor": name, "window": 4, "inductor": False}
    ids = make_prompt(100)["input_ids"]
    cache, fed, given = DynamicCache(), ids, []
    for step in range(20):
        with torch.inference_mode() if step % 2 == 0 else torch.no_grad():
            fed = model(input_ids=fed, past_key_values=cache).logits[:, -1:].argmax(-1)
            given.append(int(fed))
    check_tokens(name, 2, tokens=100, batch=1, count=20)
    assert given == model.generate(ids, max_new_tokens=20, do_sample=False)[0, 100:].tolist()
