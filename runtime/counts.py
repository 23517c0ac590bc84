"""What rounds have done so far, as plain numbers: sums, per place in the window, and the latest rounds one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

LATEST = 4096
"""Rounds that are kept one by one."""


@dataclass
class Traffic:
    """Full KV that one round, or all of them, brought to the device."""

    nbytes: int = 0
    seconds: float = 0.0
    """Of the link at work."""
    waited: float = 0.0
    """Of verify waiting for it."""


class Span(NamedTuple):
    """One transfer of a round: a site's full KV."""

    layer: int
    began: float
    seconds: float
    nbytes: int


@dataclass(frozen=True)
class Round:
    """One draft-and-verify cycle over all rows of a batch."""

    began: float
    """Seconds on `time.perf_counter`'s clock."""
    compress_seconds: float
    draft_began: float
    draft_seconds: float
    verify_seconds: float
    """Verify follows draft at once."""
    rows: int
    drafted: int
    """Over all rows, as is `accepted`."""
    accepted: int
    traffic: Traffic = field(default_factory=Traffic)


@dataclass
class Counts:
    """What rounds have done so far."""

    rounds: int = 0
    row_rounds: int = 0
    """Rounds times rows of the batch."""
    drafted: int = 0
    accepted: int = 0
    served: int = 0
    rested: int = 0
    """Rounds without drafts, because drafting did not pay for their sequence, or has no room."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    compress_seconds: float = 0.0
    repeat_seconds: float = 0.0
    """In which the model repeated its context for a compressor."""
    refreshes: int = 0
    """Times that a draft cache was compressed anew because its compressor asks for it."""
    positions: list[int] = field(default_factory=list)
    """How often the drafted token at each place in the window was accepted."""
    drafted_positions: list[int] = field(default_factory=list)
    """How often a token was drafted at each place in the window."""
    traffic: Traffic = field(default_factory=Traffic)
    recalled: int = 0
    """Bytes of full KV outside the device that draft steps read, for methods that choose at every step."""
    spans: tuple[Span, ...] = ()
    """The latest round's transfers one by one."""
    latest: deque[Round] = field(default_factory=lambda: deque(maxlen=LATEST))

    def add_row(self, window: int, drafted: int, accepted: int) -> None:
        """Count one row of a round, of whose drafted tokens the first `accepted` stand."""
        self.drafted += drafted
        self.accepted += accepted
        for places, count in ((self.positions, accepted), (self.drafted_positions, drafted)):
            places += [0] * (window - 1 - len(places))
            for i in range(count):
                places[i] += 1

    def add_transfers(self, traffic: Traffic, spans: Sequence[Span]) -> None:
        """Count what one round brought to the device."""
        self.traffic.nbytes += traffic.nbytes
        self.traffic.seconds += traffic.seconds
        self.traffic.waited += traffic.waited
        self.spans = tuple(spans)
