"""Streams on a machine without a GPU. What is put on one happens late: when somebody waits for it, not before.

So what is read too early, by the CPU or by another stream, is not there yet, and a test sees it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vericache_compile.runtime import transfers
from vericache_compile.runtime.transfers import Link

LOCK = threading.RLock()


class Event:
    """A place on a stream."""

    def __init__(self, stream: Stream, place: int) -> None:
        self.stream, self.place = stream, place

    def query(self) -> bool:
        """Whether all that was put there before it has happened."""
        return self.stream.done >= self.place

    def synchronize(self) -> None:
        """Have it happen; noted, for the host waits here."""
        self.stream.host_waits += 1
        self.stream.happen(self.place)

    def elapsed_time(self, other: Event) -> float:
        """Nothing is timed here."""
        return 0.0


class Stream:
    """The interface of a GPU's stream: one of the link's, which are late, or the CPU itself."""

    device = torch.device("cpu")

    def __init__(self, late: bool) -> None:
        self.late = late
        self.held: deque[Callable[[], object]] = deque()
        self.put_count = self.done = self.host_waits = 0

    def put(self, work: Callable[[], object]) -> None:
        """Do it when its turn comes."""
        with LOCK:
            self.held.append(work)
            self.put_count += 1
        if not self.late:
            self.happen(self.put_count)

    def happen(self, place: int) -> None:
        """Do all that was put here before a place."""
        with LOCK, torch.inference_mode():
            while self.done < place:
                self.held.popleft()()
                self.done += 1

    def record_event(self) -> Event:
        return Event(self, self.put_count)

    def wait_event(self, event: Event) -> None:
        self.put(lambda: event.stream.happen(event.place))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.happen(self.put_count)


class Current(threading.local):
    """Each thread's current stream."""

    def __init__(self) -> None:
        self.stream = Stream(late=False)


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every link has late streams from here on."""
    current = Current()

    def pinned(self: Link, device: torch.device) -> bool:
        if self._stream is None:
            own: Any = (Stream(late=True), Stream(late=True))
            self._stream, self._outgoing = own
        return False

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, current.stream = current.stream, stream
        yield
        current.stream = before

    def late(target: Tensor, source: Tensor) -> None:
        current.stream.put(lambda: target.copy_(source))

    def copy(self: Link, target: Tensor, source: Tensor) -> Iterator[int]:
        for to, own in zip(target, source, strict=True):
            late(to, own)
            yield own.nbytes

    monkeypatch.setattr(Link, "pinned", pinned)
    monkeypatch.setattr(Link, "copy", copy)
    monkeypatch.setattr(Link, "store", lambda self, target, source: late(target, source))
    monkeypatch.setattr(transfers, "moment", lambda device: current.stream.record_event())
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current.stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
