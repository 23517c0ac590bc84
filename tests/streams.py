"""Streams on a machine without a GPU: what is put on one happens at once, and what was asked of it is noted."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from vericache_compile.runtime.transfers import Link


class Event:
    """When something that is on its way out is gone."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.stream.waited += 1


class Stream:
    """The CPU, with the interface of a GPU's stream."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.waited = 0
        """Times that the host has waited for an event of it."""

    def record_event(self) -> Event:
        return Event(self)

    def wait_stream(self, other: Stream) -> None:
        """All that was put on the other one has happened."""

    def wait_event(self, event: Event) -> None:
        """It has happened."""

    def synchronize(self) -> None:
        """All has happened."""


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every link has streams from here on, as on a GPU."""
    current = Stream()

    def pinned(self: Link, device: torch.device) -> bool:
        if self._stream is None:
            own: Any = (Stream(), Stream())
            self._stream, self._outgoing = own
        return False

    def record_stream(self: Tensor, stream: Stream) -> None:
        """Nothing is freed early here."""

    monkeypatch.setattr(Link, "pinned", pinned)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
