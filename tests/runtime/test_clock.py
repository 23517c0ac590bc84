"""Rounds are timed by the device's own moments, which are read after the host has waited for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import make_prompt, make_tiny

from vericache_compile import stats
from vericache_compile.runtime import clock, incoming, rounds
from vericache_compile.runtime.clock import moment, seconds_between

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Event:
    """Of a stream in which a second passes between two events; cannot be read before the host has waited."""

    count = 0
    waited = False

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing, "an event without a time"
        self.number = -1

    def record(self, stream: object) -> None:
        Event.count += 1
        self.number, Event.waited = Event.count, False

    def elapsed_time(self, end: Event) -> float:
        assert Event.waited, "read before its time"
        return 1e3 * (end.number - self.number)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The events of a GPU."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    for module in (rounds, incoming):
        monkeypatch.setattr(module, "moment", lambda device: clock.moment(GPU))
    close = incoming.PagedIncoming.close

    def wait(self: incoming.PagedIncoming) -> None:
        Event.waited = True  # what a round waits for it has waited for when it closes
        close(self)

    monkeypatch.setattr(incoming.PagedIncoming, "close", wait)


def test_without_streams_a_moment_is_now() -> None:
    first, last = moment(CPU), moment(CPU)
    assert seconds_between(first, last) >= 0


@pytest.mark.usefixtures("stream")
def test_a_round_is_timed_by_events_that_are_read_at_its_end() -> None:
    """From one event to the next there is draft; in verify there are two for each of three sites."""
    model = make_tiny("llama", layers=3)
    options: dict[str, Any] = {"placement": "host", "window": 4, "inductor": False}
    model.compile(backend="vericache", options=options)
    model.generate(**make_prompt(40), max_new_tokens=8, do_sample=False)
    made = stats(model)
    seconds, count = made["seconds"], made["rounds"]
    assert (seconds["draft"], seconds["verify"], seconds["transfer_wait"]) == (count, 7 * count, 3 * count)
