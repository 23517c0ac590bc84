"""The tokens of real calls, for whoever asks for them (`dump_tokens`): one JSON object to a line.

    {"sequence": 3, "column": 0, "fed": [[5, 9, 2]]}                                  a prompt, or a step as captured
    {"sequence": 3, "rows": [{"column": 3, "window": [7, 1, 8], "predicted": [1, 4, 6], "kept": 2}]}        a round

A round's window is the caller's token and those drafted after it; verify predicted one token after each, and kept as
many as stand. Nothing else that is written down holds tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vericache_compile.runtime.journal import Journal


class Judged(NamedTuple):
    """What a round made of one row."""

    column: int
    """Where its first token stands."""
    window: list[int]
    predicted: list[int]
    kept: int


class TokenRecord:
    """Tokens appended to one file."""

    def __init__(self, path: str) -> None:
        self._journal = Journal(Path(path), "dump_tokens=True")

    def fed(self, sequence: int | None, column: int | None, tokens: list[list[int]]) -> None:
        """Tokens [B, T] of a call that ran as captured, at a column where that is known."""
        self._add({"sequence": sequence, "column": column, "fed": tokens})

    def round(self, sequence: int, judged: Sequence[Judged]) -> None:
        """One round of a sequence, row by row."""
        self._add({"sequence": sequence, "rows": [each._asdict() for each in judged]})

    def _add(self, record: dict[str, object]) -> None:
        self._journal.append(f"{json.dumps(record)}\n".encode())
