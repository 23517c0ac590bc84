"""Verify's segments as recordings: the same rows, recorded once per batch, whatever grows. A stand-in for CUDA graphs
keeps outputs where they were recorded, as those do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from models import make_prompt, make_tiny
from torch import Tensor
from transformers import DynamicCache

from vericache_compile.kernels import native
from vericache_compile.kernels.calls import Calls
from vericache_compile.plan import Act, DecodePlan
from vericache_compile.runtime import capture, draft_step, pieces, rounds
from vericache_compile.runtime.capture import Launch, Pool
from vericache_compile.runtime.pieces import Piece, Recordings, in_pieces

GPU = torch.device("cuda")
OPTIONS: dict[str, Any] = {"window": 8, "inductor": False, "draft_dtype": "same"}


class Graph:
    """A replay runs the launch again, and leaves its results where the recording left its own."""

    def __init__(self, launch: Launch[Sequence[Tensor]], made: Sequence[Tensor]) -> None:
        self.launch, self.made = launch, made

    def replay(self) -> None:
        with torch.inference_mode(self.made[0].is_inference()):
            for place, each in zip(self.made, self.launch(), strict=True):
                place.copy_(each)


class Recorder:
    """Counts recordings; one's results are not there before it is replayed."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, launch: Launch[Sequence[Tensor]], pool: Pool) -> tuple[Graph, Sequence[Tensor]]:
        self.count += 1
        made = [each.clone() for each in launch()]
        for each in made:
            if each.is_floating_point():
                each.fill_(float("nan"))
        return Graph(launch, made), made


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(capture, "record", made)
    return made


@pytest.fixture
def in_use(monkeypatch: pytest.MonkeyPatch) -> list[DecodePlan]:
    """Verify runs in pieces from here on; the plans that it runs by."""
    used: list[DecodePlan] = []

    def on_a_gpu(plan: DecodePlan, device: torch.device) -> DecodePlan:
        used.append(in_pieces(plan, GPU))
        return used[-1]

    monkeypatch.setattr(pieces, "serves", lambda *given: True)
    monkeypatch.setattr(pieces, "in_pieces", on_a_gpu)
    return used


def segments(plans: Sequence[DecodePlan]) -> int:
    return sum(step.act is Act.RUN for plan in plans for step in plan.verify.steps)


def two_turns(model: Any, batch: int) -> Tensor:
    """Logits of a few tokens, and of a few more after a turn for which the cache has to grow."""
    cache, prompt, logits = DynamicCache(), make_prompt(70, batch), list[Tensor]()
    for more in (400, 0):
        out = model.generate(
            **prompt,
            max_new_tokens=16,
            do_sample=False,
            past_key_values=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        ids = torch.cat([out.sequences, make_prompt(400)["input_ids"][:, :more].expand(batch, -1)], dim=1)
        mask = torch.ones_like(ids)
        mask[:, :70] = prompt["attention_mask"][:, :70]
        prompt = {"input_ids": ids, "attention_mask": mask}
        logits += out.logits
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("how", "batch"), [({"placement": "host", "staging_mb": 0.001}, 1), pytest.param({}, 3, marks=pytest.mark.slow)]
)
def test_rows_are_those_of_launches_and_growth_records_nothing_anew(
    how: dict[str, Any], batch: int, recorder: Recorder, in_use: list[DecodePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny("llama", layers=3)
    model.compile(backend="vericache", options={**OPTIONS, **how})
    with monkeypatch.context() as launched:
        launched.setattr(pieces, "serves", lambda *given: False)
        expected = two_turns(model, batch)
    assert not recorder.count
    for _ in range(2):
        assert torch.equal(two_turns(model, batch), expected)
    assert recorder.count == segments(in_use) >= 4


@pytest.mark.skipif(native.load() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("how", "batch", "drafts"),
    [
        ({"placement": "host", "staging_mb": 0.001}, 1, "wrong"),
        pytest.param({}, 2, "own", marks=pytest.mark.slow),
        pytest.param({"draft_dtype": "same"}, 1, "wrong", marks=pytest.mark.slow),
    ],
)
def test_on_the_cpu_pieces_are_calls_that_give_the_same_rows(
    how: dict[str, Any], batch: int, drafts: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However many tokens there are in a window: drafts that are wrong now and then make it shorter."""
    replays: list[int] = []
    replay, draft_tokens = Calls.replay, rounds.draft_tokens

    def counted(self: Calls) -> None:
        replays.append(id(self))
        replay(self)

    def draft(*given: Any) -> Tensor:
        drafted = draft_tokens(*given)
        if drafts == "wrong" and drafted.shape[1] > 2:
            drafted[:, 2:] = (drafted[:, 2:] + 1) % 100
        return drafted

    monkeypatch.setattr(Calls, "replay", counted)
    monkeypatch.setattr(rounds, "draft_tokens", draft)
    model = make_tiny("llama", layers=3)
    model.compile(backend="vericache", options={"window": 8, "compressor": "none", **how})
    monkeypatch.setattr(draft_step, "serves", lambda device, plan, draft: False)
    with monkeypatch.context() as launched:
        launched.setattr(pieces, "serves", lambda *given: False)
        expected = two_turns(model, batch)
    assert not replays
    with caplog.at_level(logging.INFO, "vericache_compile"):
        assert torch.equal(two_turns(model, batch), expected)
    assert len(replays) > 20
    assert len(set(replays)) > 1, "segments differ"
    assert not [told for told in caplog.messages if "through Python" in told]


def test_a_recording_that_fails_leaves_launches_and_the_same_rows(
    in_use: list[DecodePlan], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(launch: Launch[Sequence[Tensor]], pool: Pool) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    capture._tell.cache_clear()
    monkeypatch.setattr(capture, "record", fail)
    model, prompt = make_tiny("llama", layers=3), make_prompt(60, 3)
    plain = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    model.compile(backend="vericache", options=OPTIONS)
    with caplog.at_level(logging.WARNING, "vericache_compile"):
        assert torch.equal(model.generate(**prompt, max_new_tokens=24, do_sample=False), plain)
    [told] = caplog.records
    assert all(part in told.getMessage() for part in ("a part of verify", "CUDA out of memory", "where:", "fix:"))


def piece_of(run: Callable[[list[Tensor]], Sequence[Tensor]], shared: pieces._Shared, *, leaves: bool = False) -> Piece:
    """x [2] and a weight -> one output."""
    return Piece(run, (True, False), (leaves,), shared)


def test_a_piece_reads_its_inputs_wherever_they_are_given_and_weights_where_they_are(recorder: Recorder) -> None:
    piece, weight = piece_of(lambda given: [given[0] * given[1]], pieces._Shared(GPU)), torch.full((2,), 3.0)
    for value in range(4):
        assert piece([torch.full((2,), float(value)), weight])[0].tolist() == [3.0 * value] * 2
    weight.fill_(5.0)
    assert piece([torch.ones(2), weight])[0].tolist() == [5.0, 5.0]
    assert recorder.count == 1


def test_a_piece_reads_what_an_earlier_one_left_where_it_lies(recorder: Recorder) -> None:
    shared, seen = pieces._Shared(GPU), list[int]()

    def note(given: list[Tensor]) -> Sequence[Tensor]:
        seen.append(given[0].data_ptr())
        return [given[0] + given[1]]

    first, second = piece_of(lambda given: [given[0] * given[1]], shared), piece_of(note, shared)
    weight = torch.full((2,), 2.0)
    for value in range(4):
        [between] = first([torch.full((2,), float(value)), weight])
        [out] = second([between, weight])
        assert out.tolist() == [2.0 * value + 2.0] * 2
    assert between.data_ptr() == seen[-1]


def test_the_programs_own_outputs_outlive_the_next_run(recorder: Recorder) -> None:
    last = piece_of(lambda given: [given[0] * given[1]], pieces._Shared(GPU), leaves=True)
    weight = torch.ones(2)
    rows = [last([torch.full((2,), float(value)), weight])[0] for value in range(4)]
    assert [row.tolist() for row in rows] == [[float(value)] * 2 for value in range(4)]


def test_the_same_plan_has_the_same_pieces_until_its_weights_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what holds on to a plan finds it again; and those of the latest plans alone are kept."""
    monkeypatch.setattr(pieces, "in_pieces", lambda plan, device: object())
    held, plans = Recordings(), [cast("DecodePlan", object()) for _ in range(pieces.LATEST + 1)]
    bound: list[Tensor | None] = [torch.zeros(2), None, torch.zeros(2)]
    made = [held.of(plan, GPU, bound) for plan in plans]
    assert held.of(plans[-1], GPU, list(bound)) is made[-1]
    assert held.of(plans[0], GPU, bound) is not made[0]
    moved = held.of(plans[-1], GPU, [bound[0], None, torch.zeros(2)])
    assert moved is not made[-1]


@pytest.mark.gpu
def test_real_graphs_share_memory_and_keep_what_is_still_read() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    shared, weight = pieces._Shared(GPU), torch.full((1 << 20,), 2.0, device=GPU)
    chain = [piece_of(lambda given: [(given[0] * given[1] + 1).relu() - 1], shared) for _ in range(4)]
    for value in range(5):
        x = torch.full((1 << 20,), float(value), device=GPU)
        for each in chain:
            [x] = each([x, weight])
        assert x[::4096].tolist() == [16.0 * value] * 256
    assert all(each._captured.replays for each in chain)
