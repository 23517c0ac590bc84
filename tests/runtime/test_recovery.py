"""A lost page of full KV: computed again from tokens to the same bits, or a clear error; never a wrong row."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_prompt, make_tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vericache_compile import stats
from vericache_compile.api import _compilation
from vericache_compile.errors import GhostError, PageLost
from vericache_compile.plan import Tier
from vericache_compile.runtime.caches import bytes_of
from vericache_compile.runtime.pages import FilePage
from vericache_compile.runtime.recovery import Masks
from vericache_compile.runtime.tiers import PagedKV

OPTIONS = {"placement": "disk", "staging_mb": 0.001, "window": 8, "inductor": False}


def newest(model: PreTrainedModel) -> PagedKV:
    sequence = _compilation(model)[1].session.newest
    assert sequence is not None
    assert isinstance(sequence.full, PagedKV)
    return sequence.full


def damage(full: PagedKV, layer: int, row: int, index: int) -> None:
    """Overwrite a few bytes of a page in its file."""
    page = full.pages[layer][row][index]
    assert isinstance(page, FilePage)
    os.pwrite(page.file._file.fileno(), b"\xff" * 64, page.place * page.file.page_bytes + 512)


def decode(model: PreTrainedModel, prompt: dict[str, Tensor], steps: int, between: Callable[[int], None]) -> Tensor:
    """Greedy logits [steps, B, V] of a loop that feeds, every ninth time, another token than the likeliest."""
    cache, ids, mask = DynamicCache(), prompt["input_ids"], prompt["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rows = []
    with torch.no_grad():
        for step in range(steps):
            between(step)
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            rows.append(out.logits[:, -1])
            best = out.logits[:, -1].topk(2).indices
            ids = best[:, int(step % 9 == 8), None]
            mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions[:, -1:] + 1
    return torch.stack(rows)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_lost_page_comes_back_to_the_bit(batch: int, caplog: pytest.LogCaptureFixture) -> None:
    """Lost from the prompt, and later from what was decoded; some tokens were not the likeliest."""
    prompt, model = make_prompt(470, batch), make_tiny("llama", layers=3)
    model.compile(backend="vericache", options=OPTIONS)
    expected = decode(model, prompt, 100, lambda step: None)
    assert not caplog.records or "again" not in caplog.text

    def between(step: int) -> None:
        if step == 80:
            damage(newest(model), layer=1, row=batch - 1, index=0)
            damage(newest(model), layer=2, row=0, index=1)

    ours = decode(model, prompt, 100, between)
    assert torch.equal(ours, expected)
    assert caplog.text.count("computed again from its tokens") == 1
    assert stats(model)["placement"] == "host"


def test_steps_that_run_as_captured_come_back_and_keep_no_mask_each() -> None:
    """A mask with holes: rows are right after a loss, and what is noted of a step is the same at any length."""
    model, prompt = make_tiny("llama", layers=2), make_prompt(600, 2)
    prompt["attention_mask"][0, 5:9] = 0
    model.compile(backend="vericache", options=OPTIONS)
    held = []

    def note(step: int) -> None:
        if step in (20, 40, 80):
            sequence = _compilation(model)[1].session.newest
            assert sequence is not None
            assert len(sequence.calls) == step
            held.append(bytes_of(*(call.inputs[call.plan.roles.mask or 0] for call in sequence.calls)))

    expected = decode(model, prompt, 90, note)
    assert held[0] == held[1] == held[2] <= 2 * 2 * 600 * 8

    def lose(step: int) -> None:
        if step == 80:
            damage(newest(model), layer=1, row=1, index=0)

    assert torch.equal(decode(model, prompt, 90, lose), expected)
    assert stats(model)["placement"] == "host"


def test_masks_are_as_they_were_whatever_came_after() -> None:
    """Longer ones, shorter ones, others, of two sequences that go on from one; not all in buffers of their own."""
    masks, given, kept = Masks(), [], []
    for columns in (300, 301, 500, 700, 650, 701, 702):
        for hole in (5, 5, 640):
            mask = torch.ones(2, columns, dtype=torch.int64)
            mask[1, hole : hole + 3] = 0
            given.append(mask.clone())
            kept.append(masks.copy(mask))
            mask.zero_()
    assert all(map(torch.equal, given, kept))
    grown = [masks.copy(torch.ones(2, columns)) for columns in range(1, 400)]
    assert bytes_of(*grown) < 4 * bytes_of(torch.ones(2, 400))


@pytest.mark.slow
def test_the_caller_may_write_to_what_it_has_handed_over() -> None:
    """A prompt in two chunks that came in one buffer."""
    model, ids = make_tiny("llama", layers=3), make_prompt(600)["input_ids"]
    model.compile(backend="vericache", options=OPTIONS)

    def decode_chunks(fault: bool) -> Tensor:
        cache, buffer, rows = DynamicCache(), torch.empty(1, 300, dtype=torch.int64), []
        with torch.no_grad():
            for chunk in ids.split(300, dim=1):
                out = model(buffer.copy_(chunk), past_key_values=cache)
            for step in range(40):
                if fault and step == 20:
                    damage(newest(model), layer=1, row=0, index=0)
                out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache)
                rows.append(out.logits)
        return torch.cat(rows)

    assert torch.equal(decode_chunks(fault=True), decode_chunks(fault=False))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lost_page_of_other_weights_is_an_error(replaced: bool) -> None:
    """Full KV is that of the weights which made it; new ones would give another."""
    model, ids = make_tiny("llama", layers=3), make_prompt(600)["input_ids"]
    model.compile(backend="vericache", options=OPTIONS)
    cache, projection = DynamicCache(), model.model.layers[0].self_attn.v_proj
    with torch.no_grad():
        out = model(ids, past_key_values=cache)
        for step in range(20):
            if step == 10 and replaced:
                projection.weight = torch.nn.Parameter(projection.weight * 0.5)
            elif step == 10:
                projection.weight.mul_(0.5)
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=cache)
        damage(newest(model), layer=1, row=0, index=0)

        def decode_on() -> None:
            ids = out.logits[:, -1:].argmax(-1)
            for _ in range(20):
                ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)

        with pytest.raises(PageLost, match="not what was written"):
            decode_on()


def test_a_fork_that_ends_inside_a_lost_page() -> None:
    model, ids = make_tiny("llama", layers=3), make_prompt(600)["input_ids"]
    model.compile(backend="vericache", options=OPTIONS)

    def fork(fault: bool) -> Tensor:
        cache = DynamicCache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
            if fault:
                damage(newest(model), layer=1, row=0, index=1)  # columns 256 to 511
            own = copy.deepcopy(cache)
            own.crop(400 - 600)
            fed, rows = ids[:, :1], []
            for _ in range(20):
                rows.append(model(fed, past_key_values=own).logits)
                fed = rows[-1].argmax(-1)
        return torch.cat(rows)

    assert torch.equal(fork(fault=True), fork(fault=False))


def test_a_folder_may_go_once_the_prompt_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before a whole page of it was verified, too."""
    model, prompt = make_tiny("llama", layers=3), make_prompt(240)
    plain = decode(model, prompt, 40, lambda step: None).argmax(-1)
    folder = tmp_path / "pages"
    folder.mkdir()
    model.compile(backend="vericache", options={**OPTIONS, "kv_folder": str(folder)})
    ours = decode(model, prompt, 40, lambda step: folder.rmdir() if step == 5 else None)
    assert torch.equal(ours.argmax(-1), plain)
    assert "stay in host memory" in caplog.text


def test_a_second_turn_over_a_lost_page() -> None:
    model, ids = make_tiny("llama", layers=3), make_prompt(300)["input_ids"]

    def turns(model: Any, fault: bool) -> Tensor:
        cache = DynamicCache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
            if fault:
                damage(newest(model), layer=0, row=0, index=0)
            logits: Tensor = model(ids[:, :30], past_key_values=cache).logits
        return logits

    model.compile(backend="vericache", options=OPTIONS)
    assert torch.equal(turns(model, True), turns(model, False))


def test_a_copy_recovers_as_the_original_does() -> None:
    model, prompt = make_tiny("llama", layers=3), make_prompt(300)
    plain = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    model.compile(backend="vericache", options=OPTIONS)
    cache = DynamicCache()
    first = model.generate(**prompt, max_new_tokens=4, do_sample=False, past_key_values=cache)
    fork = copy.deepcopy(cache)
    settings = {"do_sample": False, "past_key_values": fork}
    longer = model.generate(first, max_new_tokens=2, attention_mask=torch.ones_like(first), **settings)
    damage(newest(model), layer=1, row=0, index=0)
    ours = model.generate(longer, max_new_tokens=34, attention_mask=torch.ones_like(longer), **settings)
    assert torch.equal(ours, plain)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [[2, 2, 0], [1, 0], [1]])
@pytest.mark.parametrize("chunk", [170, 300])
def test_rows_in_another_order(rows: list[int], chunk: int) -> None:
    """As beams are: some go on twice, some not at all; the prompt came whole, or in two chunks; then they read more."""
    model, prompt = make_tiny("llama", layers=3), make_prompt(300, 3)
    model.compile(backend="vericache", options=OPTIONS)

    def drive(fault: bool) -> Tensor:
        cache, ids, mask = DynamicCache(), prompt["input_ids"], prompt["attention_mask"]
        positions, made = (mask.cumsum(-1) - 1).clamp(min=0), []
        with torch.no_grad():
            for begin in range(0, 300, chunk):
                end = begin + len(ids[0, begin : begin + chunk])
                out = model(ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                            past_key_values=cache)  # fmt: skip
            given, at = out.logits[:, -1:].argmax(-1), positions[:, -1:]
            for step in range(40):
                if step in (12, 25):
                    order = torch.tensor(rows if step == 12 else range(len(rows))[::-1])
                    cache.reorder_cache(order)
                    given, mask, at = given[order], mask[order], at[order]
                if fault and step == 30:
                    damage(newest(model), layer=1, row=0, index=0)
                if step == 18:
                    given, at = torch.cat([given, ids[: len(rows), :6]], 1), at + torch.arange(7)
                mask, at = torch.cat([mask, torch.ones_like(given)], 1), at + 1
                out = model(given, attention_mask=mask, position_ids=at, past_key_values=cache)
                made.append(out.logits[0, -1])
                given, at = out.logits[:, -1:].argmax(-1), at[:, -1:]
            assert newest(model).tier is (Tier.HOST if fault else Tier.DISK)
        return torch.stack(made)

    assert torch.equal(drive(True), drive(False))


@pytest.mark.slow
def test_beams_over_a_lost_page(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = make_tiny("llama", layers=3), make_prompt(300)
    settings = {"do_sample": False, "max_new_tokens": 30, "num_beams": 3}
    plain = model.generate(**prompt, **settings)
    model.compile(backend="vericache", options=OPTIONS)
    reordered = 0
    reorder = DynamicCache.reorder_cache

    def reorder_and_damage(cache: DynamicCache, order: Tensor) -> None:
        nonlocal reordered
        reordered += 1
        reorder(cache, order)
        if reordered == 12:
            damage(newest(model), layer=1, row=0, index=0)

    monkeypatch.setattr(DynamicCache, "reorder_cache", reorder_and_damage)
    assert torch.equal(model.generate(**prompt, **settings), plain)
    assert newest(model).tier is Tier.HOST


@pytest.mark.parametrize("jump", [0, 5])
def test_positions_that_jump_between_rounds_leave_no_way_back(jump: int) -> None:
    """It is not remembered how rounds before the jump turned their keys."""
    model, ids = make_tiny("llama", layers=3), make_prompt(300)["input_ids"]
    model.compile(backend="vericache", options=OPTIONS)
    cache, position = DynamicCache(), torch.tensor([[300]])
    with torch.no_grad():
        given = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)

        def steps(count: int) -> None:
            nonlocal given, position
            for _ in range(count):
                given = model(given, position_ids=position, past_key_values=cache).logits[:, -1:].argmax(-1)
                position = position + 1

        steps(12)
        position = position + jump
        steps(12)
        damage(newest(model), layer=1, row=0, index=0)
        with pytest.raises(PageLost, match=r"(?s)not what was written.*where.*fix") if jump else nullcontext():
            steps(30)


def test_a_crop_into_the_prompt_is_remembered() -> None:
    """What was decoded after the crop comes back, not the prompt that stood there before; a long turn as well."""
    model, ids = make_tiny("llama", layers=3), make_prompt(700)["input_ids"]
    model.compile(backend="vericache", options=OPTIONS)

    def drive(fault: bool) -> Tensor:
        cache, rows = DynamicCache(), []
        with torch.no_grad():
            model(ids[:, :600], past_key_values=cache)
            cache.crop(-300)
            given = ids[:, :1]
            for step in range(60):
                if fault and step == 50:
                    damage(newest(model), layer=1, row=0, index=0)
                out = model(given, past_key_values=cache)
                rows.append(out.logits[:, -1])
                given = out.logits[:, -1:].argmax(-1)
            model(ids[:, :400], past_key_values=cache)
            if fault:
                assert newest(model).tier is Tier.HOST
            rows.append(model(given, past_key_values=cache).logits[:, -1])
        return torch.stack(rows)

    assert torch.equal(drive(True), drive(False))


class Talk:
    """A conversation over one cache, step by step; whoever drives it says when a page is lost."""

    def __init__(self, model: PreTrainedModel, prompt: dict[str, Tensor]) -> None:
        self.model, self.cache, self.rows = model, DynamicCache(), []
        self.ids, self.mask = prompt["input_ids"], prompt["attention_mask"]
        self.at = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -1:]
        self.read(self.ids, self.mask, (self.mask.cumsum(-1) - 1).clamp(min=0))

    def read(self, ids: Tensor, mask: Tensor, positions: Tensor) -> None:
        """A call with these tokens; the mask is of all columns."""
        how = {"attention_mask": mask, "position_ids": positions, "past_key_values": self.cache}
        logits: Tensor = self.model(ids, **how).logits
        self.mask, self.at, self.given = mask, positions[:, -1:], logits[:, -1:].argmax(-1)
        self.rows.append(logits[0, -1])

    def turn(self, count: int, more: Tensor | None = None) -> None:
        """Some tokens at once."""
        ids = self.ids[: len(self.mask), 20 : 20 + count]
        new = torch.ones_like(ids) if more is None else more
        self.read(ids, torch.cat([self.mask, new], 1), self.at + torch.arange(1, count + 1))

    def steps(self, count: int) -> None:
        """Tokens one by one."""
        for _ in range(count):
            self.read(self.given, torch.cat([self.mask, torch.ones_like(self.given)], 1), self.at + 1)

    def reorder(self, order: list[int]) -> None:
        """Rows in another order."""
        self.cache.reorder_cache(torch.tensor(order))
        self.given, self.mask, self.at = self.given[order], self.mask[order], self.at[order]

    def crop(self, count: int) -> None:
        """The last columns go; then another token than the likeliest."""
        self.cache.crop(-count)
        self.mask, self.at, self.given = self.mask[:, :-count], self.at - count, self.ids[: len(self.mask), 9:10]


def below_a_turn_of_reordered_rows(talk: Talk) -> None:
    talk.steps(3)
    talk.reorder([1, 0])
    talk.steps(3)
    talk.turn(6)
    talk.crop(8)


def below_a_turn_of_fewer_rows(talk: Talk) -> None:
    talk.steps(3)
    talk.reorder([1])
    talk.turn(6)
    talk.crop(8)


def below_a_turn_after_which_positions_jump(talk: Talk) -> None:
    talk.steps(6)
    talk.turn(6)
    talk.at = talk.at + 5
    talk.steps(3)
    talk.crop(11)


def a_turn_that_is_padded_on_the_right(talk: Talk) -> None:
    more = torch.ones(2, 6, dtype=torch.int64)
    more[1, 4:] = 0
    talk.steps(6)
    talk.turn(6, more)
    talk.given = talk.ids[:, :1]


def a_turn_whose_result_is_dropped(talk: Talk) -> None:
    kept, talk.cache = talk.cache, copy.copy(talk.cache)
    talk.cache.layers = [copy.copy(layer) for layer in kept.layers]
    before = talk.mask, talk.at, talk.given
    talk.turn(6)
    talk.cache, (talk.mask, talk.at, talk.given) = kept, before


HISTORIES = [
    below_a_turn_of_reordered_rows, pytest.param(below_a_turn_of_fewer_rows, marks=pytest.mark.slow),
    below_a_turn_after_which_positions_jump, a_turn_that_is_padded_on_the_right,
    pytest.param(a_turn_whose_result_is_dropped, marks=pytest.mark.slow),
]  # fmt: skip

NO_WAY_BACK = [below_a_turn_after_which_positions_jump]


@pytest.mark.parametrize("history", HISTORIES)
def test_whatever_went_before_rows_are_right_or_there_are_none(history: Callable[[Talk], None]) -> None:
    model = make_tiny("llama", layers=2)
    model.compile(backend="vericache", options=OPTIONS)

    def drive(fault: bool) -> list[Tensor]:
        with torch.no_grad():
            talk = Talk(model, make_prompt(300, 2))
            history(talk)
            talk.steps(2)
            if fault:
                damage(newest(model), layer=1, row=len(talk.mask) - 1, index=0)
            try:
                talk.steps(20)
            except PageLost:
                assert fault
                assert history in NO_WAY_BACK
            return talk.rows

    expected, made = drive(False), drive(True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, expected, strict=False))
    assert len(made) == len(expected) or history in NO_WAY_BACK


@pytest.mark.slow
def test_a_copy_of_a_state_that_was_dropped_is_an_error() -> None:
    """With no page lost: the cache went on another way since."""
    model, ids = make_tiny("llama", layers=2), make_prompt(300)["input_ids"]
    model.compile(backend="vericache", options={"inductor": False})
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        tried = copy.copy(cache)
        tried.layers = [copy.copy(layer) for layer in cache.layers]
        model(ids[:, 20:21], past_key_values=tried)
        dropped = copy.deepcopy(tried)
        del tried
        gc.collect()
        given = ids[:, 40:41]
        for _ in range(5):
            given = model(given, past_key_values=cache).logits[:, -1:].argmax(-1)
        with pytest.raises(GhostError, match="cropped"):
            model(ids[:, 50:51], past_key_values=dropped)
