"""Write down what the pipeline does with one captured graph: a folder of numbered files.

    graph_0_1_pid4711/
        00_captured.py  01_bind_scalars.py  01_bind_scalars.diff  ...     the graphs after each pass
        program.json  program.draft.graphml  program.draft.dot  ...       what came of it
        repro_verify.py  repro_draft.py                                   each variant as a program on random inputs
        not_taken.txt                                                     or why nothing did
        index.html                                                        all of it, to look at in a browser

None of these holds weights or tokens: everything is made from names, shapes and source lines. A folder that cannot be
written to is said once, and nothing else changes. (`tokens.jsonl` beside the folders, for `dump_tokens`, is written
while the model runs: `runtime/token_record.py`.)
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.fx import GraphModule

from vericache_compile.dump.describe import describe_program, graphs_of
from vericache_compile.dump.graph_files import dot, graphml
from vericache_compile.dump.page import Page
from vericache_compile.dump.repro import repro
from vericache_compile.dump.source import module_source, program_source
from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.program import Program

log = logging.getLogger(__name__)


class Dump:
    """An observer of the pipeline that writes one folder under `root`, made when there is something to write.

    `failed` holds the roots that could not be written to; it is shared by all dumps of a model, so that each is said
    once and tried no more.
    """

    def __init__(self, root: str, failed: set[str]) -> None:
        self.root, self.failed = root, failed
        self.folder: Path | None = None
        self._passes = 0
        self._before = ("", "")
        """Name and text of the file before."""
        self._page = Page()

    def after(self, name: str, count: int, program: Program) -> None:
        """Write the graphs after a pass, and what changed in them."""

        def write() -> None:
            self._write_stage(name, program_source(name, count, program))
            self._page.add(name, count, program)

        self._try(write)

    def done(self, program: Program) -> None:
        """Write what came of it."""
        self._try(lambda: self._write_program(program))

    def refused(self, module: GraphModule, reason: UnsupportedGraph) -> None:
        """Write why the graph is not taken, beside the graph as far as it went."""
        self._try(lambda: self._write_refusal(module, reason))

    def _write_stage(self, name: str, text: str) -> None:
        stem = f"{self._passes:02d}_{name}"
        self._write(f"{stem}.py", text)
        if self._passes:
            self._write(f"{stem}.diff", unified_diff(*self._before, f"{stem}.py", text))
        self._before = (f"{stem}.py", text)
        self._passes += 1

    def _write_program(self, program: Program) -> None:
        self._write("program.json", json.dumps(describe_program(program), indent=1) + "\n")
        for name, module in graphs_of(program).items():
            self._write(f"program.{name}.graphml", graphml(module.graph))
            self._write(f"program.{name}.dot", dot(module.graph))
        for name in program.variants:
            self._write(f"repro_{name}.py", repro(program, name))
        self._write_page()

    def _write_refusal(self, module: GraphModule, reason: UnsupportedGraph) -> None:
        if not self._passes:
            self._write_stage("captured", module_source("captured", module) + "\n")
        self._write("not_taken.txt", f"{reason}\n")
        if self._page.stages:
            self._write_page(str(reason))

    def _write_page(self, refusal: str = "") -> None:
        assert self.folder is not None, "a page is written after the passes"
        self._write("index.html", self._page.html(self.folder.name, refusal))

    def _write(self, name: str, text: str) -> None:
        if self.folder is None:
            self.folder = _make_folder(Path(self.root))
        (self.folder / name).write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")

    def _try(self, write: Callable[[], None]) -> None:
        """Write, unless this root has failed before; whatever goes wrong is said, and stops nothing."""
        if self.root in self.failed:
            return
        try:
            write()
        except Exception as error:  # noqa: BLE001 - looking at a run must not end it
            self.failed.add(self.root)
            found = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            log.warning(
                "vericache: graphs are not written down: %s\n  where: dump=%r\n  fix: %s",
                found,
                self.root,
                "name a folder that can be made and written to, on a disk with room; the model runs all the same",
            )


def unified_diff(before_name: str, before: str, name: str, text: str) -> str:
    """A diff that `patch` applies; both texts end in a newline."""
    old, new = ([f"{line}\n" for line in each.removesuffix("\n").split("\n")] for each in (before, text))
    return "".join(difflib.unified_diff(old, new, before_name, name))


def _make_folder(root: Path) -> Path:
    """A new folder; making it is what claims its name, whichever process or thread asks for it."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    label = "later" if compile_id is None else str(compile_id).replace("/", "_")
    stem = f"graph_{label}_pid{os.getpid()}"
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = root / (stem if number == 1 else f"{stem}_{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
