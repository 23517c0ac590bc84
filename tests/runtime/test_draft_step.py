"""Draft steps with their lengths on the device: tokens and caches of the step with lengths in Python, to the bit.

On the CPU the same code runs: with the reference's attention, and with the Triton kernels in their interpreter.
"""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from graphs import Toy, toy_decode
from models import VOCABULARY, make_prompt, make_tiny
from test_canonical import compiled, logits_of
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from vericache_compile.kernels import draft_attention, launch, native, verify_attention
from vericache_compile.kernels.calls import Calls
from vericache_compile.passes.pipeline import plan_capture
from vericache_compile.plan import DecodePlan
from vericache_compile.runtime import capture, compression, draft_step, drafting, incoming, rounds
from vericache_compile.runtime.caches import DraftKV
from vericache_compile.runtime.capture import Captured, Launch, Pool
from vericache_compile.runtime.draft_step import DraftStep
from vericache_compile.sweep_models import make_model

METHODS: dict[str, dict[str, Any]] = {
    "none": {"compressor": "none"},
    "streaming": {"compressor": "streaming", "keep": 0.3},
    "adakv": {"compressor": "adakv", "keep": 0.3},
    "kivi": {"compressor": "kivi", "bits": 2},
    "int8": {"compressor": "int8"},
    "turboquant": {"compressor": "turboquant"},
    "chain": {"compressor": "snapkv(keep=0.5) | kivi(bits=4)"},
}
OPTIONS: dict[str, Any] = {"inductor": False, "draft_dtype": "same"}


def layers_of(draft: DraftKV) -> list[Tensor]:
    return [held for layer in draft.layers for held in (layer.keys, layer.values)]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In every round both ways draft from the same state, and must agree; the compressors of the rounds so far."""
    original = rounds.draft_tokens
    compared: list[str] = []

    def draft_tokens(sequence: Any, draft: DraftKV, *rest: Any) -> Tensor:
        before = [held.clone() for held in layers_of(draft)]
        with monkeypatch.context() as switched:
            switched.setattr(draft_step, "serves", lambda device, plan, draft: False)
            expected = original(sequence, draft, *rest)
        written = [held.clone() for held in layers_of(draft)]
        for held, was in zip(layers_of(draft), before, strict=True):
            held.copy_(was)
        with monkeypatch.context() as switched:
            switched.setattr(draft_step, "serves", lambda device, plan, draft: True)
            made = original(sequence, draft, *rest)
        assert torch.equal(made, expected)
        assert all(torch.equal(a, b) for a, b in zip(layers_of(draft), written, strict=True))
        compared.append(draft.compressor.name)
        return made

    monkeypatch.setattr(rounds, "draft_tokens", draft_tokens)
    return compared


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_tokens_and_caches_are_those_of_lengths_in_python(batch: int, compared: list[str]) -> None:
    """Rows of the batch advance on their own."""
    model = make_tiny("llama")
    switch = compiled(model)
    methods = METHODS if batch > 1 else {name: METHODS[name] for name in ("none", "kivi")}
    for method in methods.values():
        logits_of(model, switch, make_prompt(150, batch), 24, **method, window=4, **OPTIONS)
    assert len(set(compared)) == len(methods)
    assert len(compared) > 3 * len(methods)


@pytest.mark.skipif(native.load() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("batch", "dtype", "options"),
    [
        (1, torch.float32, {"draft_dtype": "int8", "compressor": "none"}),
        (3, torch.float32, {"draft_dtype": "same", "compressor": "snapkv", "keep": 0.9}),
        pytest.param(2, torch.bfloat16, {"draft_dtype": "int8", "compressor": "none"}, marks=pytest.mark.slow),
    ],
)
def test_on_the_cpu_steps_are_calls_that_are_recorded(
    batch: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    compared: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To the bit what goes through Python gives, also when regions have been compressed anew."""
    monkeypatch.setattr(drafting, "CHUNK", 16)
    replays: list[None] = []
    replay = Calls.replay

    def counted(self: Calls) -> None:
        replays.append(None)
        replay(self)

    monkeypatch.setattr(Calls, "replay", counted)
    model = make_tiny("llama").to(dtype)
    with caplog.at_level(logging.INFO, "vericache_compile"):
        logits_of(model, compiled(model), make_prompt(150, batch), 60, **options, window=4)
    assert not [told for told in caplog.messages if "through Python" in told]
    assert len(replays) > 15
    assert len(compared) > 10


@pytest.mark.skipif(native.load() is None, reason="no C++ compiler")
def test_under_autocast_steps_that_cannot_be_recorded_give_the_same_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys come in another type than the cache's; what drafts hold is not brought in again, so it has to be right."""
    capture._note.cache_clear()
    model, inputs = make_tiny("llama"), make_prompt(300)
    switch = compiled(model)
    options = {"window": 4, "placement": "host", "staging_mb": 0.001}
    with torch.autocast("cpu", torch.bfloat16):
        with monkeypatch.context() as launched:
            launched.setattr(draft_step, "serves", lambda device, plan, draft: False)
            first = logits_of(model, switch, inputs, 24, **options)
        with caplog.at_level(logging.INFO, "vericache_compile"):
            assert torch.equal(logits_of(model, switch, inputs, 24, **options), first)
    assert [told for told in caplog.messages if "a draft step goes through Python" in told]


@pytest.mark.parametrize("name", ["gpt_oss", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_sinks_and_soft_caps_are_part_of_a_step(name: str, compared: list[str]) -> None:
    model = make_model(name, "eager")
    logits_of(model, compiled(model), make_prompt(60), 16, compressor="streaming", window=4, **OPTIONS)
    assert len(compared) > 2


def test_full_kv_from_elsewhere_is_asked_for_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers are no part of a recording, and begin when drafting begins all the same."""
    model = make_tiny("llama")
    switch, inputs = compiled(model), make_prompt(150)
    first = logits_of(model, switch, inputs, 16, window=4, **OPTIONS)
    monkeypatch.setattr(draft_step, "serves", lambda device, plan, draft: True)
    asked: list[int] = []
    ahead: list[list[int]] = []
    prefetch, draft_tokens = incoming.PagedIncoming.prefetch, rounds.draft_tokens

    def note(self: incoming.PagedIncoming, layer: int) -> None:
        asked.append(layer)
        prefetch(self, layer)

    def drafting(*args: Any) -> Tensor:
        asked.clear()
        drafted = draft_tokens(*args)
        ahead.append(list(asked))
        return drafted

    monkeypatch.setattr(incoming.PagedIncoming, "prefetch", note)
    monkeypatch.setattr(rounds, "draft_tokens", drafting)
    assert torch.equal(logits_of(model, switch, inputs, 16, window=4, placement="host", **OPTIONS), first)
    assert ahead[0]
    assert all(layers in ([0, 1], []) for layers in ahead), "none where drafting rests"


@pytest.mark.parametrize("method", [{"compressor": "streaming", "keep": 0.1}, {"compressor": "kivi", "bits": 2}])
def test_a_step_lives_as_long_as_its_buffers(
    method: dict[str, Any], monkeypatch: pytest.MonkeyPatch, compared: list[str]
) -> None:
    """It goes on over regions that have grown in place, and no cycle holds its buffers until a garbage collection."""
    monkeypatch.setattr(drafting, "CHUNK", 16 if method["compressor"] == "streaming" else 64)
    if method["compressor"] == "kivi":
        monkeypatch.setattr(compression, "leaves_room", lambda device: True)
    steps: list[weakref.ref[DraftStep]] = []
    buffers: list[list[int]] = []
    grown: list[None] = []
    step_of, extend = draft_step.step_of, drafting.extend

    def note_step(draft: DraftKV, *rest: Any) -> DraftStep:
        step = step_of(draft, *rest)
        assert draft.step is step
        steps.append(weakref.ref(step))
        [region], keys = draft.layers[0].regions, draft.layers[0].keys
        codes = [keys] if region.packed is None else [keys, region.packed[0].codes]
        buffers.append([part.data_ptr() for part in codes])
        return step

    def note_growth(*args: Any) -> None:
        grown.append(None)
        extend(*args)

    monkeypatch.setattr(draft_step, "step_of", note_step)
    monkeypatch.setattr(drafting, "extend", note_growth)
    model = make_tiny("llama")
    options = {**method, "window": 4}
    gc.disable()
    try:
        with torch.inference_mode():
            logits_of(
                model,
                compiled(model),
                make_prompt(100),
                120 if method["compressor"] == "streaming" else 320,
                **options,
                **OPTIONS,
            )
        alive = [step() for step in steps]
    finally:
        gc.enable()
    made = len(set(map(id, steps)))  # an object has one weak reference
    moved = sum(one != other for one, other in itertools.pairwise(buffers))
    assert 1 < made == 1 + moved < len(grown)
    assert len(compared) == len(steps)
    assert alive[0] is None
    step = alive[-1]
    assert step is not None
    assert not any(held.is_inference() for held in (step.starts, step.before, *(site.lefts for site in step.sites)))
    assert step.fits(step.plan, step.bound, 3)
    assert not step.fits(step.plan, step.bound, 4), "no room for the tokens"
    others = [None if tensor is None else tensor.clone() for tensor in step.bound]
    assert not step.fits(step.plan, others, 3), "other weights"


def test_a_caller_that_repeats_a_token_is_drafted_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have ended are fed padding whatever is predicted."""
    monkeypatch.setattr(draft_step, "serves", lambda device, plan, draft: True)
    model = make_tiny("llama")
    inputs = make_prompt(40, 3)
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    model.generation_config.eos_token_id = int(plain[0, 43])
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    model.compile(backend="vericache", options={"compressor": "none", "window": 4, **OPTIONS})
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), plain)


@pytest.mark.parametrize("works", [True, False])
def test_steps_are_replayed_or_where_recording_fails_launched(
    works: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same tokens; a failure is said once, however many draft caches there are."""
    replays: list[None] = []

    def record(launched: Launch[None], pool: Pool) -> tuple[Any, None]:
        if not works:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def replay() -> None:
            replays.append(None)
            launched()

        return SimpleNamespace(replay=replay), None

    capture._tell.cache_clear()
    monkeypatch.setattr(capture, "record", record)
    monkeypatch.setattr(drafting, "CHUNK", 8)
    monkeypatch.setattr(draft_step, "serves", lambda device, plan, draft: True)
    monkeypatch.setattr(draft_step, "Captured", lambda device, what, calls: Captured(torch.device("cuda"), what))
    model, inputs = make_tiny("llama"), make_prompt(40, 3)
    plain = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    model.compile(backend="vericache", options={"compressor": "streaming", "window": 4, **OPTIONS})
    with caplog.at_level(logging.WARNING, "vericache_compile"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=30, do_sample=False), plain)
    assert bool(replays) == works
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (not works)
    assert works or all(part in told[0] for part in ("a draft step", "CUDA out of memory", "where:", "fix:"))


def count_launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kernel is launched from here on."""
    counts: dict[str, int] = {}

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    watch(verify_attention, "merge_splits")
    watch(draft_attention, "merge_splits")
    watch(draft_attention, "_attend_region")
    return counts


@pytest.fixture
def tiny() -> PreTrainedModel:
    """A model so small that an interpreter can run it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("name", "batch"), [pytest.param("streaming", 2, marks=pytest.mark.slow), ("kivi", 1)])
def test_a_model_on_triton_kernels_gives_plain_tokens(
    name: str, batch: int, tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draft attention, verify attention and verify's products, all in Triton: the path of a GPU."""
    inputs, counts = make_prompt(70, batch), count_launches(monkeypatch)
    plain = tiny.generate(**inputs, max_new_tokens=5, do_sample=False)
    tiny.compile(backend="vericache", options={**METHODS[name], "window": 4, **OPTIONS})
    assert torch.equal(tiny.generate(**inputs, max_new_tokens=5, do_sample=False), plain)
    assert counts["merge_splits"] > 4, "attention ran elsewhere"
    assert bool(counts.get("_attend_region")) == (name == "kivi")


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("batch", [1, 2])
def test_rows_on_triton_kernels_do_not_depend_on_the_draft(batch: int, tiny: PreTrainedModel) -> None:
    """The canonical contract on a GPU's path: other compressors, other rounds, the same bits."""
    inputs, switch = make_prompt(250, batch), compiled(tiny)
    first = logits_of(tiny, switch, inputs, 10, compressor="none", window=4, **OPTIONS)
    for name in ("streaming", "kivi", "turboquant"):
        assert torch.equal(logits_of(tiny, switch, inputs, 10, **METHODS[name], window=4, **OPTIONS), first), name


def test_a_step_that_waits_for_the_host_is_launched_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with experts do: no recording holds them."""
    monkeypatch.setattr(launch, "takes", lambda *_: True)
    plan = plan_capture(toy_decode(Toy()).module, 1, 4, False, {})
    assert isinstance(plan, DecodePlan)
    draft, device = SimpleNamespace(layers=[]), torch.device("cpu")
    assert draft_step.serves(device, plan, cast("DraftKV", draft))
    waiting = replace(plan, draft=replace(plan.draft, waits_for_host=True))
    assert not draft_step.serves(device, waiting, cast("DraftKV", draft))
