"""What `vericache run`, `check`, `bench` and `compressors` do: each returns (what --json prints, exit code)."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vericache_compile.errors import VericacheError
from vericache_compile.terminal import AnswerStream, format_bytes, format_rate, phase, print_columns, print_table

OPTIONS = (
    *("compressor", "keep", "bits", "window", "draft_dtype", "placement", "staging_mb", "kv_folder"),
    *("inductor", "strict", "dump", "dump_tokens", "trace"),
)
WARM_UP_TOKENS = 32


def run(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Answer the prompt as a user's program would, then say what happened."""
    from vericache_compile.api import check as self_check
    from vericache_compile.api import stats

    model, tokenizer, inputs, options = _prepare(args)
    model.compile(backend="vericache", options=options)
    with AnswerStream(tokenizer) as stream:
        model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, streamer=stream)
    numbers = stats(model)
    print_table("vericache run", _stats_rows(stream, numbers))
    result = {
        "model": args.model,
        "prompt_tokens": stream.prompt_tokens,
        "text": stream.text,
        "tokens": stream.tokens,
        "seconds": stream.seconds[-1] if stream.seconds else 0.0,
        "stats": numbers,
        "check": None,
    }
    if not args.check:
        return result, 0
    with phase("self-check: plain generate and vericache"):
        report = self_check(model, inputs, max_new_tokens=args.max_new_tokens, **options)
    print(report)
    return result | {"check": report.as_dict()}, 0 if report.identical else 1


def trace(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """As `run`, with a trace: in --trace, else $VERICACHE_TRACE, else `vericache-trace.json`."""
    args.trace = args.trace or os.environ.get("VERICACHE_TRACE") or "vericache-trace.json"
    result, code = run(args)
    print(f"the trace is in {args.trace}: open it in https://ui.perfetto.dev or chrome://tracing", file=sys.stderr)
    return {**result, "trace": args.trace}, code


def check(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Compare with plain generate."""
    from vericache_compile.api import check as self_check

    model, _, inputs, options = _prepare(args)
    with phase("self-check: plain generate and vericache"):
        report = self_check(model, inputs, max_new_tokens=args.max_new_tokens, **options)
    print(report)
    return {"model": args.model, **report.as_dict()}, 0 if report.identical else 1


def bench(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Time both in turn, so that a slow moment of the machine meets both; medians."""
    from vericache_compile.api import check as self_check

    model, _, inputs, options = _prepare(args)
    inputs = {name: tensor.repeat(args.batch, 1) for name, tensor in inputs.items()}
    with phase("warm-up: compiling"):
        self_check(model, inputs, max_new_tokens=min(WARM_UP_TOKENS, args.max_new_tokens), **options)
    reports = []
    for number in range(args.repeat):
        with phase(f"run {number + 1} of {args.repeat}"):
            reports.append(self_check(model, inputs, max_new_tokens=args.max_new_tokens, **options))
    plain = statistics.median(report.plain_seconds_per_token for report in reports)
    ours = statistics.median(report.seconds_per_token for report in reports)
    result = {
        "model": args.model,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "batch": args.batch,
        "max_new_tokens": args.max_new_tokens,
        "options": options,
        "plain_seconds_per_token": plain,
        "seconds_per_token": ours,
        "speedup": plain / ours if ours else None,
        "tokens_per_round": statistics.median(report.tokens_per_round for report in reports),
        "identical": all(report.identical for report in reports),
        "runs": [report.as_dict() for report in reports],
    }
    print_table("vericache bench", _bench_rows(result))
    return result, 0 if result["identical"] else 1


def compressors(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """List the compression methods: ours, those of other packages, those that this process registered.

    A package's that cannot be used has an `error`, told below the table like what may stand before a method.
    """
    from vericache_compile.compressors.table import BUDGETS, all_methods, all_parameters, budget_parameters

    methods, found = all_methods(), list[dict[str, Any]]()
    for name, method in methods.items():
        if isinstance(method, VericacheError):
            found.append({"name": name, "parameters": {}, "needs": [], "paper": "", "error": method.parts})
        else:
            parameters, needs = all_parameters(method), list(method.needs)
            found.append({"name": name, "parameters": parameters, "needs": needs, "paper": method.paper})
    print_columns("vericache compressors", ("name", "parameters", "needs", "paper"), map(_method_row, found))
    for name, method in methods.items():
        if isinstance(method, VericacheError):
            print(f"{name}: {method}")
    budgets = (f"{name}({_spell(budget_parameters(budget))})" for name, budget in BUDGETS.items())
    print(f"budgets, before a method and |: {', '.join(budgets)}")
    return found, 0


def _method_row(method: Mapping[str, Any]) -> tuple[str, str, str, str]:
    shown = "error, see below" if "error" in method else _spell(method["parameters"])
    return method["name"], shown, ", ".join(method["needs"]), method["paper"]


def _spell(parameters: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={default}" for name, default in parameters.items())


def _prepare(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """Model, tokenizer, inputs and checked options; wrong input is found before anything slow starts."""
    options = options_of(args)
    prompt = read_text(args.prompt_file, "--prompt-file")
    model, tokenizer = load(args, "AutoTokenizer")
    inputs = _encode(tokenizer, prompt, args.chat)
    return model, tokenizer, {name: tensor.to(model.device) for name, tensor in inputs.items()}, options


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The backend's options that were given; raises OptionError for a wrong one."""
    from vericache_compile.config import make_config

    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    make_config(options)
    return options


def read_text(file: str, option: str) -> str:
    """The text in a file, or on stdin for -; raises VericacheError where it cannot be read or is empty."""
    what = option.removeprefix("--").removesuffix("-file")
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = f"the {what} cannot be read: {getattr(error, 'strerror', None) or error}"
        fix = "name a text file in UTF-8, or - for stdin"
        raise VericacheError(found, f"{option} {file}", fix) from error
    if not text.strip():
        raise VericacheError(f"the {what} is empty", f"{option} {file}", "put some text into it")
    return text


def positive(text: str) -> int:
    """A parser's type: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def check_folder(file: str, option: str) -> None:
    """Raise VericacheError where a file could not be written, before anything slow makes what goes into it."""
    folder = Path(file).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(file).is_dir():
        found = f"{file} cannot be written"
        raise VericacheError(found, f"{option} {file}", "name a file in a folder that is there and can be written to")


def model_path(args: argparse.Namespace) -> str:
    """The folder or name that --model stands for; fetches the demo model where it is missing."""
    from vericache_compile.demo_model import demo_model_path

    return str(demo_model_path()) if args.model == "demo" else args.model


def load(args: argparse.Namespace, companion: str = "AutoConfig") -> tuple[Any, Any]:
    """The model that the arguments name, and what a class of transformers reads beside it; raises VericacheError."""
    import torch
    import transformers

    path = model_path(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        beside = getattr(transformers, companion).from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype).eval()
    except (OSError, ValueError) as error:
        found = f"the model cannot be loaded: {first_line(error)}"
        fix = "name `demo`, a folder with config.json, weights and tokenizer, or a model of the hub"
        raise VericacheError(found, f"--model {args.model}", fix) from error
    try:
        return model.to(device), beside
    except (RuntimeError, AssertionError) as error:
        found = f"the model does not go to {device}: {first_line(error)}"
        fix = "`vericache doctor` lists the devices; try --device cpu, or --dtype bfloat16"
        raise VericacheError(found, f"--model {args.model}", fix) from error


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _encode(tokenizer: Any, prompt: str, chat: bool | None) -> dict[str, Any]:
    """input_ids and attention_mask, [1, T] each."""
    if chat and not tokenizer.chat_template:
        raise VericacheError("the model has no chat template", "--chat", "use --no-chat")
    if tokenizer.chat_template and chat is not False:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return dict(tokenizer(prompt, return_tensors="pt", add_special_tokens=False))
    return dict(tokenizer(prompt, return_tensors="pt"))


def _stats_rows(stream: AnswerStream, numbers: Mapping[str, Any]) -> dict[str, str]:
    seconds, sizes = numbers["seconds"], numbers["bytes"]
    per_token = f"{format_bytes(sizes['per_token_draft'])} of {format_bytes(sizes['per_token_full'])}"
    return {
        "prompt / new tokens": f"{stream.prompt_tokens:,} / {len(stream.tokens):,}",
        "compressor, window": f"{numbers['compressor']}, {numbers['window']}",
        "attention sites": str(numbers["sites"]),
        "rounds": f"{numbers['rounds']:,}, {numbers['tokens_per_round']:.1f} tokens each",
        "drafted / accepted": f"{numbers['drafted']:,} / {numbers['accepted']:,}",
        "KV bytes, draft / full": f"{format_bytes(sizes['draft'])} / {format_bytes(sizes['full'])}",
        "KV bytes per token, draft": per_token,
        **{f"seconds in {name}": f"{value:.2f}" for name, value in seconds.items()},
    }


def _bench_rows(result: Mapping[str, Any]) -> dict[str, str]:
    plain, ours, batch = result["plain_seconds_per_token"], result["seconds_per_token"], result["batch"]
    return {
        "prompt / new tokens": f"{result['prompt_tokens']:,} / {result['max_new_tokens']:,}",
        "batch": str(batch),
        "plain generate": f"{1e3 * plain:.1f} ms per step, {format_rate(plain / batch)}",
        "vericache": f"{1e3 * ours:.1f} ms per step, {format_rate(ours / batch)}",
        "speedup": f"{result['speedup']:.2f}x" if result["speedup"] else "too few tokens to tell",
        "tokens per round": f"{result['tokens_per_round']:.1f}",
        "tokens identical": "yes" if result["identical"] else "NO",
    }
