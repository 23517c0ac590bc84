"""A Chrome trace of real calls and rounds, for Perfetto or chrome://tracing: caller, draft, verify and link have
a track each.

The file is a whole JSON document after every call, so that a run that dies leaves one that loads. It holds times and
counts, no tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vericache_compile.runtime.counts import Round, Span
from vericache_compile.runtime.journal import Journal

TRACKS = ("caller", "compress", "draft", "verify", "link")
END = b"\n]\n"


class Timeline:
    """Events appended to one file."""

    def __init__(self, path: str) -> None:
        names = ",\n".join(json.dumps(_name(track)) for track in TRACKS).encode()
        self._journal = Journal(Path(path), "trace", b"[\n" + names, END)

    def call(
        self, what: str, began: float, seconds: float, rounds: Sequence[Round], spans: Sequence[Span] = ()
    ) -> None:
        """One call of the compiled model (seconds on `time.perf_counter`'s clock), the rounds that it ran, and what
        they brought over the link."""
        events = [_span("caller", what, began, seconds, {"rounds": len(rounds)})]
        for each in rounds:
            counts = {"rows": each.rows, "drafted": each.drafted, "accepted": each.accepted}
            label = f"{each.accepted} of {each.drafted} accepted"
            if each.compress_seconds:
                events.append(_span("compress", "compress", each.began, each.compress_seconds, {}))
            events.append(_span("draft", f"draft: {label}", each.draft_began, each.draft_seconds, counts))
            verify_began = each.draft_began + each.draft_seconds
            events.append(_span("verify", f"verify: {label}", verify_began, each.verify_seconds, counts))
        for span in spans:
            moved = {"layer": span.layer, "bytes": span.nbytes}
            events.append(_span("link", f"full KV of site {span.layer}", span.began, span.seconds, moved))
        self._journal.append(b"".join(b",\n" + json.dumps(event).encode() for event in events))


def _span(track: str, name: str, began: float, seconds: float, args: dict[str, int]) -> dict[str, Any]:
    """A complete event; times in microseconds."""
    times = {"ts": round(1e6 * began, 3), "dur": round(1e6 * seconds, 3)}
    return {"name": name, "ph": "X", **times, "pid": os.getpid(), "tid": TRACKS.index(track), "args": args}


def _name(track: str) -> dict[str, Any]:
    """The event that names a track."""
    place = {"pid": os.getpid(), "tid": TRACKS.index(track)}
    return {"name": "thread_name", "ph": "M", **place, "args": {"name": track}}
