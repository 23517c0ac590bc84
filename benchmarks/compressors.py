"""How good is a compression method as a drafter, at equal bytes? Tokens per round on real prompts, and what they cost.

The demo model reads each prompt once, and most methods draft over a copy of that cache; some need to have read it
themselves. Prints a table, and with --json
writes a file from which an interrupted run goes on; --plot draws tokens per round against bytes per token. Drafts read
the model's own weights unless --draft-dtype says otherwise, so that what is rejected is the method's doing.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest.mock import patch

import torch
import transformers
from decode import load, machine
from frontier import DEFAULT, markdown, plot, table
from rich.console import Console
from settings import TRIED, choose, most_within, of_paper, spell

from vericache_compile import calibrate, demo_model_path
from vericache_compile.compressors.learned import Learner
from vericache_compile.compressors.table import find_method, method_names
from vericache_compile.learning import rows_of
from vericache_compile.model_state import state_of
from vericache_compile.runtime.compression import CHUNK
from vericache_compile.runtime.drawn import Drawn
from vericache_compile.runtime.pace import Pace
from vericache_compile.testing import Switch

TOKENS = 3000
"""Of each prompt, at most."""
PREFILL = "snapkv(window=64)"
"""Reads the prompt for most methods: the last 64 queries stay with the copies."""
READERS = ("expected_attention", "h2o", "kvzip")
"""Methods that take more from reading the prompt than that: each setting of theirs reads it anew."""
WARM_UP = 512
WINDOW = 16
WIDTH = 170


def prompts(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Token ids [1, T] by name: code to go on with, a question on a document, a document to sum up."""

    def chat(document: str, ask: str) -> torch.Tensor:
        ids = tokenizer(document).input_ids[: TOKENS - 100]
        content = f"{tokenizer.decode(ids)}\n\n{ask}"
        message = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        made: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        return made

    code = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[:, :TOKENS]
    return {
        "code": code,
        "question": chat(topics["typesseq"], "What is the difference between a list, a tuple and a range?"),
        "summary": chat(topics["attribute-access"], "Summarise the text above in a few sentences."),
    }


class Bench:
    """The compiled demo model, its reading of the prompts, and what plain decoding says to each."""

    def __init__(self, names: Sequence[str], new: int, draft_dtype: str) -> None:
        self.new = new
        self.model = load()
        self.switch = Switch()
        self.switch.options = {"compressor": PREFILL, "draft_dtype": draft_dtype}
        found = prompts(transformers.AutoTokenizer.from_pretrained(demo_model_path()))
        self.prompts = {name: found[name] for name in names}
        self.plain = {name: self.generate(ids)[0, ids.shape[1] :].tolist() for name, ids in self.prompts.items()}
        self.model.compile(backend=self.switch)
        self.generate(next(iter(self.prompts.values()))[:, :WARM_UP], 24)
        self.read_seconds: dict[str, float] = {}
        self.caches = {name: self.read(ids, name) for name, ids in self.prompts.items()}
        self.measured: dict[tuple[str, str], dict[str, Any]] = {}

    @property
    def made(self) -> Any:
        """The compilation that ran last."""
        state = state_of(list(self.model.parameters()))
        assert state is not None and state.latest is not None, "the model has run"
        return state.latest

    def generate(self, ids: torch.Tensor, count: int | None = None, **more: Any) -> torch.Tensor:
        """Greedy tokens [1, T + count] after ids [1, T]."""
        mask = torch.ones_like(ids)
        made: torch.Tensor = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=count or self.new, do_sample=False, **more
        )
        return made

    def read(self, ids: torch.Tensor, name: str) -> tuple[Any, Any]:
        """A cache of all tokens of a prompt but the last, and the sequence that it stands for."""
        cache, began = transformers.DynamicCache(), time.perf_counter()
        with torch.no_grad():
            self.model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.read_seconds.setdefault(name, time.perf_counter() - began)
        return cache, self.made.session.newest

    def measure(self, compressor: str, prompt: str) -> dict[str, Any]:
        """One method on one prompt; once, however often it is asked for."""
        if (compressor, prompt) not in self.measured:
            self.measured[compressor, prompt] = self._measure(compressor, prompt)
        return self.measured[compressor, prompt]

    def streaming_at(self, fraction: float, prompt: str) -> dict[str, Any]:
        """`streaming` at the keep that takes this fraction of the full cache's bytes, tail included."""
        known = self.measure("streaming(keep=0.2)", prompt)
        tail = (known["bytes_per_token"] / known["full_bytes_per_token"] - 0.2) / 0.8  # exact; the rest is kept by 0.2
        keep = min(max(round(100 * (fraction - tail) / (1 - tail)), 1), 100) / 100
        made = self.measure(f"streaming(keep={keep})", prompt)
        return {name: made[name] for name in ("compressor", "bytes_per_token", "tokens_per_round")}

    def try_settings(self, name: str, share: float) -> str:
        """The setting of a method whose bytes depend on the data, by those that it takes on the first prompt."""
        (cache, _), ids = next(iter(self.caches.values())), next(iter(self.prompts.values()))
        sizes = dict[str, float]()
        for setting in (spell(name, each) for each in TRIED[name]):
            self.switch.options = self.switch.options | {"compressor": setting}
            self.generate(ids, 2, past_key_values=copy.deepcopy(cache))
            full = sum(site.bytes_per_token for site in self.made.sites)
            sizes[setting] = self.made.session.footprint.draft / self.made.session.footprint.tokens / full
        return most_within(sizes, share)

    def _measure(self, compressor: str, prompt: str) -> dict[str, Any]:
        ids, plain = self.prompts[prompt], self.plain[prompt]
        self.switch.options = self.switch.options | {"compressor": compressor}
        with observing() as observed:
            cache, sequence = self.read(ids, prompt) if compressor.partition("(")[0] in READERS else self.caches[prompt]
        began = time.perf_counter()
        tokens = self.generate(ids, past_key_values=copy.deepcopy(cache))[0, ids.shape[1] :].tolist()
        took = time.perf_counter() - began
        session = self.made.session
        counts, held = session.counts, session.footprint
        session.counts = type(counts)()
        for count in (WINDOW, len(plain)):  # most methods have given another token by then
            alone = session.draft_alone(sequence, [int(ids[0, -1])], count)[0]
            diverges = next((i for i, (a, b) in enumerate(zip(alone, plain, strict=False)) if a != b), None)
            if diverges is not None:
                break
        pairs = zip(counts.positions, counts.drafted_positions, strict=True)
        return {
            "compressor": re.sub(r"(, )?calibration='[^']*'", "", compressor).replace("(, ", "(").removesuffix("()"),
            "prompt": prompt,
            "prompt_tokens": ids.shape[1],
            "read_seconds": self.read_seconds[prompt],
            "tokens_per_round": 1 + counts.accepted / counts.row_rounds,
            "acceptance_by_position": [accepted / drafted if drafted else None for accepted, drafted in pairs],
            "compress_seconds": counts.compress_seconds,
            "observe_seconds": sum(observed),
            "repeat_seconds": counts.repeat_seconds,
            "draft_step_ms": 1e3 * counts.draft_seconds / counts.drafted,
            "bytes_per_token": (held.draft + session.compressor.shared_nbytes) / held.tokens,
            "full_bytes_per_token": sum(site.bytes_per_token for site in self.made.sites),
            "alone_diverges_at": diverges,
            "identical": tokens == plain,
            "seconds": took,
        }

    def calibrate(self, name: str, path: Path) -> str:
        """A calibration file for a method, by text that is in no prompt."""
        text = inspect.getsource(tempfile) + topics["execmodel"] + topics["comparisons"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model_path())
        calibrate(self.model, rows_of(tokenizer(text, return_tensors="pt").input_ids[0], 12, 256), name, path)
        return str(path)


def measure_all(arguments: argparse.Namespace, report: dict[str, Any], folder: Path, console: Console) -> None:
    """Every method at every share of the full cache's bytes on every prompt, as far as the report lacks them."""
    done = {(run["method"], run["share"], run["prompt"]) for run in report["runs"]}
    jobs = [(method, share) for share in arguments.bytes for method in arguments.methods]
    wanted = [job for job in jobs if any((*job, prompt) not in done for prompt in arguments.prompts)]
    if not wanted:
        return
    with console.status("reading the prompts, compiling"):
        bench = Bench(arguments.prompts, arguments.new, arguments.draft_dtype)
    files: dict[str, str] = {}
    for method, share in wanted:
        name, _, calibrated = method.partition("+")
        learner = of_paper(name, None) if share == DEFAULT else name
        if calibrated and learner not in files:
            with console.status(f"calibrating {learner}"):
                files[learner] = bench.calibrate(learner, folder / f"{len(files)}.safetensors")
        file = files[learner] if calibrated else None
        if share == DEFAULT:
            compressor = of_paper(name, file)
        else:
            tail = (CHUNK + 2 * WINDOW) / (TOKENS + arguments.new)
            compressor = (
                bench.try_settings(name, share)
                if name in TRIED
                else choose(name, share, bench.made.sites, TOKENS, file, tail)
            )
        at = share if share == DEFAULT else f"{share:.0%} of the bytes"
        for prompt in arguments.prompts:
            if (method, share, prompt) not in done:
                with console.status(f"{method} at {at}: {prompt}"):
                    run = bench.measure(compressor, prompt)
                    other = bench.streaming_at(run["bytes_per_token"] / run["full_bytes_per_token"], prompt)
                report["runs"].append({"method": method, "share": share, **run, "streaming": other})
                save(report, arguments.json)


@contextmanager
def observing() -> Iterator[list[float]]:
    """Seconds in which attention is computed again for a method that wants to know it, call by call."""
    spent: list[float] = []
    add = Drawn.add

    def timed(*args: Any) -> None:
        began = time.perf_counter()
        add(*args)
        spent.append(time.perf_counter() - began)

    with patch.object(Drawn, "add", timed):
        yield spent


def share_of(text: str) -> float | str:
    """What --bytes takes."""
    return text if text == DEFAULT else float(text)


def save(report: dict[str, Any], path: Path | None) -> None:
    """Write what there is so far; the file is whole at every moment."""
    if path is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(path)


def main() -> None:
    """Run the benchmark."""
    known = [name for name in method_names() if name != "none"]
    known += [f"{name}+calibrated" for name in known if issubclass(find_method(name), Learner)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=known, metavar="M", help=f"of {', '.join(known)}")
    parser.add_argument("--prompts", nargs="*", default=["code", "question", "summary"])
    shares = [0.25, DEFAULT, 0.125, 0.5]
    told = "shares of the full cache's; `default`: the parameters of each method's paper"
    parser.add_argument("--bytes", nargs="*", type=share_of, default=shares, help=told)
    parser.add_argument("--new", type=int, default=128, help="tokens to decode (default %(default)s)")
    parser.add_argument("--draft-dtype", default="same", help="type that drafts read weights in (default %(default)s)")
    parser.add_argument("--json", type=Path, help="where results go, and come from when the run is taken up again")
    parser.add_argument("--plot", type=Path, help="where the picture goes")
    parser.add_argument("--markdown", type=Path, help="where the table goes, as a page of the documentation")
    told = "more results to show on the page and in the picture, of other shares or machines"
    parser.add_argument("--beside", nargs="*", type=Path, default=[], metavar="JSON", help=told)
    arguments = parser.parse_args()
    console = Console(width=WIDTH)
    settings = {"machine": machine(), "new_tokens": arguments.new, "draft_dtype": arguments.draft_dtype}
    report: dict[str, Any] = {**settings, "runs": []}
    if arguments.json is not None and arguments.json.exists():
        held = json.loads(arguments.json.read_text())
        if {key: held.get(key) for key in settings} != settings:
            parser.error(f"{arguments.json} was measured otherwise, or on another machine: name another file")
        report = held
    drafting = patch.object(Pace, "note", lambda *_: None)  # a method is measured where it would not pay, too
    with drafting, tempfile.TemporaryDirectory() as folder:
        measure_all(arguments, report, Path(folder), Console(stderr=True))
    console.print(table(report))
    reports = [report, *(json.loads(path.read_text()) for path in arguments.beside)]
    if arguments.plot is not None:
        plot(reports, arguments.plot)
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(reports))


if __name__ == "__main__":
    main()
