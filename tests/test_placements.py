"""Wherever full KV lives, and however little of it fits in the ring, output rows are the same to the bit."""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import streams
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, make_prompt, make_tiny
from test_canonical import compiled, logits_of, random_guess, shared, use_drafter
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vericache_compile import backend, load, stats
from vericache_compile.compressors import table
from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.dense import DenseKV
from vericache_compile.estimate import Measured
from vericache_compile.machine import Bandwidths
from vericache_compile.model_state import state_of
from vericache_compile.plan import Site, Way
from vericache_compile.runtime import compression, drafting, pace, repeat, rounds, tiers
from vericache_compile.runtime.caches import BLOCK, FullKV, bytes_of
from vericache_compile.runtime.pace import Pace
from vericache_compile.runtime.ring import Ring, aligned
from vericache_compile.runtime.tiers import Home, PagedKV

ELSEWHERE: list[dict[str, Any]] = [
    {"placement": "host", "staging_mb": 0.001},
    {"placement": "host", "staging_mb": 0.6, "link_gbps": 0.5},
    {"placement": "host", "compressor": "none"},
    {"placement": "host", "compressor": "streaming", "staging_mb": 0.001},
    {"placement": "host", "compressor": "adakv", "staging_mb": 0.001},
    {"placement": "disk", "staging_mb": 64},
    {"placement": "disk", "staging_mb": 0.001, "compressor": "kivi"},
]
EAGER = {"window": 8, "inductor": False}


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Sites that come at the same time, of every ring that comes into use."""
    seen: set[int] = set()
    fit = Ring.fit

    def note(self: Ring, nbytes: int, needs: Sequence[int], *rest: Any) -> None:
        fit(self, nbytes, needs, *rest)
        assert self.buffer is not None
        seen.add(sum(end <= self.buffer.nbytes for end in itertools.accumulate(map(aligned, needs))) or 1)

    monkeypatch.setattr(Ring, "fit", note)
    return seen


@pytest.mark.parametrize(("name", "batch"), [("llama", 1), pytest.param("gpt2", 3, marks=pytest.mark.slow)])
def test_rows_are_bit_equal_wherever_full_kv_lives(
    name: str, batch: int, rings: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make_tiny(name, layers=3), make_prompt(500, batch)
    switch = compiled(model)
    first = logits_of(model, switch, inputs, 40, **EAGER)
    for choice in ELSEWHERE:
        assert torch.equal(first, logits_of(model, switch, inputs, 40, **choice, **EAGER)), choice
        assert stats(model)["placement"] == choice["placement"]
        held_on_the_device = choice.get("compressor") == "none" and batch == 1
        assert bool(stats(model)["bytes"]["transferred"]) != held_on_the_device, "columns of padding always come in"
    assert rings >= {1, 3}
    use_drafter(monkeypatch, random_guess(VOCABULARY))
    for choice in ({"placement": "host", "staging_mb": 0.001}, {"placement": "disk"}):
        assert torch.equal(first, logits_of(model, switch, inputs, 40, **choice, **EAGER)), "random guesses"


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_rows_are_bit_equal_on_a_link_of_streams(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, in inference mode; on streams on which everything happens at once."""
    monkeypatch.setattr(drafting, "CHUNK", 12)
    model, inputs = make_tiny("llama").to(dtype), make_prompt(500, 2)
    switch = compiled(model)
    first = logits_of(model, switch, inputs, 60, **EAGER)
    streams.use(monkeypatch)
    for choice in ({}, {"staging_mb": 0.001}, {"staging_mb": 0.001, "compressor": "kivi"}):
        with torch.inference_mode():
            made = logits_of(model, switch, inputs, 60, placement="host", **choice, **EAGER)
        assert torch.equal(first, made), choice
        assert stats(model)["bytes"]["transferred"]


@pytest.mark.parametrize(
    "compressor",
    ["snapkv", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adakv", "streaming", "h2o", "chunkkv"))],
)
def test_what_drafts_hold_as_it_was_cached_does_not_come_in_again(
    compressor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while tails are compressed in: same rows, and fewer bytes over the link."""
    monkeypatch.setattr(drafting, "CHUNK", 12)
    (model, switch), inputs = shared("llama", "what drafts hold"), make_prompt(500, 3)
    first = logits_of(model, switch, inputs, 60, **EAGER)
    came = []
    for keep in (0.5, 0.25):
        how = {"placement": "host", "staging_mb": 0.001, "compressor": compressor, "keep": keep}
        assert torch.equal(first, logits_of(model, switch, inputs, 60, **how, **EAGER))
        made = stats(model)["bytes"]
        came.append(made["transferred"] / stats(model)["rounds"] / made["full"])
        assert bool(made["set_apart"]) == (compressor != "streaming"), "it lets go of tokens when others join"
    assert came[0] < came[1] < 0.9


@pytest.mark.parametrize(
    "compressor",
    [
        "quest(keep=0.2, page=4, whole=1)",
        pytest.param("clusterkv(keep=0.2, tokens=8, whole=1)", marks=pytest.mark.slow),
    ],
)
def test_what_draft_steps_choose_comes_from_where_full_kv_lives(
    compressor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows and the same drafts, from the device, host memory and a file."""
    monkeypatch.setattr(Pace, "note", lambda *_: None)  # whether drafting rests is the clock's to say
    (model, switch), inputs = shared("llama", "what drafts hold"), make_prompt(500, 3)
    first = logits_of(model, switch, inputs, 40, **EAGER)
    accepted = []
    for placement in ("device", "host", "disk"):
        how = {"placement": placement, "compressor": compressor, "keep": None}
        assert torch.equal(first, logits_of(model, switch, inputs, 40, **how, **EAGER)), placement
        made = stats(model)
        accepted.append((made["rounds"], made["accepted"]))
        assert bool(made["bytes"]["recalled"]) == (placement != "device")
    assert accepted[0] == accepted[1] == accepted[2]


class BoastfulKV(DenseKV):
    """Says that it holds all its tokens as they were cached."""

    lie = ""

    @property
    def exact(self) -> int:
        """All, whatever it holds."""
        return self.covered

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> BoastfulKV:
        """Of what joins the half, where that is the lie."""
        factor = 0.5 if self.lie in ("all halved", "later ones halved") else 1.0
        made = BoastfulKV(
            torch.cat([self.keys, keys * factor], 1),
            torch.cat([self.values, values * factor], 1),
            self.covered + keys.shape[1],
        )
        made.lie = self.lie
        return made


@dataclass(frozen=True)
class Boastful(Compressor):
    """A method whose regions are not what they say."""

    name: ClassVar[str] = "boastful"
    parameters: ClassVar[tuple[str, ...]] = ("lie",)

    lie: str = "all halved"

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> BoastfulKV:
        """Half of each number, or half of the tokens, or all as it is."""
        covered = keys.shape[1]
        if self.lie == "all halved":
            keys, values = keys * 0.5, values * 0.5
        elif self.lie == "more than it holds":
            keys, values = keys[:, covered // 2 :], values[:, covered // 2 :]
        made = BoastfulKV(*(x.clone(memory_format=torch.contiguous_format) for x in (keys, values)), covered)
        made.lie = self.lie
        return made


@pytest.mark.parametrize("placement", ["host", pytest.param("disk", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lie", ["all halved", "later ones halved", "more than it holds"])
def test_a_method_that_is_wrong_about_what_it_holds_costs_no_bit(
    lie: str, placement: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it says is compared, when regions are made and when tokens join them; said once."""
    monkeypatch.setattr(drafting, "CHUNK", 12)
    monkeypatch.setitem(table._registered, "boastful", Boastful)
    compression._tell_inexact.cache_clear()
    (model, switch), inputs = shared("llama", "what drafts hold"), make_prompt(500, 3)
    first = logits_of(model, switch, inputs, 60, **EAGER)
    how = {"placement": placement, "staging_mb": 0.001, "compressor": f"boastful(lie='{lie}')"}
    for _ in range(2):
        assert torch.equal(first, logits_of(model, switch, inputs, 60, **how, **EAGER))
    [told] = [r.getMessage() for r in caplog.records if "as they say" in r.getMessage()]
    assert all(part in told for part in ("where: compressor Boastful", lie, "fix: correct `exact`"))


@settings(max_examples=8, deadline=None)
@given(
    placement=st.sampled_from(["host", "disk"]),
    staging=st.floats(1e-6, 2.0),
    compressor=st.sampled_from(["snapkv", "adakv", "streaming", "kivi", "none"]),
    batch=st.sampled_from([1, 3]),
)
def test_rows_are_bit_equal_for_any_ring(placement: str, staging: float, compressor: str, batch: int) -> None:
    (model, switch), inputs = shared("llama", "what drafts hold"), make_prompt(400, batch)
    how = {"placement": placement, "staging_mb": staging, "compressor": compressor}
    assert torch.equal(
        logits_of(model, switch, inputs, 24, **EAGER), logits_of(model, switch, inputs, 24, **how, **EAGER)
    )


@pytest.mark.parametrize("placement", [pytest.param("host", marks=pytest.mark.slow), "disk"])
def test_threads_decode_side_by_side(placement: str) -> None:
    """One model, a cache per thread: each gets the rows that it gets alone."""
    model, inputs = make_tiny("llama"), [make_prompt(300 + 40 * i, seed=i)["input_ids"] for i in range(3)]
    model.compile(backend="vericache", options={"placement": placement, "staging_mb": 0.001, **EAGER})

    @torch.no_grad()
    def rows(ids: Tensor) -> Tensor:
        cache, made = DynamicCache(), []
        for _ in range(30):
            made.append(model(ids, past_key_values=cache).logits[:, -1:])
            ids = made[-1].argmax(-1)
        return torch.cat(made, dim=1)

    alone = [rows(ids) for ids in inputs]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(rows, inputs))
    assert all(map(torch.equal, alone, together))


def test_nothing_is_set_apart_where_it_would_not_pay() -> None:
    """Where the ring takes all, or regions are made anew all the time: rows are the same, all of full KV comes."""
    model, inputs = make_tiny("llama"), make_prompt(500)
    switch = compiled(model)
    first = logits_of(model, switch, inputs, 40, **EAGER)
    small = {"placement": "host", "staging_mb": 0.001}
    for how in ({**small, "staging_mb": 64}, {**small, "compressor": "h2o(refresh=16)"}):
        assert torch.equal(first, logits_of(model, switch, inputs, 40, **how, **EAGER))
        assert stats(model)["bytes"]["set_apart"] == 0
    logits_of(model, switch, inputs, 1, **small, **EAGER)
    assert stats(model)["bytes"]["set_apart"] > 0, "prefill has set it apart already"


@pytest.mark.parametrize("compressor", ["snapkv", pytest.param("none", marks=pytest.mark.slow)])
def test_a_prefill_leaves_one_sites_kv_on_the_device(compressor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a site computed is gone when the next one stores its own; a second turn's past of it too."""
    model = make_tiny("llama", layers=4)
    model.compile(backend="vericache", options={"placement": "host", "compressor": compressor, **EAGER})
    append, read = PagedKV.append, PagedKV.read
    stored, came = list[Any](), list[Any]()
    alive = list[tuple[int, int]]()

    def watch(*tensors: Tensor, of: list[Any]) -> None:
        of.extend(weakref.ref(x.untyped_storage()) for x in tensors)

    def watched_append(self: PagedKV, layer: int, k: Tensor, v: Tensor, columns: Sequence[int]) -> None:
        watch(k, v, of=stored)
        append(self, layer, k, v, columns)
        alive.append(tuple(len({ref() for ref in held} - {None}) for held in (stored, came)))

    def watched_read(self: PagedKV, *where: int) -> tuple[Tensor, Tensor]:
        made = read(self, *where)
        watch(*made, of=came)
        return made

    monkeypatch.setattr(PagedKV, "append", watched_append)
    monkeypatch.setattr(PagedKV, "read", watched_read)
    cache, ids = DynamicCache(), make_prompt(300)["input_ids"]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :20], past_key_values=cache)
    assert alive == [(2, 0)] * 4 + [(2, 1)] * 4


def grow(model: Any, given: Tensor, cache: DynamicCache, count: int) -> Tensor:
    """`count` greedy tokens after `given`, all of which are seen."""
    mask = torch.ones_like(given)
    settings = {"max_new_tokens": count, "do_sample": False, "past_key_values": cache}
    made: Tensor = model.generate(given, attention_mask=mask, **settings)
    return made


def plain_turns(model: PreTrainedModel, drive: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """What `drive` gives uncompiled, and compiled with full KV in host memory."""
    plain = drive(model)
    model.compile(backend="vericache", options={"placement": "host", "staging_mb": 0.001, **EAGER})
    return plain, drive(model)


def test_turns_crops_and_forks() -> None:
    """A second turn, a crop into the first, a copy that goes its own way."""

    def drive(model: Any) -> Tensor:
        cache, ids = DynamicCache(), make_prompt(330)["input_ids"]
        first = grow(model, ids, cache, 20)
        second = grow(model, torch.cat([first, ids[:, :40]], 1), cache, 20)
        fork = copy.deepcopy(cache)
        third = grow(model, torch.cat([second, ids[:, 50:60]], 1), cache, 20)
        forked = grow(model, torch.cat([second, ids[:, 70:90]], 1), fork, 20)
        cache.crop(-(cache.get_seq_length() - 280))
        cropped = grow(model, torch.cat([ids[:, :280], ids[:, :9]], 1), cache, 20)
        return torch.cat([third, forked, cropped], 1)

    plain, ours = plain_turns(make_tiny("llama"), drive)
    assert torch.equal(plain, ours)


def test_beams_share_pages() -> None:
    plain, ours = plain_turns(
        make_tiny("llama"),
        lambda model: model.generate(**make_prompt(300), max_new_tokens=6, num_beams=3, do_sample=False),
    )
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("placement", ["host", pytest.param("device", marks=pytest.mark.slow)])
def test_memory_of_forks_of_one_prefix(placement: str) -> None:
    """A copy costs nothing until it is used: then the page that it writes to, on the device all of full KV."""
    model, ids = make_tiny("llama"), make_prompt(1100)["input_ids"]
    options = {"placement": placement, "compressor": "streaming", "keep": 0.1, "draft_dtype": "same", **EAGER}
    model.compile(backend="vericache", options=options)
    cache = DynamicCache()
    prefix = grow(model, ids, cache, 2)
    alone = stats(model)["bytes"]
    forks = [copy.deepcopy(cache) for _ in range(4)]
    assert stats(model)["bytes"] == alone
    for i, fork in enumerate(forks):
        grow(model, torch.cat([prefix, ids[:, i : i + 3]], 1), fork, 9)
    found = stats(model)["bytes"]
    each = BLOCK * found["per_token_full"] if placement == "host" else found["full"]
    drafts = alone["draft"] + 4 * found["draft"]
    assert found["all_sequences"] == alone["full"] + 4 * each + drafts


def test_one_model_under_two_placements_shares_its_sequences() -> None:
    """A cache that was built under one configuration is continued under another."""
    model, ids = make_tiny("llama"), make_prompt(300)["input_ids"]
    plain = grow(model, ids, DynamicCache(), 30)
    switch = compiled(model)
    cache = DynamicCache()
    given = ids
    for options in ({"placement": "host"}, {"placement": "device"}, {"placement": "disk"}):
        switch.options = {**options, **EAGER}
        given = grow(model, given, cache, 10)
    assert torch.equal(given, plain)


def test_a_fault_reaches_the_caller_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transfer that fails raises in the call that needed it; the same call works once the fault is gone."""
    model, ids = make_tiny("llama"), make_prompt(300)["input_ids"]
    plain = grow(model, ids, DynamicCache(), 30)
    model.compile(backend="vericache", options={"placement": "host", **EAGER})
    cache = DynamicCache()
    given = grow(model, ids, cache, 4)
    copy_to = PagedKV.copy_to

    def broken(*_: Any, **__: Any) -> Iterator[int]:
        raise OSError("the link is down")

    monkeypatch.setattr(PagedKV, "copy_to", broken)

    def go_on() -> None:
        nonlocal given
        for _ in range(20):
            given = grow(model, given, cache, 1)

    with pytest.raises(OSError, match="link is down"):
        go_on()
    monkeypatch.setattr(PagedKV, "copy_to", copy_to)
    given = grow(model, given, cache, plain.shape[1] - given.shape[1])
    assert torch.equal(given, plain)


TOKENS = 512 * 2 * 2 * (16 + 16) * 4
"""Bytes of full KV of the tiny model over two blocks."""


@pytest.fixture
def close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are planned with few tokens beyond their prompt, for a fast link, and as if drafts were good."""
    monkeypatch.setattr(load.Auto, "tokens_per_round", None)
    monkeypatch.setattr(load, "bandwidths", lambda device: Bandwidths(10.0, 50.0))
    monkeypatch.setattr(tiers, "GROWTH", 16)


def on_device(model: PreTrainedModel) -> int:
    """Bytes of KV that are on the device, of all sequences, and of the ring."""
    state = state_of(list(model.parameters()))
    assert state is not None
    return int(state.table.taken().held + state.table.taken().ring)


def test_auto_leaves_the_device_when_its_room_is_taken(close: None) -> None:
    """With room for the first of two sequences, the second goes to host memory."""
    model = make_tiny("llama")
    prompt = make_prompt(300)
    plain = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    model.compile(backend="vericache", options={"device_memory_mb": 2.6 * TOKENS / 2**20, **EAGER})
    cache, other = DynamicCache(), DynamicCache()
    settings = {"max_new_tokens": 12, "do_sample": False}
    for own, placement, way in ((cache, "device", Way.RESIDENT), (other, "host", Way.SWAPPED)):
        assert torch.equal(model.generate(**prompt, past_key_values=own, **settings), plain)
        assert (stats(model)["placement"], stats(model)["way"]) == (placement, way)
    assert on_device(model) <= 1.05 * 2.6 * TOKENS


@pytest.mark.parametrize(("compressor", "way"), [("streaming(keep=0.05)", Way.RESIDENT), ("int8", Way.OFF)])
def test_auto_leaves_room_for_drafts(compressor: str, way: Way, close: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device on which full KV has room, and two fifths of it besides: exact tails take three tenths."""
    monkeypatch.setattr(Home, "_free", staticmethod(lambda device: int(1.4 * TOKENS)))
    monkeypatch.setattr(load, "bandwidths", lambda device: Bandwidths(10.0, 0.01))
    torch._dynamo.reset()
    for model in (make_tiny("llama"), make_tiny("llama")):  # the second one is served by the first one's graphs
        model.compile(backend="vericache", options={"compressor": compressor, "draft_dtype": "same", **EAGER})
        model.generate(**make_prompt(300), max_new_tokens=4, do_sample=False)
        assert stats(model)["way"] == way


def rows_of(model: PreTrainedModel, inputs: dict[str, Tensor], count: int) -> Tensor:
    """Greedy logits [count, B, V]; no cache is held afterwards."""
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**inputs, max_new_tokens=count, **settings).logits)


@pytest.mark.parametrize(
    ("link_gbps", "way"), [pytest.param(1000.0, Way.SWAPPED, marks=pytest.mark.slow), (0.01, Way.OFF)]
)
def test_auto_weighs_the_link_where_drafts_do_not_fit(
    link_gbps: float, way: Way, close: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Over a slow link decoding in place without drafts is the faster one: then none are made, nor room for them."""
    model, inputs = make_tiny("llama"), make_prompt(300)
    model.compile(backend="vericache", options=EAGER)
    first = rows_of(model, inputs, 20)
    how = {"device_memory_mb": 1.38 * TOKENS / 2**20, "link_gbps": link_gbps, "staging_mb": 0.01, **EAGER}
    model.compile(backend="vericache", options=how)
    with caplog.at_level("INFO", "vericache_compile"):
        assert torch.equal(first, rows_of(model, inputs, 20))
    made = stats(model)
    assert made["way"] == way
    assert f"vericache: {way}, 1 x 316 tokens" in caplog.text
    assert (made["rounds"] == made["rounds_without_drafts"] == 19) is (way == Way.OFF)
    assert bool(made["bytes"]["draft"]) is (way == Way.SWAPPED)
    assert made["bytes"]["full_on_device"] == (TOKENS if way == Way.OFF else 0)
    assert (made["bytes"]["stored"] >= 319 * TOKENS / 512) is (way == Way.SWAPPED), "every column went to host memory"


@pytest.mark.parametrize(
    "compressor",
    ["snapkv", *(pytest.param(name, marks=pytest.mark.slow) for name in ("quest(whole=0)", "h2o", "kvzip", "kivi"))],
)
def test_a_sequence_that_outgrows_the_device_goes_on_in_host_memory(
    compressor: str, close: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows are the same to the bit, whatever drafts say."""
    model, inputs = make_tiny("llama"), make_prompt(300, 2)
    model.compile(backend="vericache", options=EAGER)
    first = rows_of(model, inputs, 260)
    how = {"device_memory_mb": 3.3 * TOKENS / 2**20, "compressor": compressor, **EAGER}
    model.compile(backend="vericache", options=how)
    tiers._tell_moved.cache_clear()
    moved, move = [], Home.moved

    def note(self: Home, full: FullKV, columns: int, device: torch.device) -> FullKV:
        moved.append(columns)
        return move(self, full, columns, device)

    monkeypatch.setattr(Home, "moved", note)
    for _ in range(2):
        assert torch.equal(first, rows_of(model, inputs, 260))
        assert stats(model)["way"] == Way.SWAPPED
        assert stats(model)["bytes"]["full_on_device"] == 0
        assert on_device(model) <= 1.2 * 3.3 * TOKENS
        use_drafter(monkeypatch, random_guess(VOCABULARY))
    assert len(moved) == 2
    assert all(480 < columns < 512 for columns in moved)
    assert caplog.text.count("full KV goes on in host memory") == 1


@pytest.mark.slow
@pytest.mark.parametrize("compressor", ["h2o", "kvzip"])
def test_what_has_moved_is_cropped_and_goes_on(compressor: str, close: None) -> None:
    """Further turns, and another try at one, of a sequence that began on the device."""
    model, ids = make_tiny("llama"), make_prompt(300, 2)["input_ids"]
    how = {"device_memory_mb": 3.3 * TOKENS / 2**20, "compressor": compressor, **EAGER}

    def talk() -> list[Tensor]:
        cache, out = DynamicCache(config=model.config), []
        given = grow(model, ids, cache, 215)
        for turn, crop in ((1, 0), (2, 0), (3, 260)):
            if crop:
                cache.crop(crop - cache.get_seq_length())
            given = torch.cat(
                [given[:, : cache.get_seq_length() + 1], make_prompt(5, 2, seed=turn)["input_ids"]], dim=1
            )
            given = grow(model, given, cache, 20)
            out.append(given)
        return out

    plain = talk()
    model.compile(backend="vericache", options=how)
    made = talk()
    assert stats(model)["way"] == Way.SWAPPED
    assert all(map(torch.equal, made, plain))


def test_a_device_without_memory_for_growth_leaves_it_to_host_memory(
    monkeypatch: pytest.MonkeyPatch, close: None
) -> None:
    """There was room by the count, and not in one piece; where an explicit placement asks for the device, it raises."""
    model, inputs, move = make_tiny("llama"), make_prompt(300), FullKV._move
    plain = model.generate(**inputs, max_new_tokens=260, do_sample=False)

    def refuse(self: FullKV, room: int, device: torch.device) -> None:
        move(self, room, device) if room <= 512 else refused()

    def refused() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FullKV, "_move", refuse)
    model.compile(backend="vericache", options={"device_memory_mb": 1000, **EAGER})
    assert torch.equal(model.generate(**inputs, max_new_tokens=260, do_sample=False), plain)
    assert stats(model)["way"] == Way.SWAPPED
    model.compile(backend="vericache", options={"placement": "device", **EAGER})
    with pytest.raises(torch.OutOfMemoryError):
        model.generate(**inputs, max_new_tokens=260, do_sample=False)


@pytest.mark.parametrize("placement", ["device", pytest.param("host", marks=pytest.mark.slow)])
@pytest.mark.parametrize("made", [0, 1])
def test_a_device_without_memory_for_drafts_goes_on_without(
    placement: str, made: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, close: None
) -> None:
    """For a while, then they are tried again; it may be the first draft cache, or what is compressed into one."""
    model, inputs = make_tiny("llama"), make_prompt(300)
    plain = model.generate(**inputs, max_new_tokens=200, do_sample=False)
    monkeypatch.setattr(pace, "REST", 4)
    rounds._say_no_room.cache_clear()
    name = ("compress", "extend")[made]
    real, failures = getattr(drafting, name), [2]

    def refuse(*given: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    monkeypatch.setattr(drafting, name, refuse)
    model.compile(backend="vericache", options={"placement": placement, "compressor": "int8", **EAGER})
    assert torch.equal(model.generate(**inputs, max_new_tokens=200, do_sample=False), plain)
    found = stats(model)
    assert failures == [made and 1]
    assert found["drafted"] > 0
    assert found["rounds_without_drafts"] >= (4 if made else 4 + 8)
    assert sum("no device memory" in record.getMessage() for record in caplog.records) == 1


def test_a_repetition_without_memory_gives_its_room_back(monkeypatch: pytest.MonkeyPatch, close: None) -> None:
    """It fails half-way: full KV is as large as without it, and rounds go on without drafts."""
    model, inputs = make_tiny("llama"), make_prompt(300)
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    real, left = repeat._repeat, iter(range(4))

    def refuse(*given: Any) -> None:
        if next(left) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(*given)

    monkeypatch.setattr(repeat, "_repeat", refuse)
    held = []
    for compressor in ("kvzip", "streaming"):
        model.compile(backend="vericache", options={"placement": "device", "compressor": compressor, **EAGER})
        assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), plain)
        held.append((stats(model)["bytes"]["full"], stats(model)["drafted"] > 0))
    assert held == [(held[1][0], False), (held[1][0], True)]


@pytest.mark.slow
def test_auto_knows_which_layers_slide(close: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt's graph by what it cuts off its caches."""
    seen: list[list[int | None]] = []
    measure = backend.measure

    def note(compressor: Compressor, sites: Sequence[Site]) -> Measured:
        seen.append([site.window for site in sites])
        return measure(compressor, sites)

    monkeypatch.setattr(backend, "measure", note)
    model, inputs = make_tiny("gemma3_text"), make_prompt(300)
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    model.compile(backend="vericache", options={"device_memory_mb": 1000, **EAGER})
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), plain)
    assert any(seen[0])
    assert seen[0] == seen[-1]


@pytest.mark.parametrize("count", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_forks_leave_the_device_when_its_room_is_taken(count: int, close: None) -> None:
    """Copies of one prefix share what host memory holds of it."""
    model, ids = make_tiny("llama"), make_prompt(300)["input_ids"]
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    model.compile(backend="vericache", options={"device_memory_mb": 4.5 * TOKENS / 2**20, **EAGER})
    cache, held = DynamicCache(), []
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    for own in [copy.deepcopy(cache) for _ in range(count)]:
        assert torch.equal(model.generate(ids, past_key_values=own, max_new_tokens=12, do_sample=False), plain)
        assert on_device(model) <= 1.1 * 4.5 * TOKENS
        held.append(own)
    assert stats(model)["way"] == Way.SWAPPED


@pytest.mark.slow
def test_a_prompt_in_chunks_is_weighed_as_one(close: None) -> None:
    """Its first chunk would fit, and full KV of all of them, but not drafts' besides."""
    model, inputs = make_tiny("llama"), make_prompt(900)
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    how = {"device_memory_mb": 2.3 * TOKENS / 2**20, "compressor": "int8", **EAGER}
    model.compile(backend="vericache", options=how)
    for chunk in (None, 200):
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False, prefill_chunk_size=chunk)
        assert torch.equal(made, plain)
        assert stats(model)["way"] == Way.SWAPPED
        assert on_device(model) <= 1.05 * 2.3 * TOKENS


@pytest.mark.slow
def test_what_auto_chose_is_no_choice_of_another_placement(close: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that was decoded without drafts goes on with them."""
    monkeypatch.setattr(load, "bandwidths", lambda device: Bandwidths(10.0, 0.01))
    model, cache, ids = make_tiny("llama"), DynamicCache(), make_prompt(300)["input_ids"]
    plain = model.generate(ids, max_new_tokens=40, do_sample=False)
    model.compile(backend="vericache", options={"device_memory_mb": 1.2 * TOKENS / 2**20, **EAGER})
    ids = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert stats(model)["way"] == Way.OFF
    model.compile(backend="vericache", options={"placement": "device", **EAGER})
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False), plain)
    assert stats(model)["way"] == Way.RESIDENT
    assert stats(model)["drafted"] > 0


def test_drafts_that_never_pay_are_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow, wrong drafts: after a few rounds there are none, rows are the same, and stats say so."""
    model, inputs = make_tiny("llama"), make_prompt(300)
    switch = compiled(model)
    first = logits_of(model, switch, inputs, 60, **EAGER)

    def guess(start: Tensor, steps: int) -> Tensor:
        time.sleep(0.2 * bool(steps))
        return torch.zeros(start.shape[0], steps, dtype=torch.int64)

    use_drafter(monkeypatch, guess)
    assert torch.equal(first, logits_of(model, switch, inputs, 60, keep=0.5, **EAGER))
    assert stats(model)["rounds_without_drafts"] > 40
    before = stats(model)["drafted"]
    assert torch.equal(first, logits_of(model, switch, inputs, 60, keep=0.5, **EAGER))
    assert stats(model)["drafted"] == before + 3, "the next sequence begins warily"


def test_drafts_that_the_caller_throws_away_are_turned_off() -> None:
    """Right drafts, of a caller that always goes on with the second best token: most rounds are without."""
    model, ids = make_tiny("llama"), make_prompt(60)["input_ids"]
    plain = make_tiny("llama")

    def second_best(model: Any) -> Tensor:
        cache, fed, rows = DynamicCache(config=model.config), ids, []
        with torch.no_grad():
            for _ in range(80):
                rows.append(model(fed, past_key_values=cache).logits[:, -1])
                fed = rows[-1].topk(2).indices[:, 1:]
        return torch.cat(rows)

    expected = second_best(plain)
    model.compile(backend="vericache", options={"compressor": "none", **EAGER})
    torch.testing.assert_close(second_best(model), expected)
    found = stats(model)
    assert found["rounds_without_drafts"] > 50
    assert found["drafted"] <= 40


class Malloc(ctypes.Structure):
    """What `mallinfo2` of glibc gives."""

    _fields_ = [(name, ctypes.c_size_t) for name in (*"abcd", "mapped", *"ef", "used", *"gh")]


@pytest.mark.parametrize(
    ("placement", "many"),
    [("disk", 40), *(pytest.param(name, 200, marks=pytest.mark.slow) for name in ("disk", "host"))],
)
def test_many_sequences_leave_nothing_behind(placement: str, many: int, tmp_path: Path) -> None:
    """Threads, files and memory are as many as after the first ones."""
    model = make_tiny("llama")
    options = {"placement": placement, "kv_folder": str(tmp_path), **EAGER}
    model.compile(backend="vericache", options=options)
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Malloc

    def left() -> tuple[int, int, int, int]:
        gc.collect()
        files = sum(1 for _ in Path("/proc/self/fd").iterdir())
        tensors = bytes_of(*(x for x in gc.get_objects() if type(x) is Tensor))
        found = mallinfo()
        return threading.active_count(), files, tensors, found.used + found.mapped

    counts = list[tuple[int, int, int, int]]()
    for number in range(many):
        model.generate(**make_prompt(260, seed=number), max_new_tokens=2, do_sample=False)
        if number in (*range(25, 30), *range(many - 5, many)):
            counts.append(left())
    before, after = (list(zip(*each, strict=True)) for each in (counts[:5], counts[5:]))
    assert all(min(now) <= max(then) for now, then in zip(after[:3], before[:3], strict=True))
    grown = min(after[3]) - max(before[3])
    assert grown < stats(model)["bytes"]["full"] / 4, "of all sequences less than a page of one stays allocated"
    assert not list(tmp_path.iterdir())


INTERRUPTED = """
import signal, sys, threading
sys.path.insert(0, sys.argv[1])
from models import make_prompt, make_tiny

signal.signal(signal.SIGINT, signal.default_int_handler)


class Tell:
    def put(self, tokens):
        print("at work", flush=True)

    def end(self):
        print("ended by itself", flush=True)


model = make_tiny("llama")
options = {"placement": "disk", "kv_folder": sys.argv[2], "staging_mb": 0.001, "link_gbps": 0.002}
model.compile(backend="vericache", options={**options, "window": 8, "inductor": False})
try:
    model.generate(**make_prompt(600), max_new_tokens=3000, do_sample=False, streamer=Tell())
finally:
    print([x.name for x in threading.enumerate() if not x.daemon], flush=True)
"""


def test_a_program_that_is_interrupted_while_it_generates_ends(tmp_path: Path) -> None:
    """Ctrl-C between two tokens or in a round, with transfers from a file under way; no thread holds it up."""
    command = [sys.executable, "-c", INTERRUPTED, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for _ in range(30):
            assert running.stdout.readline() == "at work\n"
        links = [str(path.readlink()) for path in Path(f"/proc/{running.pid}/fd").iterdir()]
        assert any(link.startswith(str(tmp_path)) for link in links), "there is no file of pages"
        try:
            line = "at work\n"
            while line == "at work\n":  # torch clears an interrupt that comes while it checks guards, with any backend
                running.send_signal(signal.SIGINT)
                for _ in range(50):
                    line = running.stdout.readline()
                    if line != "at work\n":
                        break
            out, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert line + out == "['MainThread']\n"
    assert "KeyboardInterrupt" in err
    assert running.returncode == -signal.SIGINT
    assert not list(tmp_path.iterdir())
