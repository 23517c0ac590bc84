"""The `vericache` command: run, trace, check, bench, explain, plan, sweep, compressors, calibrate, plot, doctor.

With --json, stdout holds exactly one JSON document; everything else goes to stderr. Exit codes: 0 all well,
1 tokens differ or something needed is missing, 2 wrong input (three parts on stderr: found, where, fix).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

import vericache_compile
from vericache_compile.cli_calibrate import add_arguments as add_calibration
from vericache_compile.cli_calibrate import calibrate
from vericache_compile.cli_commands import bench, check, compressors, positive, run, trace
from vericache_compile.cli_explain import explain
from vericache_compile.cli_plan import plan
from vericache_compile.doctor import doctor
from vericache_compile.errors import VericacheError
from vericache_compile.plot import plot
from vericache_compile.sweep import sweep

Command = Callable[[argparse.Namespace], tuple[Any, int]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = make_parser().parse_args(argv)
    command: Command = args.command
    try:
        with redirect_stdout(sys.stderr) if args.json else nullcontext():
            result, code = command(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        reason = _find_reason(error)
        if reason is None:
            raise
        print(f"vericache: {reason}", file=sys.stderr)
        result, code = {"error": reason.parts}, 2
    if args.json:
        print(json.dumps(result, indent=2, default=str))
    return code


def _find_reason(error: BaseException | None) -> VericacheError | None:
    """Our own error, also where Dynamo has wrapped it in one of its own."""
    while error is not None and not isinstance(error, VericacheError):
        error = error.__cause__ or error.__context__
    return error


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="vericache", description=vericache_compile.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"%(prog)s {vericache_compile.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    made = commands.add_parser("run", help="answer a prompt, streamed, then a table of what happened")
    _add_model(made, max_new_tokens=256)
    made.add_argument("--check", action="store_true", help="then do what `vericache check` does")
    _finish(made, run)

    made = commands.add_parser("trace", help="run, and write a Chrome trace of calls, rounds and transfers")
    _add_model(made, max_new_tokens=64)
    made.set_defaults(check=False)
    _finish(made, trace)

    made = commands.add_parser("check", help="compare with plain generate; exit code 1 when tokens differ")
    _add_model(made, max_new_tokens=64)
    _finish(made, check)

    made = commands.add_parser("bench", help="time plain generate and vericache in turn; medians")
    _add_model(made, max_new_tokens=128)
    made.add_argument("--repeat", type=positive, default=3, help="runs of each (default %(default)s)")
    made.add_argument("--batch", type=positive, default=1, help="copies of the prompt (default %(default)s)")
    _finish(made, bench)

    made = commands.add_parser("compressors", help="the compression methods: parameters, what they need, the paper")
    _finish(made, compressors)

    made = commands.add_parser("calibrate", help="let a compression method learn from a text, once for a model")
    add_calibration(made)
    _add_device(made)
    _finish(made, calibrate)

    made = commands.add_parser(
        "explain", help="how a model would run, and why not where it would not; compiles nothing"
    )
    made.add_argument("model", nargs="?", default="demo", metavar="demo|PATH|HUB_ID", help="default %(default)s")
    _add_device(made)
    _add_options(made)
    _finish(made, explain)

    made = commands.add_parser(
        "plan",
        help="where full KV should live and what that gives, by arithmetic; runs nothing",
        epilog="Of a mixture of experts each step is taken to read all experts' weights: with few rows it is faster.",
    )
    _add_plan(made)
    _finish(made, plan)
    made = commands.add_parser("sweep", help="which families of models are taken, tried on small random ones")
    made.add_argument("names", nargs="*", metavar="NAME", help="families, as llama or falcon-alibi (default: all)")
    made.add_argument("--markdown", metavar="F", help="write the table to a page")
    made.add_argument("--inductor", action="store_true", help="compile segments (default: run them eagerly)")
    _finish(made, sweep)

    made = commands.add_parser("plot", help="draw a run's statistics: acceptance, tokens per round, time")
    made.add_argument("stats", metavar="STATS.json", help="what `vericache run --json` printed")
    made.add_argument("--output", default="vericache.png", metavar="F", help=".png, .svg or .pdf (default %(default)s)")
    _finish(made, plot)

    made = commands.add_parser("doctor", help="versions, devices, what is missing and how to get it")
    _finish(made, doctor)
    return parser


def _finish(parser: argparse.ArgumentParser, command: Command) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
    parser.set_defaults(command=command)


def _add_model(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    model = parser.add_argument_group("model and prompt")
    model.add_argument("--model", default="demo", metavar="demo|PATH|HUB_ID", help="default %(default)s")
    model.add_argument("--prompt-file", required=True, metavar="F", help="the prompt; - reads stdin")
    model.add_argument("--max-new-tokens", type=positive, default=max_new_tokens, metavar="N")
    _add_device(model)
    chat = "put the prompt into the model's chat template (default: when it has one)"
    model.add_argument("--chat", action=argparse.BooleanOptionalAction, help=chat)
    _add_options(parser)


def _add_device(parser: Any) -> None:
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def _add_options(parser: argparse.ArgumentParser) -> None:
    source = "Those not given come from VERICACHE_<OPTION>, else from the defaults."
    options = parser.add_argument_group("options of the backend", source)
    options.add_argument("--compressor", help="a method that `vericache compressors` lists (default: snapkv)")
    options.add_argument("--keep", type=float, help="fraction of the tokens that the draft keeps")
    options.add_argument("--bits", type=int, help="bits per value of a quantising compressor")
    options.add_argument("--window", type=int, metavar="W", help="tokens per verify pass, a power of two")
    options.add_argument("--draft-dtype", help="type that draft reads weights in: auto, same, bfloat16, float16, int8")
    options.add_argument("--no-inductor", dest="inductor", action="store_const", const=False, help="run eagerly")
    options.add_argument("--placement", help="where full KV lives: auto, device, host, disk")
    options.add_argument("--staging-mb", type=float, metavar="MIB", help="device memory for full KV that comes in")
    options.add_argument("--kv-folder", metavar="DIR", help="where --placement disk makes its file")
    options.add_argument("--dump", metavar="DIR", help="write each graph after each pass to a folder of its own")
    tokens = "write the tokens of prompts and rounds there too, in tokens.jsonl"
    options.add_argument("--dump-tokens", action="store_const", const=True, help=tokens)
    options.add_argument("--trace", metavar="FILE", help="write a Chrome trace of calls and rounds")
    options.add_argument("--strict", action="store_const", const=True, help="raise instead of falling back")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", metavar="demo|PATH|HUB_ID", help="its config.json is enough")
    parser.add_argument(
        "--context", type=positive, required=True, metavar="TOKENS", help="of each sequence, new ones too"
    )
    parser.add_argument("--batch", type=positive, default=1, help="sequences (default %(default)s)")
    _add_device(parser)
    machine = parser.add_argument_group("the machine", "Those not given are measured here, once.")
    machine.add_argument("--device-memory", type=float, metavar="GB", help="memory of the device")
    machine.add_argument("--memory-bandwidth", type=float, metavar="GB/s", help="of that memory")
    machine.add_argument("--link-bandwidth", type=float, metavar="GB/s", help="from host memory to the device")
    rate = "that verify confirms, of a window of W (default: 7/8 of W; `vericache run` says what it is on your text)"
    parser.add_argument("--tokens-per-round", type=float, metavar="N", help=rate)
    _add_options(parser)


if __name__ == "__main__":
    sys.exit(main())
