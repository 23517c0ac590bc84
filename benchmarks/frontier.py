"""What `compressors.py` measured, as a table, a page and a picture: tokens per round against bytes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

DEFAULT = "default"
"""In place of a share of the bytes: a method with the parameters of its paper, as far as it has them."""
COLUMNS = ("at", "method", "setting", "bytes")
BY_THE_CODE = "on the code, where `streaming` has few rejected, or none."
WHY = {
    "adakv": "hardly: on the summary the last queries choose little better than what is newest.",
    "cskv": "every token is a little off, where `streaming` has the newest exactly.",
    "gear": "in 2 bits every number is off, more than the low rank and the outliers give back; 4 take more bytes.",
    "keydiff": BY_THE_CODE,
    "kivi": "in 2 bits, as in its paper, every number is off; in 4 it is better than `streaming`.",
    "kvquant": BY_THE_CODE,
    "kvsharer": "a layer that reads another one's cache is wrong after a few tokens here, and it takes more bytes.",
    "kvzip": "its scores favour no token for being new; `streaming` keeps just those.",
    "lagkv": "each chunk keeps the same share, whatever is in it.",
    "packkv": BY_THE_CODE,
    "pyramidkv": BY_THE_CODE,
    "qpruningkv": BY_THE_CODE,
    "recalkv": "every token is a little off, where `streaming` has the newest exactly; a file is of other text.",
    "refreekv": "it ranks tokens as `streaming` does and takes as many as one query asks for: no budget, no choice.",
    "rotatekv": "in 2 bits every number is off; in 4, at a quarter of the bytes, none of its drafts was rejected.",
    "spark": "at a quarter of the bytes 86 % of each token's channels go; the paper prunes 50 to 80 % of the keys'.",
}
"""Why a method gives fewer tokens per round than `streaming` at its bytes."""
LIMIT = 0.1
"""Of the seconds that reading the prompt takes: more than that is explained."""
SLOW = {
    "h2o": "attention kernels do not give their weights away: each query's are computed again, and their products "
    "alone are a sixth of what reading computes.",
    "kvzip": "the model repeats its context, an extra pass over all of it.",
}
"""Why compressing takes more than LIMIT."""
MEASURED = ("tokens per round", "compress", "draft step", "alone", "streaming", "same")


@dataclass(frozen=True)
class Point:
    """A method at a share of the full cache's bytes: its runs by prompt, and their means."""

    method: str
    share: float | str
    """Or DEFAULT."""
    runs: Mapping[str, Mapping[str, Any]]

    @property
    def bytes(self) -> float:
        """Of the draft cache, as a fraction of the full one's."""
        return mean(run["bytes_per_token"] / run["full_bytes_per_token"] for run in self.runs.values())

    @property
    def rate(self) -> float:
        """Tokens per round."""
        return mean(run["tokens_per_round"] for run in self.runs.values())

    @property
    def compressing(self) -> float:
        """Seconds that compressing a prompt took, as a fraction of what the same process took to read it."""
        parts = ("compress_seconds", "observe_seconds", "repeat_seconds")
        return mean(sum(run[part] for part in parts) / run["read_seconds"] for run in self.runs.values())

    @property
    def label(self) -> str:
        """The share, as text."""
        return self.share if isinstance(self.share, str) else f"{self.share:.0%}"


def points(report: Mapping[str, Any]) -> list[Point]:
    """All that was measured, best first at each share."""
    groups: dict[tuple[str, float | str], dict[str, Any]] = {}
    for run in report["runs"]:
        groups.setdefault((run["method"], run["share"]), {})[run["prompt"]] = run
    made = [Point(method, share, runs) for (method, share), runs in groups.items()]
    return sorted(made, key=lambda point: (point.share == DEFAULT, point.share, -point.rate))


def prompts_of(report: Mapping[str, Any]) -> list[str]:
    """Names of the prompts, in the order in which they ran."""
    return list(dict.fromkeys(run["prompt"] for run in report["runs"]))


def rows(report: Mapping[str, Any]) -> Iterator[list[str]]:
    """A row of text per point: COLUMNS, each prompt's tokens per round, MEASURED."""
    prompts = prompts_of(report)
    for point in points(report):
        runs = [point.runs[name] for name in prompts if name in point.runs]
        alone = ["never" if run["alone_diverges_at"] is None else str(run["alone_diverges_at"]) for run in runs]
        yield [
            point.label,
            point.method,
            runs[0]["compressor"],
            f"{point.bytes:.0%}",
            *(f"{point.runs[name]['tokens_per_round']:.1f}" if name in point.runs else "" for name in prompts),
            f"{point.rate:.1f}",
            f"{point.compressing:.1%}",
            f"{mean(run['draft_step_ms'] for run in runs):.0f} ms",
            " ".join(alone),
            against(point),
            "yes" if all(run["identical"] for run in runs) else "NO",
        ]


def against(point: Point) -> str:
    """On which prompts a method gives more, or fewer, tokens per round than `streaming` does at its bytes."""
    if point.method == "streaming":
        return ""
    more = {name: run["tokens_per_round"] - run["streaming"]["tokens_per_round"] for name, run in point.runs.items()}
    worse = [name for name, gain in more.items() if gain < 0]
    if worse:
        return f"worse: {', '.join(worse)}"
    same = [name for name, gain in more.items() if gain == 0]
    return f"as good: {', '.join(same)}" if same else "better"


def table(report: Mapping[str, Any]) -> Table:
    """For a terminal."""
    title = f"{report['machine']['device']}, {report['machine']['threads']} threads, W = 16"
    made = Table(*COLUMNS, *prompts_of(report), *MEASURED, title=title)
    for row in rows(report):
        made.add_row(*row)
    return made


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """For the documentation; reports may be of several machines."""
    parts = [
        "# Measured as drafters",
        "[Dropping](dropping.md) · [quantising](quantising.md) · [low rank and layers](low_rank_and_layers.md) · "
        "[sketches](sketch.md) · [mixed](mixed.md)",
        "`benchmarks/compressors.py --markdown` wrote this page. SmolLM2-135M in float32, greedy, W = 16, so at most "
        "16 tokens per round; drafts in the model's own weights. Drafting does not rest here where it would not pay.",
        "bytes: of the draft cache with its tail, as a fraction of the full one's; of `quest` and `clusterkv` those of "
        "an index and of two whole layers: they read tokens from the full cache. compress: seconds, as a fraction of "
        "those for reading the prompt, with what a method has the model compute besides. alone: the token at which the "
        "compressed cache alone would have given another. streaming: tokens per round, against those of `streaming` "
        "with a `keep` that takes as many bytes as were measured; better, where no prompt is named. same: whether "
        "tokens were plain's.",
    ]
    for report in reports:
        head = ["method", "setting", "bytes", *prompts_of(report), *MEASURED]
        for label in dict.fromkeys(point.label for point in points(report)):
            body = (row[1:] for row in rows(report) if row[0] == label)
            title = "## With the parameters of their papers" if label == DEFAULT else f"## At {label} of the bytes"
            parts += [title, _setting(report), "\n".join(_markdown_rows(head, *body))]
    parts += _explained(
        f"## Compressing takes more than {LIMIT:.0%} of reading",
        {p.method for report in reports for p in points(report) if p.compressing > LIMIT},
        SLOW,
    )
    worse = {row[1] for report in reports for row in rows(report) if "worse" in row[-2]}
    parts += _explained("## Worse than `streaming`", worse, WHY)
    return "\n\n".join(parts) + "\n"


def _setting(report: Mapping[str, Any]) -> str:
    """What a report was measured on."""
    machine = report["machine"]
    texts = []
    for name in prompts_of(report):
        runs = [run for run in report["runs"] if run["prompt"] == name]
        took = statistics.median(run["read_seconds"] for run in runs)
        texts.append(f"{name} ({runs[0]['prompt_tokens']:,} tokens, read in {took:.1f} s)")
    return (
        f"{machine['device']} with {machine['threads']} thread(s), torch {machine['torch']}, transformers "
        f"{machine['transformers']}; {report['new_tokens']} new tokens. Prompts: {', '.join(texts)}."
        + (f" {report['note']}" if "note" in report else "")
    )


def _explained(title: str, methods: Iterable[str], why: Mapping[str, str]) -> list[str]:
    """A part that says why, for methods of which there may be none."""
    lines = [f"- `{name}`: {why.get(name.partition('+')[0], 'not known.')}" for name in sorted(methods)]
    return [title, "\n".join(lines)] if lines else []


def _markdown_rows(head: list[str], *body: list[str]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in body)


def mean(numbers: Iterable[float]) -> float:
    """Of at least one number."""
    held = list(numbers)
    return float(sum(held) / len(held))


def plot(reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens per round against bytes per token; what no other method beats at fewer bytes is joined by a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    axes = (figure := Figure(figsize=(11, 8), layout="constrained")).subplots()
    every = [point for report in reports for point in points(report)]
    found = sorted(every, key=lambda point: (point.bytes, -point.rate))
    lines: dict[str, list[Point]] = {}
    for point in found:
        lines.setdefault(point.method, []).append(point)
    for i, (method, line) in enumerate(lines.items()):
        places = [point.bytes for point in line], [point.rate for point in line]
        axes.plot(*places, linestyle=":", marker="os^vD*Px"[i % 8], color=f"C{i % 10}", label=method, linewidth=0.7)
    best = [point for i, point in enumerate(found) if all(other.rate < point.rate for other in found[:i])]
    frontier = [point.bytes for point in best], [point.rate for point in best]
    axes.step(*frontier, where="post", color="black", linewidth=1.2, label="frontier")
    axes.set(xlabel="draft cache, fraction of the full cache's bytes", ylabel="tokens per round", xscale="log")
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path)
