"""Output rows are bit-equal whatever drafts do: compressor, keep ratio, random guesses, guesses never right."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from models import VOCABULARY, Switch, make_prompt, make_tiny
from torch import Tensor
from transformers import PreTrainedModel

from vericache_compile import stats
from vericache_compile.runtime import drafting, rounds
from vericache_compile.sweep_models import make_model

TINY = ("llama", "gpt2", "qwen3", "gemma3_text")
"""Models of `make_tiny`."""
Drafter = Callable[[Any, int, Tensor, int], Tensor]
CHOICES: list[dict[str, Any]] = [
    {"compressor": "none"},
    {"compressor": "streaming", "keep": 0.1},
    {"compressor": "snapkv", "keep": 0.05},
    {"compressor": "snapkv", "keep": 0.6},
    {"compressor": "kivi", "bits": 2},
    {"compressor": "kivi", "bits": 4},
]


ONE = Switch()
"""Models of one make that are compiled with it share what Dynamo captured."""


def compiled(model: PreTrainedModel) -> Switch:
    """The backend that the model is compiled with: its options hold for whichever model is called next."""
    model.compile(backend=ONE)
    return ONE


@cache
def shared(name: str, *group: object) -> tuple[PreTrainedModel, Switch]:
    """One small compiled model, and its backend, for a group of tests."""
    model = make_tiny(name)
    return model, compiled(model)


def logits_of(model: PreTrainedModel, switch: Switch, inputs: dict[str, Tensor], count: int, **options: Any) -> Tensor:
    """Greedy logits [count, B, V] under these options."""
    switch.options = options
    out = model.generate(
        **inputs, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return torch.stack(out.logits)


def use_drafter(monkeypatch: pytest.MonkeyPatch, guess: Callable[[Tensor, int], Tensor]) -> None:
    """Replace drafting: `guess(start tokens [B, 1], steps)` gives the drafted tokens [B, steps]."""

    def draft_tokens(
        sequence: Any, draft: Any, plan: Any, bound: Any, start: rounds.Start, horizon: int, coming: Any = None
    ) -> Tensor:
        return torch.cat([start.tokens, guess(start.tokens, horizon)], dim=1)

    monkeypatch.setattr(rounds, "draft_tokens", draft_tokens)


def random_guess(vocabulary: int) -> Callable[[Tensor, int], Tensor]:
    """Guesses drawn at random."""
    generator = torch.Generator().manual_seed(5)
    return lambda start, steps: torch.randint(0, vocabulary, (start.shape[0], steps), generator=generator)


def wrong_guess(vocabulary: int, logits: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Guesses that greedy decoding never gives at any step."""
    seen = set(logits.argmax(-1).flatten().tolist())
    never = next(token for token in range(vocabulary) if token not in seen)
    return lambda start, steps: torch.full((start.shape[0], steps), never)


@pytest.mark.parametrize("compressor", ["kvzip(keep=0.1)", "h2o(keep=0.1, refresh=8)", "quest(keep=0.1, whole=0)"])
def test_rows_do_not_depend_on_what_a_compressor_asks_for(compressor: str) -> None:
    """A context repeated behind the frontier, draft caches made anew, tokens recalled from the full cache."""
    (model, switch), inputs = shared("llama", "asks"), make_prompt(300, 3)
    expected = logits_of(model, switch, inputs, 30, compressor="none", window=8, inductor=False)
    assert torch.equal(expected, logits_of(model, switch, inputs, 30, compressor=compressor, window=8, inductor=False))


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("llama", 16),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("llama", 2), ("llama", 8), ("qwen3", 16), ("gpt2", 16))
        ),
    ],
)
def test_rows_are_bit_equal_on_tiny_models(name: str, batch: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, switch), inputs = shared(name, batch), make_prompt(520 - window, batch)
    settings = {"window": window, "inductor": False}
    first = logits_of(model, switch, inputs, 40, **CHOICES[0], **settings)
    for choice in CHOICES[1:]:
        assert torch.equal(first, logits_of(model, switch, inputs, 40, **choice, **settings)), choice
    use_drafter(monkeypatch, random_guess(VOCABULARY))
    assert torch.equal(first, logits_of(model, switch, inputs, 40, **CHOICES[1], **settings)), "random guesses"
    use_drafter(monkeypatch, wrong_guess(VOCABULARY, first))
    wrong = {"compressor": "streaming", "keep": 0.5}
    assert torch.equal(first, logits_of(model, switch, inputs, 40, **wrong, **settings)), "wrong guesses"
    assert (stats(model)["accepted"], stats(model)["served_rows"]) == (0, 39 * batch)


@pytest.mark.parametrize(
    ("name", "inductor", "dtype"),
    [
        ("llama", False, torch.bfloat16),
        *(pytest.param(name, True, torch.float32, marks=pytest.mark.slow) for name in ("llama", "qwen3")),
        *(
            pytest.param(name, False, torch.float32, marks=pytest.mark.slow)
            for name in ("llama", "gpt2", "gemma3_text", "gemma2", "bloom", "gpt_oss", "deepseek_v3", "mixtral")
        ),
    ],
)
def test_rows_do_not_depend_on_how_many_tokens_are_drafted(
    name: str, inductor: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None at all in some rounds, as where drafting rests; what verify then leaves out is in nobody's bits.

    With sliding windows, soft caps, sinks, biases by place, latent caches and experts, too.
    """
    model = make_tiny(name) if name in TINY else make_model(name, "eager")
    model, inputs = model.to(dtype), make_prompt(300 if name in TINY else 60, 3)
    switch, settings = compiled(model), {"window": 8, "inductor": inductor}
    first = logits_of(model, switch, inputs, 40, compressor="none", **settings)
    generator = torch.Generator().manual_seed(0)

    def any_number(sequence: Any, window: int) -> int:
        return int(torch.randint(0, window, (), generator=generator))

    for drafter in (None, random_guess(VOCABULARY), wrong_guess(VOCABULARY, first)):
        with monkeypatch.context() as patched:
            patched.setattr(rounds, "next_steps", any_number)
            if drafter is not None:
                use_drafter(patched, drafter)
            made = logits_of(model, switch, inputs, 40, compressor="streaming", keep=0.5, **settings)
        assert torch.equal(made, first)
    with monkeypatch.context() as patched:
        patched.setattr(rounds, "next_steps", lambda sequence, window: 0)
        assert torch.equal(logits_of(model, switch, inputs, 12, compressor="streaming", **settings), first[:12])


def test_an_error_while_a_draft_cache_grows_costs_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sites have grown in place by then: it is made anew, and rows that read from it are the same."""
    model, inputs, settings = make_tiny("llama"), make_prompt(300, 3), {"window": 8, "inductor": False}
    switch = compiled(model)
    first = logits_of(model, switch, inputs, 60, compressor="none", **settings)
    monkeypatch.setattr(drafting, "CHUNK", 16)
    extend, failed = drafting.extend, []

    def fail_once(draft: Any, *rest: Any) -> None:
        extend(draft, *rest)
        if not failed:
            failed.append(draft)
            raise RuntimeError("no memory")

    monkeypatch.setattr(drafting, "extend", fail_once)
    run_round = rounds.run_round

    def try_again(*args: Any) -> Any:
        try:
            return run_round(*args)
        except RuntimeError:
            assert args[0].draft is None
            return run_round(*args)

    monkeypatch.setattr(rounds, "run_round", try_again)
    host = {"placement": "host", "staging_mb": 0.001, **settings}
    assert torch.equal(logits_of(model, switch, inputs, 60, compressor="streaming", keep=0.5, **host), first)
    assert failed


def test_rows_do_not_depend_on_what_dynamo_saw_before() -> None:
    """A padded batch is decoded in rounds, whether its size is a number there or, after a batch of one, a symbol."""
    model, inputs, settings = make_tiny("llama"), make_prompt(30, 3), {"window": 8, "inductor": False}
    switch = compiled(model)
    first = logits_of(model, switch, inputs, 20, **settings)
    torch._dynamo.reset()
    logits_of(model, switch, make_prompt(50), 1, **settings)
    assert torch.equal(first, logits_of(model, switch, inputs, 20, **settings))
    assert stats(model)["not_taken"] == []


@pytest.fixture
def all_cores() -> Iterator[None]:
    """The suite gives each of its processes one thread; kernels that split work must keep their bits as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize(
    ("tokens", "choices"),
    [
        (
            250,
            ({**CHOICES[1], "placement": "host", "staging_mb": 8},),
        ),
        pytest.param(250, ({**CHOICES[4], "placement": "disk", "staging_mb": 2},), marks=pytest.mark.slow),
        pytest.param(750, CHOICES[2:5], marks=pytest.mark.slow),
    ],
    ids=["elsewhere", "disk", "device"],
)
def test_rows_are_bit_equal_on_smollm2(
    tokens: int,
    choices: Sequence[dict[str, Any]],
    smollm2: PreTrainedModel,
    document_ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of plain tokens: real weights and text, compiled segments, all cores, a prompt that ends near a block."""
    ids = document_ids[:, :tokens]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = smollm2.generate(**inputs, max_new_tokens=20, do_sample=False)
    switch = compiled(smollm2)
    first = logits_of(smollm2, switch, inputs, 20, **CHOICES[0])
    assert torch.equal(first.argmax(-1)[:, 0], plain[0, tokens:])
    for choice in choices:
        assert torch.equal(first, logits_of(smollm2, switch, inputs, 20, **choice)), choice
    use_drafter(monkeypatch, random_guess(smollm2.config.vocab_size))
    assert torch.equal(first, logits_of(smollm2, switch, inputs, 20, **CHOICES[1])), "random guesses"
    use_drafter(monkeypatch, wrong_guess(smollm2.config.vocab_size, first))
    assert torch.equal(first, logits_of(smollm2, switch, inputs, 20, **CHOICES[0])), "wrong guesses"
    smollm2._compiled_call_impl = None
