"""What a person sees: phases on stderr, an answer as it grows, a table of results."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Say on stderr what takes long: a spinner on a terminal, one line elsewhere."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    if console.is_terminal:
        with console.status(f"{what} ..."):
            yield
    else:
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield


def progress(labels: Sequence[str], what: str) -> Iterator[int]:
    """The numbers of the labels in order, each said on stderr in its turn: a bar on a terminal, lines elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        for i, label in enumerate(labels):
            print(f"{what}: {label} ({i + 1} of {len(labels)}) ...", file=sys.stderr, flush=True)
            yield i
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=len(labels))
        for i, label in enumerate(labels):
            bar.update(task, description=f"{what}: {label}", completed=i)
            yield i


def print_table(title: str, rows: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Two columns: what, and how much."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console(file=file).print(table)


def print_columns(title: str, names: Sequence[str], rows: Iterable[Sequence[str]], file: TextIO | None = None) -> None:
    """A table with named columns, the first of which is never broken."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*names, title=title, title_justify="left")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*map(escape, row))
    Console(file=file).print(table)


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def format_rate(seconds_per_token: float) -> str:
    """0.05 -> '20.0 tokens/s'."""
    return f"{1 / seconds_per_token:.1f} tokens/s" if seconds_per_token else "too few tokens to tell"


class AnswerStream:
    """A streamer for `generate`: shows the phases until the first tokens are there, then the growing text.

    Use it in a `with`, so that an interrupted generate leaves no spinner behind. `seconds` holds the time
    since construction at which each token arrived. The first token is shown together with the second one:
    between the two the decode step is compiled.
    """

    def __init__(self, tokenizer: Any, file: TextIO | None = None) -> None:
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        self.text = ""
        self.prompt_tokens = 0
        self._tokenizer, self._file = tokenizer, file
        self._start = time.perf_counter()
        self._phase = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._phase.close()

    def put(self, tokens: Tensor) -> None:
        """Called by generate with the prompt [1, T] first, then with each new token [1]."""
        self._phase.close()
        if not self.prompt_tokens:
            self.prompt_tokens = tokens.numel()
            self._phase.enter_context(phase(f"prefill: reading {self.prompt_tokens:,} tokens"))
            return
        self.tokens += tokens.flatten().tolist()
        self.seconds.append(time.perf_counter() - self._start)
        if len(self.tokens) == 1:
            self._phase.enter_context(phase("compiling draft and verify, then the first round"))
        else:
            self._show(final=False)

    def end(self) -> None:
        """Called by generate when it is done."""
        self._phase.close()
        self._show(final=True)

    def _show(self, final: bool) -> None:
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        if final or not text.endswith("\N{REPLACEMENT CHARACTER}"):
            new, self.text = text[len(self.text) :], text
            print(new, end="\n" if final else "", file=self._file or sys.stdout, flush=True)
