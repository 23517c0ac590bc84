"""`vericache calibrate`: what a compression method learns of a model, in a file."""

from __future__ import annotations

import argparse
from typing import Any

from vericache_compile.cli_commands import check_folder, load, positive, read_text
from vericache_compile.terminal import phase, print_table

ROWS, TOKENS = 16, 512
"""Pieces of the text, and tokens of each, where nothing else is said."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments, beside the device's."""
    parser.add_argument("--model", default="demo", metavar="demo|PATH|HUB_ID", help="default %(default)s")
    parser.add_argument("--compressor", required=True, help="kvquant, recalkv, cskv or kvsharer, with parameters")
    parser.add_argument("--text", required=True, metavar="FILE", help="what the model reads; - reads stdin")
    parser.add_argument("--out", required=True, metavar="F.safetensors", help="where what it learns goes")
    parser.add_argument("--rows", type=positive, default=ROWS, help="pieces of the text (default %(default)s)")
    parser.add_argument("--tokens", type=positive, default=TOKENS, help="tokens of each piece (default %(default)s)")


def calibrate(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Calibrate, and say what was written; wrong input is found before the model is loaded."""
    from vericache_compile.learning import calibrate as learn
    from vericache_compile.learning import learner, rows_of

    learner(args.compressor)
    check_folder(args.out, "--out")
    text = read_text(args.text, "--text")
    model, tokenizer = load(args, "AutoTokenizer")
    ids = rows_of(tokenizer(text, return_tensors="pt").input_ids[0], args.rows, args.tokens).to(model.device)
    with phase(f"calibrating {args.compressor} on {len(ids)} pieces of {args.tokens:,} tokens"):
        written = learn(model, ids, args.compressor, args.out)
    rows = {"file": args.out, "method": written["parameters"], "layers": str(len(written["model"]["sites"]))}
    print_table("vericache calibrate", rows)
    return {"file": args.out, "pieces": len(ids), "tokens": args.tokens, **written}, 0
