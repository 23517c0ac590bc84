"""The Chrome trace: its schema, that it says what `stats` says, and that a bad file stops nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_prompt, make_tiny

from vericache_compile import stats
from vericache_compile.runtime.timeline import TRACKS, Timeline

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def run(path: Path, batch: int = 1) -> tuple[Any, torch.Tensor]:
    """A tiny model's statistics and tokens, traced."""
    model = make_tiny("llama")
    options = {"inductor": False, "window": 4, "compressor": "none", "trace": str(path)}
    model.compile(backend="vericache", options=options)
    return stats_of(model, batch)


def stats_of(model: Any, batch: int) -> tuple[Any, torch.Tensor]:
    tokens = model.generate(**make_prompt(9, batch), **SETTINGS)
    return stats(model), tokens


def test_every_event_has_what_perfetto_asks_for(tmp_path: Path) -> None:
    run(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == dict(enumerate(TRACKS))
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) + len(names) == len(events)
    for span in spans:
        assert isinstance(span["name"], str)
        assert span["ts"] >= 0
        assert span["dur"] >= 0
        assert span["tid"] in names
        assert isinstance(span["pid"], int)


def test_transfers_have_a_track(tmp_path: Path) -> None:
    """Every site once per round, and as many bytes as `stats` says."""
    model = make_tiny("llama", layers=3)
    options = {"inductor": False, "window": 4, "placement": "host", "trace": str(tmp_path / "trace.json")}
    model.compile(backend="vericache", options=options)
    made, _ = stats_of(model, 1)
    events = json.loads((tmp_path / "trace.json").read_text())
    spans = [event for event in events if event["ph"] == "X" and event["tid"] == TRACKS.index("link")]
    assert [span["args"]["layer"] for span in spans] == [0, 1, 2] * made["rounds"]
    assert sum(span["args"]["bytes"] for span in spans) == made["bytes"]["transferred"]
    assert sum(each["traffic"]["nbytes"] for each in made["latest_rounds"]) == made["bytes"]["transferred"]


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_rounds_are_labelled_with_what_was_drafted_and_accepted(tmp_path: Path, batch: int) -> None:
    made, _ = run(tmp_path / "trace.json", batch)
    events = json.loads((tmp_path / "trace.json").read_text())
    for track in ("draft", "verify"):
        spans = [event for event in events if event["ph"] == "X" and event["tid"] == TRACKS.index(track)]
        assert len(spans) == made["rounds"] == len(made["latest_rounds"])
        assert sum(span["args"]["drafted"] for span in spans) == made["drafted"]
        assert sum(span["args"]["accepted"] for span in spans) == made["accepted"]
        assert all(
            f"{span['args']['accepted']} of {span['args']['drafted']} accepted" in span["name"] for span in spans
        )
    calls = [event for event in events if event["ph"] == "X" and event["tid"] == 0]
    assert len(calls) == SETTINGS["max_new_tokens"]
    assert sum(call["args"]["rounds"] for call in calls) == made["rounds"]


def test_rounds_lie_within_the_calls_that_ran_them(tmp_path: Path) -> None:
    run(tmp_path / "trace.json")
    spans = [event for event in json.loads((tmp_path / "trace.json").read_text()) if event["ph"] == "X"]
    calls = [(span["ts"], span["ts"] + span["dur"]) for span in spans if span["tid"] == 0]
    for span in spans:
        assert any(start <= span["ts"] and span["ts"] + span["dur"] <= end + 1 for start, end in calls)


def test_a_trace_changes_no_token(tmp_path: Path) -> None:
    plain = make_tiny("llama").generate(**make_prompt(9, 3), **SETTINGS)
    assert torch.equal(run(tmp_path / "trace.json", 3)[1], plain)


@pytest.mark.slow
def test_a_trace_ends_where_the_option_is_gone_and_begins_anew_with_it(tmp_path: Path) -> None:
    first, second, model = tmp_path / "first.json", tmp_path / "second.json", make_tiny("llama")
    sizes = []
    for path in (first, None, second):
        more = {} if path is None else {"trace": str(path)}
        model.compile(backend="vericache", options={"inductor": False, "window": 4, "compressor": "none", **more})
        stats_of(model, 1)
        sizes.append(first.stat().st_size)
    assert sizes == sizes[:1] * 3
    assert json.loads(second.read_text())


def test_a_model_that_runs_anothers_graphs_is_traced_too(tmp_path: Path) -> None:
    """Dynamo compiles one graph for models of one make."""
    run(tmp_path / "trace.json")
    run(tmp_path / "trace.json")
    assert [bool(json.loads(path.read_text())) for path in tmp_path.iterdir()] == [True, True]


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("mine")
    for _ in range(2):
        Timeline(str(path)).call("decode", 0.0, 1.0, [])
    assert path.read_text() == "mine"
    others = [other for other in tmp_path.iterdir() if other != path]
    assert len(others) == 2
    assert all(len(json.loads(other.read_text())) == 1 + len(TRACKS) for other in others)


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vericache_compile"):
        made, _ = run(tmp_path / "missing" / "trace.json")
    [record] = [each for each in caplog.records if "nothing more is written down" in each.getMessage()]
    assert "where: trace, " in record.getMessage()
    assert made["rounds"] > 0


def test_acceptance_by_position_is_of_what_was_drafted_there(tmp_path: Path) -> None:
    made, _ = run(tmp_path / "trace.json", 3)
    assert len(made["acceptance_by_position"]) == 3
    assert all(0 <= rate <= 1 for rate in made["acceptance_by_position"])
    assert sum(made["accepted_by_position"]) == made["accepted"]
    for name in ("drafted", "accepted"):
        assert sum(each[name] for each in made["latest_rounds"]) == made[name]
    json.dumps(made)
