"""A file that grows while a model runs: claimed by one process, whole after every addition, and never in the way."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

log = logging.getLogger(__name__)


class Journal:
    """Text appended to one file between `head` and `end`; a file that cannot be written to is said once and stops
    nothing. `option` is what the user named the file by."""

    def __init__(self, path: Path, option: str, head: bytes = b"", end: bytes = b"") -> None:
        self.path = path
        self.option, self.head, self.end = option, head, end
        self._open = False
        self._failed = False
        self._lock = threading.Lock()

    def append(self, text: bytes) -> None:
        """Add text to the file, which the first call makes."""
        with self._lock:
            if self._failed:
                return
            try:
                self._write(text)
            except OSError as error:
                self._failed = True
                log.warning(
                    "vericache: nothing more is written down: %s\n  where: %s, %r\n  fix: %s",
                    error.strerror,
                    self.option,
                    str(self.path),
                    "name a place in a folder that can be written to, on a disk with room; the model runs all the same",
                )

    def _write(self, text: bytes) -> None:
        if not self._open:
            self._claim()
            self.path.write_bytes(self.head + self.end)
            self._open = True
        with self.path.open("r+b") as file:
            file.seek(-len(self.end), os.SEEK_END)
            file.write(text + self.end)

    def _claim(self) -> None:
        """Make the file; where there is one already, one beside it with this process in its name."""
        wanted, number = self.path, 1
        while True:
            try:
                self.path.open("xb").close()
            except FileExistsError:
                again = "" if number == 1 else f"_{number}"
                self.path = wanted.with_name(f"{wanted.stem}.pid{os.getpid()}{again}{wanted.suffix}")
                number += 1
            else:
                return
