"""What `vericache explain` does: capture and passes only, then tables of what was found."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vericache_compile.cli_commands import load, options_of
from vericache_compile.terminal import format_bytes, phase, print_columns, print_table

if TYPE_CHECKING:
    from vericache_compile.explanation import Explanation

PROMPT_TOKENS = 8
SITE = ("heads", "kv_heads", "head_size", "dtype", "mask", "bytes_per_token")


def explain(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Exit code 1 where no decode step would be taken."""
    import torch

    from vericache_compile.explanation import explain as explain_model

    options = options_of(args)
    model, _ = load(args)
    ids = torch.arange(1, 1 + PROMPT_TOKENS, device=model.device)[None] % model.config.vocab_size
    with phase("capturing a few steps"):
        made = explain_model(model, input_ids=ids, attention_mask=torch.ones_like(ids), options=options)
    _show(made)
    return made.as_dict(), 0 if made.segments else 1


def _show(made: Explanation) -> None:
    print_table(f"vericache explain: {made.model}", summary(made))
    if made.sites:
        header = ("layer", "heads", "KV heads", "head size", "type", "mask", "bytes per token")
        print_columns("attention sites", header, site_rows(made.sites))
    for reason in made.not_taken:
        number = "" if reason["graph"] is None else f" (graph {reason['graph']})"
        print(f"not taken{number}: {reason['found']}\n  where: {reason['where']}\n  fix: {reason['fix']}")


def summary(made: Explanation) -> dict[str, str]:
    """The rows of the first table."""
    kinds = [graph["runs_as"] for graph in made.graphs]
    rows = {"graphs captured": ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none"}
    if made.sites:
        sizes = made.cache_bytes_per_token
        rows["cache bytes per token"] = f"{format_bytes(sizes['full'])} full, {format_bytes(sizes['compressed'])} draft"
        rows["compressor, window"] = f"{made.compressor}, {made.window}"
    if made.segments:
        rows["nodes"] = ", ".join(f"{count:,} {name}" for name, count in made.nodes.items())
        for name, count in made.segments.items():
            rows[f"segments of {name}"] = f"{count['total']}, {count['distinct']} of them distinct"
        step = made.bytes_per_step
        for name, what in (("full", "full decode step"), ("draft", "draft step"), ("verify", "verify pass")):
            rows[f"bytes per {what}"] = f"{format_bytes(step[name])} at {step['at_tokens']:,} tokens"
    return rows


def site_rows(sites: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row for each run of layers that are alike: "0-29"."""
    runs: list[tuple[int, int, tuple[str, ...]]] = []
    for site in sites:
        cells = tuple(str(site[name]) for name in SITE)
        if runs and runs[-1][2] == cells:
            runs[-1] = (runs[-1][0], site["layer"], cells)
        else:
            runs.append((site["layer"], site["layer"], cells))
    return [(str(first) if first == last else f"{first}-{last}", *cells) for first, last, cells in runs]
