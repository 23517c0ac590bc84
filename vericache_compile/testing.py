"""What every compression method has to promise, as tests that its author can run on it.

    from vericache_compile.testing import compressor_suite
    TestMine = compressor_suite("mine", "mine(keep=0.5)")        # in any test file; pytest finds it

The regions of a method are looked at on random rows; then two tiny random models, one with grouped queries and one
without, generate with it, and have to give the tokens of plain `generate`. It takes some seconds per method; pytest and
transformers are needed. The same checks run on our own methods.

Shapes: H query heads, K KV heads, S tokens, D head size, Dv value head size, w queries, B batch, T prompt tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from vericache_compile.backend import vericache
from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.none import NoCompression
from vericache_compile.compressors.spec import parse
from vericache_compile.errors import OptionError
from vericache_compile.model_state import state_of

if TYPE_CHECKING:
    import pytest

    from vericache_compile.runtime.caches import DraftKV

VOCABULARY = 97
KV_HEADS = {"grouped queries": 2, "one query head per KV head": 4}
"""Of the 4 heads of the tiny models."""
GATHER = 8
"""Tokens that gather in a tail before they are compressed in, so that few new tokens do it several times."""
EXACT = 4
"""The newest of them, which stay."""
ROWS = ((0, 0), (1, 3), (5, 0), (40, 90), (300, 1), (300, 300))
"""Tokens compressed, and tokens that join."""
NO_NUMBERS = (math.nan, True, "half")
"""What no numeric parameter takes."""
NUMBERS = (-1, 0, 2**64 + 1)
"""A parameter that refuses one of these has a range."""


def compressor_suite(*texts: str) -> type:
    """A class of tests for the methods that `texts` name, each written as the option `compressor` is."""
    import pytest

    dtypes = [torch.float32, torch.bfloat16]

    @pytest.mark.parametrize("text", texts)
    class CompressorSuite:
        """One method; bind it to a name that begins with Test."""

        @pytest.mark.parametrize("dtype", dtypes, ids=str)
        def test_regions_are_what_they_say(self, text: str, dtype: torch.dtype) -> None:
            for tokens, more in ROWS:
                check_region(parse(text, {}), *random_row(tokens + more, dtype=dtype), tokens)

        def test_keeping_all_is_the_full_cache(self, text: str) -> None:
            taken = parse(text, {}).parameters
            if "keep" not in taken or "bits" in taken or "keep" in text:
                pytest.skip("it has no fraction to keep, or says its own, or stores what it keeps in fewer bits")
            for tokens, more in ROWS:
                check_whole(parse(text, {"keep": 1.0}), *random_row(tokens + more), tokens)

        def test_wrong_parameters_are_refused(self, text: str) -> None:
            check_refusals(text)

        @pytest.mark.parametrize("heads", KV_HEADS)
        def test_a_padded_batch_gives_plain_tokens(self, text: str, heads: str, gathering: None) -> None:
            check_tokens(text, KV_HEADS[heads], tokens=300, batch=3, count=30)

        def test_a_prompt_within_the_budget_gives_plain_tokens(self, text: str, gathering: None) -> None:
            check_tokens(text, 2, tokens=9, batch=3, count=5)

        def test_a_long_output_gives_plain_tokens(self, text: str, gathering: None) -> None:
            check_long_output(text, tokens=120, batch=1, count=180)

        @pytest.fixture
        def gathering(self, monkeypatch: pytest.MonkeyPatch) -> None:
            gather_soon(monkeypatch)

    return CompressorSuite


def random_row(
    tokens: int,
    *,
    kv_heads: int = 2,
    heads: int = 4,
    queries: int = 8,
    size: int = 16,
    value_size: int = 12,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [K, S, D], values [K, S, Dv], queries [H, w, D]; the first two are views of a longer cache."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    keys, values = normal(kv_heads, tokens + 3, size), normal(kv_heads, tokens + 3, value_size)
    return keys[:, :tokens], values[:, :tokens], normal(heads, queries, size)


def check_region(method: Compressor, keys: Tensor, values: Tensor, queries: Tensor, tokens: int) -> None:
    """Compress the first `tokens` of keys [K, S, D] and values [K, S, Dv], then let the others join.

    Sizes, types and coverage are as the interface says, bytes are those allocated, nothing is shared with the cache or
    between regions, what was given is not written to, the first region stays as it was to the bit, and tokens that are
    said to be exact are.
    """
    untouched = raw_bytes((keys, values, queries))
    region = method.compress(keys[:, :tokens], values[:, :tokens], queries)
    held, covered = raw_bytes(region), region.covered
    assert 0 <= covered <= tokens, f"{covered} tokens are covered of {tokens}"
    longer = region.extend(keys[:, covered:], values[:, covered:], queries)
    assert covered <= longer.covered <= keys.shape[1], f"{longer.covered} tokens are covered of {keys.shape[1]}"
    given = {x.untyped_storage().data_ptr() for x in (keys, values, queries)}
    for each in (region, longer):
        _check_sizes(each, keys, values)
        own = storages(each)
        assert each.nbytes == sum(own.values()), f"nbytes is {each.nbytes}, allocated are {sum(own.values())}"
        assert not (own.keys() & given) - {0}, "a region keeps what it was given alive: own a copy"
    assert not (storages(region).keys() & storages(longer).keys()) - {0}, "extend shares memory with the old region"
    assert region.covered == covered, "extend changed the old region"
    assert all(map(torch.equal, raw_bytes(region), held)), "extend changed the old region's bytes"
    now = raw_bytes((keys, values, queries))
    assert all(map(torch.equal, now, untouched)), "keys, values or queries are written to: they are the full cache's"
    for each in (region, longer):
        _check_exact(each, keys, values)
        _check_attend(each, keys, values, queries)


def _check_sizes(region: CompressedKV, keys: Tensor, values: Tensor) -> None:
    assert region.slots <= region.covered, f"{region.slots} slots for {region.covered} tokens"
    for read, x in zip(region.materialize(), (keys, values), strict=True):
        assert read.shape == (x.shape[0], region.slots, x.shape[2]), f"materialize gives {tuple(read.shape)}"
        assert read.dtype == x.dtype, f"materialize gives {read.dtype} for a cache of {x.dtype}"


def _check_exact(region: CompressedKV, keys: Tensor, values: Tensor) -> None:
    count, covered = region.exact, region.covered
    assert 0 <= count <= region.slots, f"{count} tokens are exact in {region.slots} slots"
    for read, x in zip(region.materialize(), (keys, values), strict=True):
        held, newest = read[:, region.slots - count :], x[:, covered - count : covered]
        assert torch.equal(held, newest), f"the last {count} tokens, which are exact, are not as they were cached"


def _check_attend(region: CompressedKV, keys: Tensor, values: Tensor, queries: Tensor) -> None:
    """Where a region attends itself, that is attention to its numbers and to those behind."""
    if not (tail := (keys[:, region.covered :], values[:, region.covered :]))[0].shape[1]:
        return
    query = queries[:, -1]
    if not region.attends:
        return
    given = region.attend(query, tail, 0.25)
    k, v = (torch.cat(pair, dim=1).float() for pair in zip(region.select(query), tail, strict=True))
    grouped = torch.unflatten(query.float(), 0, (len(k), -1))
    expected = ((grouped @ k.mT * 0.25).softmax(dim=2) @ v).flatten(0, 1)
    assert given.shape == expected.shape, f"attend gives {tuple(given.shape)}, not [H, Dv]"
    assert given.dtype == query.dtype, f"attend gives {given.dtype} for queries of {query.dtype}"
    near = 2e-2 if query.itemsize == 2 else 1e-4
    torch.testing.assert_close(given.float(), expected, atol=near, rtol=near)


def check_whole(method: Compressor, keys: Tensor, values: Tensor, queries: Tensor, tokens: int) -> None:
    """A method that keeps everything reproduces the full cache, to the bit."""
    region = method.compress(keys[:, :tokens], values[:, :tokens], queries)
    longer = region.extend(keys[:, region.covered :], values[:, region.covered :], queries)
    for each in (region, longer):
        assert each.slots == each.covered, f"keep=1.0 keeps {each.slots} of {each.covered} tokens"
        for read, x in zip(each.materialize(), (keys, values), strict=True):
            assert torch.equal(read, x[:, : each.covered]), "keep=1.0 is not the full cache"


def check_refusals(text: str) -> None:
    """Options that a method does not take, and values that make no sense, raise OptionError, which says what does.

    Where the method is a dataclass, so for every parameter that is a number.
    """
    made: Any = parse(text, {})
    wrong: list[tuple[str, object]] = [("no_such_option", 1)]
    wrong += [("keep", value) for value in (0, -0.5, 1.5, True, "half")]
    wrong += [("bits", value) for value in (0, -4, True, "four")]
    for name, value in wrong:
        taken = name in made.parameters
        if taken and name in text:
            continue  # it says its own
        fix = _refused(text, name, value, lambda option: parse(text, option))
        assert fix is not None, f"{text!r} takes {name}={value!r}"
        assert _is_ranged(fix) or not taken, f"{text!r} refuses {name}={value!r}, and does not say what it takes"
    for name in _numeric(made):
        senseless, outside = (
            [_refused(text, name, value, lambda option: replace(made, **option)) for value in values]
            for values in (NO_NUMBERS, NUMBERS)
        )
        for value, fix in zip(NO_NUMBERS, senseless, strict=True):
            assert fix is not None, f"{text!r} takes {name}={value!r}"
        said = [fix for fix in senseless + outside if fix is not None]
        ranged = outside == [None] * len(NUMBERS) or all(map(_is_ranged, said))
        assert ranged, f"{text!r} refuses a {name}, and does not say what it takes: {said}"


def _numeric(method: Any) -> Iterator[str]:
    """Names of the parameters that are numbers."""
    for field in fields(method) if is_dataclass(method) else ():
        value = getattr(method, field.name)
        may_be = value is None and re.fullmatch(r"(int|float) \| None", str(field.type))
        if field.init and (may_be or type(value) in (int, float)):
            yield field.name


def _refused(text: str, name: str, value: object, make: Callable[[dict[str, object]], object]) -> str | None:
    """What the OptionError says to do that making the method so raises; None where it is made."""
    try:
        make({name: value})
    except OptionError as error:
        found, fix = error.found, error.fix
    else:
        return None
    assert f"{name}={value!r}" in found, f"{text!r} refuses {name}={value!r}, and names {found}"
    return fix


def _is_ranged(fix: str) -> bool:
    return any(letter.isdigit() for letter in fix)


def check_tokens(text: str, kv_heads: int, *, tokens: int, batch: int, count: int) -> None:
    """A tiny model's `count` new tokens over this method are those of plain greedy `generate`, and their logits are, to
    the bit, those over no compression at all."""
    plain, none = _plain_tokens(kv_heads, tokens, batch, count), _rows_of_none(kv_heads, tokens, batch, count)
    given, rows = _generate(text, kv_heads, tokens, batch, count)
    assert torch.equal(given, plain), f"{text!r} changes tokens"
    assert torch.equal(rows, none), f"{text!r} changes bits of logits"


def check_long_output(text: str, *, tokens: int, batch: int, count: int) -> None:
    """As `check_tokens`, over so many new tokens that the method compresses anew several times, or takes in later ones.

    At least twice. Under `gather_soon`, else few tokens would ever join.
    """
    with _joins() as joins:
        check_tokens(text, 2, tokens=tokens, batch=batch, count=count)
    state = state_of(list(tiny_model(2)[0].parameters()))
    assert state is not None and state.latest is not None and state.latest.session.newest is not None, "it has run"
    counts, draft = state.latest.session.counts, state.latest.session.newest.draft
    assert counts.rounds > 0, f"{text!r} drafts nothing"
    if state.latest.session.compressor.refresh:
        assert counts.refreshes >= 2, f"{text!r} was compressed anew {counts.refreshes} times"
        return
    assert draft is not None, "rounds have a draft cache"
    compressor, sites = state.latest.session.compressor, range(len(draft.layers))
    own = [site for site in sites if not isinstance(compressor.for_layer(site, len(sites)), NoCompression)]
    reached = {min(covered[site] for site in own or sites) for made, covered in joins if made is compressor}
    found = f"{text!r} covers {sorted(reached)} tokens as {count} join {tokens}"
    assert sum(covered > tokens for covered in reached) >= 2, f"{found}, and more twice: use smaller blocks"


@contextmanager
def _joins() -> Iterator[list[tuple[Compressor, list[int]]]]:
    """The compressor, and how many tokens of the first row each site covers, after each time that tokens join.

    Drafting never rests meanwhile: nothing is compressed anew while it does.
    """
    from unittest.mock import patch

    from vericache_compile.runtime import drafting
    from vericache_compile.runtime.compression import extend
    from vericache_compile.runtime.pace import Pace

    joins: list[tuple[Compressor, list[int]]] = []

    def noted(draft: DraftKV, *args: Any) -> None:
        extend(draft, *args)
        joins.append((draft.compressor, [layer.regions[0].covered for layer in draft.layers]))

    with patch.object(drafting, "extend", noted), patch.object(Pace, "note"):
        yield joins


def gather_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens gather in a tail before they are compressed in, all but the last few."""
    from vericache_compile.runtime import compression, drafting

    monkeypatch.setattr(drafting, "CHUNK", GATHER)
    monkeypatch.setattr(compression, "EXACT", EXACT)


def generate_rows(model: Any, prompt: Any, count: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, T + count] and their logits [count, B, V]."""
    how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**prompt, max_new_tokens=count, **how)
    return out.sequences, torch.stack(out.logits)


def _generate(text: str, kv_heads: int, tokens: int, batch: int, count: int) -> tuple[Tensor, Tensor]:
    model, switch = tiny_model(kv_heads)
    switch.options = {"compressor": text, "window": 4, "inductor": False}
    return generate_rows(model, make_prompt(tokens, batch), count)


@cache
def _rows_of_none(kv_heads: int, tokens: int, batch: int, count: int) -> Tensor:
    return _generate("none", kv_heads, tokens, batch, count)[1]


class Switch:
    """The backend under options that may change between calls, so that Dynamo captures a model once for all of them."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def __call__(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile for the options of now; calls compile for others as they come up."""
        made = {str(self.options): vericache(module, example_inputs, options=self.options)}

        def call(*inputs: Any) -> Any:
            key = str(self.options)
            if key not in made:
                made[key] = vericache(module, example_inputs, options=self.options)
            return made[key](*inputs)

        return call


@cache
def tiny_model(kv_heads: int) -> tuple[Any, Switch]:
    """A random model of three layers and four heads, and the backend that it is compiled with."""
    made, switch = _make_tiny(kv_heads), Switch()
    made.compile(backend=switch)
    return made, switch


def _make_tiny(kv_heads: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        initializer_range=0.2,  # wide, so that logits are far from ties
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@cache
def _plain_tokens(kv_heads: int, tokens: int, batch: int, count: int) -> Tensor:
    made: Tensor = _make_tiny(kv_heads).generate(**make_prompt(tokens, batch), max_new_tokens=count, do_sample=False)
    return made


def make_prompt(tokens: int, batch: int = 1, vocabulary: int = VOCABULARY, seed: int = 0) -> dict[str, Tensor]:
    """Random input_ids [B, T] and attention_mask; rows after the first are shorter, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for b in range(1, batch):
        pad = tokens * b // (batch + 1)
        ids[b, :pad], mask[b, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def find_tensors(value: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that a region holds, in containers and plain objects within it too.

    Not in its method, nor in what can be called: that may read the full cache. `seen` are ids of what was looked at.
    """
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        for item in _within(value):
            yield from find_tensors(item, seen)


def _within(value: object) -> Iterable[object]:
    if isinstance(value, list | tuple | set):
        return value
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, CompressedKV) or not (callable(value) or isinstance(value, Compressor | ModuleType)):
        return getattr(value, "__dict__", {}).values()
    return ()


def storages(region: CompressedKV) -> dict[int, int]:
    """Address and bytes of each storage that a region holds (address 0: of an empty one)."""
    return {x.data_ptr(): x.nbytes() for x in (tensor.untyped_storage() for tensor in find_tensors(region))}


def raw_bytes(value: object) -> list[Tensor]:
    """A copy of every byte of the tensors in a region or a tuple."""
    return [
        tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        for tensor in find_tensors(value)
        if tensor.numel()
    ]
