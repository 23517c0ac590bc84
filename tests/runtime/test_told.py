"""What a compressor is told of a row: each fact against the plain model's own attention, keys and positions."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from models import Switch, make_prompt, make_tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vericache_compile import stats
from vericache_compile.compressors import table
from vericache_compile.compressors.base import CompressedKV
from vericache_compile.compressors.facts import KINDS, Facts
from vericache_compile.compressors.none import NoCompression
from vericache_compile.compressors.samkv import SamKV
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.estimate import PROBES
from vericache_compile.model_state import state_of
from vericache_compile.runtime import drafting, repeat
from vericache_compile.runtime.drawn import Repeated, attention_drawn
from vericache_compile.runtime.pace import Pace
from vericache_compile.runtime.rotations import Rotations
from vericache_compile.runtime.sequences import Sequence
from vericache_compile.runtime.told import Telling, _tell_unknown

TOKENS, NEW, BATCH = 45, 100, 3
SEEN: list[tuple[Facts, Tensor, Tensor | None]] = []


def note(facts: Facts, keys: Tensor, queries: Tensor | None) -> None:
    if facts.shared is not None:  # else it is an estimate of bytes that asks
        drawn = None if facts.attention is None else facts.attention.clone()
        SEEN.append((replace(facts, attention=drawn), keys.clone(), queries))


class ListenedKV(CompressedKV):
    """Everything, and what it is told."""

    def __init__(self, held: CompressedKV, method: Listener) -> None:
        self.held, self.method, self.covered = held, method, held.covered

    @property
    def slots(self) -> int:
        return self.held.slots

    @property
    def nbytes(self) -> int:
        return self.held.nbytes

    def materialize(self) -> tuple[Tensor, Tensor]:
        return self.held.materialize()

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> ListenedKV:
        note(self.method.facts, keys, queries)
        return ListenedKV(self.held.extend(keys, values, queries), self.method)


@dataclass(frozen=True)
class Listener(NoCompression):
    """Keeps everything and writes down what it is told."""

    name: ClassVar[str] = "listener"
    needs: ClassVar[tuple[str, ...]] = ("queries", *sorted(KINDS))

    @property
    def queries(self) -> int:
        return 8

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Any:
        note(self.facts, keys, queries)
        return ListenedKV(super().compress(keys, values, queries), self)


@dataclass(frozen=True)
class Told:
    """One run: the model, its sequence, the tokens, and what plain attention was over them."""

    model: PreTrainedModel
    sequence: Sequence
    ids: Tensor
    pads: list[int]
    weights: list[Tensor]
    """Per layer [B, H, T, T]."""
    facts: list[tuple[Facts, Tensor, Tensor | None]]

    def of(self, layer: int, b: int, time: int = 0) -> tuple[Facts, Tensor, Tensor | None]:
        """What was told at a site of a row, the first or a later time."""
        return self.facts[(time * len(self.weights) + layer) * BATCH + b]


def newest(model: PreTrainedModel) -> Sequence:
    """The sequence that ran last."""
    state = state_of(list(model.parameters()))
    assert state is not None
    assert state.latest is not None
    assert state.latest.session.newest is not None
    return state.latest.session.newest


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "CHUNK", 8)
        patch.setattr(repeat, "CHUNK", 20)
        patch.setitem(table._registered, "listener", Listener)
        model, switch = make_tiny("llama", layers=3), Switch()
        plain = make_tiny("llama", layers=3)
        plain.set_attn_implementation("eager")
        prompt = make_prompt(TOKENS, BATCH)
        model.compile(backend=switch)
        switch.options = {"compressor": "listener", "window": 4, "inductor": False, "draft_dtype": "same"}
        out = model.generate(**prompt, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
        ids = out.sequences
        assert stats(model)["seconds"]["repeat"] > 0
        pads = (prompt["attention_mask"] == 0).sum(1).tolist()
        mask = torch.cat([prompt["attention_mask"], torch.ones(BATCH, NEW, dtype=torch.int64)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            weights = plain(ids, attention_mask=mask, position_ids=positions, output_attentions=True).attentions
        sequence = newest(model)
        yield Told(model, sequence, ids, pads, list(weights), list(SEEN))


def test_attention_is_the_sum_that_plain_attention_gives(told: Told) -> None:
    for layer, weights in enumerate(told.weights):
        for b, pad in enumerate(told.pads):
            facts, keys, _ = told.of(layer, b)
            assert (facts.layer, facts.position) == (layer, 0)
            expected = weights[b, :, pad:TOKENS, pad:TOKENS].sum(1).view(2, 2, -1).sum(1)
            assert keys.shape[1] == TOKENS - pad
            torch.testing.assert_close(facts.attention, expected, atol=1e-4, rtol=1e-4)


def test_attention_of_accepted_windows_is_added(told: Told) -> None:
    """Every query so far has given each of its heads' attention away once; what was drawn later is only more."""
    assert told.sequence.drawn is not None
    for layer, weights in enumerate(told.weights):
        for b, (row, pad) in enumerate(zip(told.sequence.rows, told.pads, strict=True)):
            held = told.sequence.drawn.of(layer, b, pad, row.length)
            assert held is not None
            assert held.sum().item() == pytest.approx(4 * (row.length - pad), rel=1e-3)
            seen = min(row.length, told.ids.shape[1])
            expected = weights[b, :, pad:seen, pad:seen].sum(1).view(2, 2, -1).sum(1)
            assert (held[:, : seen - pad] >= expected - 1e-3).all()
            assert row.length > TOKENS + NEW - 10


def test_the_rotation_turns_keys_back_to_where_they_stood_at_position_zero(told: Told) -> None:
    """Keys of the first layer depend on the token alone, before they are turned."""
    embedding, first = told.model.model.embed_tokens, told.model.model.layers[0]
    for b, pad in enumerate(told.pads):
        facts, keys, queries = told.of(0, b)
        assert facts.rotation is not None
        with torch.no_grad():
            x = first.input_layernorm(embedding(told.ids[b, pad:TOKENS]))
            expected = first.self_attn.k_proj(x).view(-1, 2, 16).transpose(0, 1)
            asked = first.self_attn.q_proj(x).view(-1, 4, 16).transpose(0, 1)
        torch.testing.assert_close(facts.rotation.unrotate(keys, facts.position), expected, atol=1e-4, rtol=1e-4)
        assert queries is not None
        count = queries.shape[1]
        back = facts.rotation.unrotate(queries, facts.end - count)
        torch.testing.assert_close(back, asked[:, -count:], atol=1e-4, rtol=1e-4)


def test_facts_of_later_tokens_begin_where_the_earlier_ended(told: Told) -> None:
    embedding, first = told.model.model.embed_tokens, told.model.model.layers[0]
    later = [told.of(0, 0, time) for time in range(1, len(told.facts) // (3 * BATCH))]
    assert later
    token = TOKENS
    for facts, keys, _ in later:
        assert facts.position == token
        with torch.no_grad():
            ids = told.ids[0, token : token + keys.shape[1]]
            expected = first.self_attn.k_proj(first.input_layernorm(embedding(ids))).view(-1, 2, 16).transpose(0, 1)
        assert facts.rotation is not None
        torch.testing.assert_close(facts.rotation.unrotate(keys, token), expected, atol=1e-4, rtol=1e-4)
        token += keys.shape[1]


def test_queries_are_the_newest_tokens_own_whatever_the_window(told: Told) -> None:
    """Also where tokens join: eight of them, though rounds of four tokens came in between."""
    embedding, first = told.model.model.embed_tokens, told.model.model.layers[0]
    times = len(told.facts) // (3 * BATCH)
    assert times > 2
    for b, pad in enumerate(told.pads):
        for facts, _, queries in (told.of(0, b, time) for time in range(times)):
            newest = slice(pad + facts.end - 8, pad + facts.end)
            with torch.no_grad():
                x = first.input_layernorm(embedding(told.ids[b, newest]))
                expected = first.self_attn.q_proj(x).view(-1, 4, 16).transpose(0, 1)
            assert facts.rotation is not None
            assert queries is not None
            assert queries.shape == (4, 8, 16)
            torch.testing.assert_close(facts.rotation.unrotate(queries, facts.end - 8), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(1, marks=pytest.mark.slow),
        3,
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(7, marks=pytest.mark.slow),
        pytest.param(40, marks=pytest.mark.slow),
    ],
)
def test_a_method_that_chooses_anew_is_asked_by_as_many_queries_each_time(count: int) -> None:
    model, switch, asked = make_tiny("llama", layers=2), Switch(), []

    class Asked(SnapKV):
        name = "asked"

        def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> CompressedKV:
            assert queries is not None
            if keys.shape[1] not in PROBES:  # else it is an estimate of bytes that asks
                asked.append(queries.shape[1])
            return super().compress(keys, values, queries)

    model.compile(backend=switch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table._registered, "asked", Asked)
        patch.setattr(Pace, "note", lambda *_: None)  # nothing is chosen anew while drafting rests
        switch.options = {"compressor": f"asked(keep=0.5, window={count}, refresh=9)", "window": 4, "inductor": False}
        asked.clear()
        model.generate(**make_prompt(TOKENS, 1), max_new_tokens=NEW, do_sample=False)
    assert len(asked) > 10
    assert set(asked) == {count}


@pytest.mark.parametrize(
    "method",
    [
        "0-1: none, rest: kvzip(keep=0.25)",
        pytest.param("pyramid | kvzip(keep=0.25)", marks=pytest.mark.slow),
        pytest.param("kvzip(keep=0.25)", marks=pytest.mark.slow),
    ],
)
def test_kvzip_spends_its_budget_on_its_own_sites(method: str) -> None:
    model, prompt = make_tiny("llama", layers=4), make_prompt(300, 1)
    model.compile(backend="vericache", options={"compressor": method, "window": 4, "inductor": False})
    model.generate(**prompt, max_new_tokens=4, do_sample=False)
    sequence = newest(model)
    assert sequence.draft is not None
    shares = [layer.regions[0].nbytes / 256 / layer.regions[0].covered for layer in sequence.draft.layers]
    own = shares[2:] if method.startswith("0") else shares
    assert shares[0] == 1 or not method.startswith("0")
    assert sum(own) / len(own) == pytest.approx(0.25, abs=0.02)


def test_what_was_repeated_stays_known_in_later_turns_and_not_beyond_a_cut() -> None:
    """So that kvzip keeps what comes later, and repeats a context again whose end was another text."""
    model, prompt = make_tiny("llama", layers=2), make_prompt(TOKENS, 1)
    model.compile(backend="vericache", options={"compressor": "kvzip", "window": 4, "inductor": False})
    cache = DynamicCache(config=model.config)
    model.generate(**prompt, past_key_values=cache, max_new_tokens=4, do_sample=False)
    for columns, known in ((None, TOKENS), (30, 30)):
        if columns is not None:
            cache.crop(columns - cache.get_seq_length())
        with torch.no_grad():
            model(prompt["input_ids"][:, :7], past_key_values=cache)
        assert (repeated := newest(model).repeated) is not None
        assert repeated.lengths == [known]


@pytest.mark.parametrize(
    ("method", "columns", "repeated"),
    [
        pytest.param("kvzip(window=4)", None, [TOKENS], id="a later turn"),
        pytest.param(
            "kvzip(window=4, refresh=200)", None, [TOKENS], id="a refresh that is not due", marks=pytest.mark.slow
        ),
        pytest.param(
            "kvzip(window=4, refresh=20)", None, [TOKENS, TOKENS + 44], id="a refresh", marks=pytest.mark.slow
        ),
        pytest.param("kvzip(window=4)", 30, [TOKENS, 70], id="a cut"),
    ],
)
def test_a_turn_that_does_not_fit_the_tail_is_repeated_only_where_that_is_due(
    method: str, columns: int | None, repeated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all of it stays, and the context is not fed through the model once more."""
    lengths, own = [], repeat.repeat_context

    def counted(sequence: Sequence, *arguments: Any) -> Repeated:
        lengths.extend(row.length for row in sequence.rows)
        return own(sequence, *arguments)

    monkeypatch.setattr(drafting, "CHUNK", 8)
    monkeypatch.setattr(repeat, "repeat_context", counted)
    model, prompt = make_tiny("llama", layers=2), make_prompt(TOKENS, 1)
    model.compile(backend="vericache", options={"compressor": method, "window": 4, "inductor": False})
    cache, turn = DynamicCache(config=model.config), make_prompt(40, 1)["input_ids"]
    text = model.generate(**prompt, past_key_values=cache, max_new_tokens=5, do_sample=False)[:, :-1]
    if columns is not None:
        cache.crop(columns - cache.get_seq_length())
        text = text[:, :columns]
    model.generate(torch.cat([text, turn], dim=1), past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert lengths == repeated
    sequence = newest(model)
    assert sequence.draft is not None
    assert sequence.draft.layers[0].starts[0] > TOKENS, "the draft cache was made anew"
    assert sequence.repeated is not None
    assert sequence.repeated.lengths == repeated[-1:]


@pytest.mark.parametrize(("positions", "repeats"), [(2 * TOKENS, True), (2 * TOKENS - 1, False)])
def test_a_context_is_repeated_where_there_are_positions_for_it(
    positions: int, repeats: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else scores are those of the last queries, which is said once."""
    monkeypatch.setattr(repeat, "CHUNK", 64)
    model, prompt = make_tiny("gpt2", positions), make_prompt(TOKENS, 1)
    model.compile(backend="vericache", options={"compressor": "kvzip(window=8)", "window": 4, "inductor": False})
    for _ in range(2):
        model.generate(**prompt, max_new_tokens=4, do_sample=False)
        assert (newest(model).repeated is not None) == repeats
    said = [each.getMessage() for each in caplog.records if "no positions" in each.getMessage()]
    assert len(said) == (not repeats)
    parts = ("where: a model of 89 positions", "fix: give it at most 44 tokens")
    assert all(part in each for each in said for part in parts)


@pytest.mark.parametrize(
    "placement", ["device", *(pytest.param(name, marks=pytest.mark.slow) for name in ("host", "disk"))]
)
def test_a_repetition_gives_its_room_back(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "CHUNK", 64)
    model, prompt = make_tiny("llama", layers=2), make_prompt(200, 1)
    options = {"compressor": "kvzip", "window": 4, "inductor": False, "placement": placement}
    model.compile(backend="vericache", options=options)
    model.generate(**prompt, max_new_tokens=4, do_sample=False)
    full = newest(model).full
    assert full.columns == 256
    assert full.nbytes == 256 * sum(site.bytes_per_token for site in full.sites)


def test_read_reads_the_full_cache(told: Told) -> None:
    for b, pad in enumerate(told.pads):
        facts, keys, _ = told.of(1, b)
        assert facts.read is not None
        tokens = torch.tensor([[0, 3, 7], [2, 5, 9]])
        read, _ = facts.read(tokens)
        assert torch.equal(read, keys.take_along_dim(tokens.unsqueeze(-1), dim=1))
        assert keys.shape[1] == TOKENS - pad


def test_repeated_is_the_most_that_a_repetition_attends_to_a_key(told: Told) -> None:
    """Against the plain model fed the context and then each chunk of it, less attention to what no query may see."""
    plain = make_tiny("llama", layers=3)
    plain.set_attn_implementation("eager")
    for b, pad in enumerate(told.pads):
        context = told.ids[b, pad:TOKENS]
        count = len(context)
        for begin in range(0, count, 20):
            end = min(begin + 20, count)
            fed = context[max(begin - repeat.LEAD, 0) : end]
            with torch.no_grad():
                weights = plain(torch.cat([context, fed])[None], output_attentions=True).attentions
            for layer, own in enumerate(weights):
                rows = own[0, :, count:].clone()
                rows[..., min(repeat.SINKS, begin) : begin] = 0
                rows[..., end:count] = 0
                shares = rows / rows.sum(-1, keepdim=True)
                expected = shares[..., begin:end].amax(1).view(2, 2, -1).amax(1)
                facts, _, _ = told.of(layer, b)
                assert facts.repeated is not None
                scores = facts.repeated[:, begin:end].clone()
                if begin == 0:
                    assert scores[:, : repeat.SINKS].isinf().all()
                    scores[:, : repeat.SINKS] = expected[:, : repeat.SINKS]
                torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-3)


def test_ids_are_the_tokens_handed_over_each_time(told: Told) -> None:
    for b, pad in enumerate(told.pads):
        for time in range(len(told.facts) // (len(told.weights) * BATCH)):
            facts, keys, _ = told.of(0, b, time)
            begin = pad + facts.token
            assert facts.ids == told.ids[b, begin : begin + keys.shape[1]].tolist()


def test_ids_that_nobody_knows_are_said_to_be_missing(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    state = state_of(list(told.model.parameters()))
    assert state is not None
    assert state.latest is not None
    assert state.latest.session.last is not None
    row = told.sequence.rows[0]
    _tell_unknown.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row, "ids", row.ids[:5])
        telling = Telling(told.sequence, *state.latest.session.last, Rotations(), SamKV(separator=5))
        assert [telling.of(layer, 0, row.pad, 20).ids for layer in range(3)] == [None] * 3
    assert caplog.text.count("which they were is not known") == 1


def test_sites_of_a_row_share_and_rows_do_not(told: Told) -> None:
    shared = [[told.of(layer, b)[0].shared for layer in range(3)] for b in range(BATCH)]
    assert all(row[0] is not None and all(x is row[0] for x in row) for row in shared)
    assert len({id(row[0]) for row in shared}) == BATCH


def test_padding_draws_and_pays_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    q, keys = torch.randn(4, 600, 16, generator=generator), torch.randn(2, 600, 16, generator=generator)
    sums = attention_drawn(q, keys[:, 10:], 0.25)
    assert sums.sum().item() == pytest.approx(4 * 590, rel=1e-4)
    assert sums.shape == (2, 590)


def test_regions_do_not_keep_what_they_were_told(told: Told) -> None:
    assert told.sequence.draft is not None
    regions = [region for layer in told.sequence.draft.layers for region in layer.regions]
    assert len(regions) == 3 * BATCH
    facts = [region.method.facts for region in regions]  # type: ignore[attr-defined]
    assert all(each == each.lasting for each in facts), "where tokens stood, but no numbers of theirs"


def test_where_keys_come_in_each_round_a_window_is_added_one_round_later() -> None:
    """Tokens have drawn what plain attention says, from all queries but the last round's."""
    model, prompt = make_tiny("llama", layers=3), make_prompt(TOKENS, BATCH)
    options = {"compressor": "h2o", "window": 4, "inductor": False, "placement": "host"}
    model.compile(backend="vericache", options=options)
    model.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    sequence = newest(model)
    assert sequence.drawn is not None
    assert sequence.asked is not None
    pads = (prompt["attention_mask"] == 0).sum(1).tolist()
    plain = make_tiny("llama", layers=3)
    plain.set_attn_implementation("eager")
    ids = plain.generate(**prompt, max_new_tokens=NEW + 8, do_sample=False)  # rounds run ahead of the caller
    for b, (row, pad) in enumerate(zip(sequence.rows, pads, strict=True)):
        before = sequence.asked.columns[b]
        assert row.length > before > TOKENS
        with torch.no_grad():
            weights = plain(ids[b : b + 1, pad:before], output_attentions=True).attentions
        for layer, own in enumerate(weights):
            held = sequence.drawn.of(layer, b, pad, row.length)
            assert held is not None
            expected = own[0].sum(1).view(2, 2, -1).sum(1)
            torch.testing.assert_close(held[:, : before - pad], expected, atol=1e-3, rtol=1e-3)
            assert not held[:, before - pad :].any()


@pytest.mark.parametrize(
    ("forked", "more"),
    [pytest.param(False, 7, marks=pytest.mark.slow), (True, 7), pytest.param(True, 0, marks=pytest.mark.slow)],
)
def test_where_keys_come_in_each_round_no_window_is_lost_to_a_turn_or_a_fork(forked: bool, more: int) -> None:
    model, prompt = make_tiny("llama", layers=3), make_prompt(TOKENS, 1)
    options = {"compressor": "h2o", "window": 4, "inductor": False, "placement": "host"}
    model.compile(backend="vericache", options=options)
    cache = DynamicCache(config=model.config)
    text = model.generate(**prompt, past_key_values=cache, max_new_tokens=12, do_sample=False)
    first = newest(model)
    assert first.asked is not None
    if forked:
        cache = deepcopy(cache)
    fed = torch.cat([text, prompt["input_ids"][:, :more]], dim=1)
    ids = model.generate(fed, past_key_values=cache, max_new_tokens=12, do_sample=False)
    sequence = newest(model)
    assert (sequence is not first) == forked
    assert sequence.drawn is not None
    assert sequence.asked is not None
    before = sequence.asked.columns[0]
    plain = make_tiny("llama", layers=3)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        weights = plain(ids[:, :before], output_attentions=True).attentions
    for layer, own in enumerate(weights):
        held = sequence.drawn.of(layer, 0, 0, before)
        assert held is not None
        torch.testing.assert_close(held, own[0].sum(1).view(2, 2, -1).sum(1), atol=1e-3, rtol=1e-3)
