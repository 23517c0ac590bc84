"""The command: its parser, its exit codes, and that --json keeps stdout to one document."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vericache_compile import cli_commands
from vericache_compile.cli import main, make_parser
from vericache_compile.compressors.table import COMPRESSORS
from vericache_compile.doctor import Finding, find_all
from vericache_compile.errors import VericacheError
from vericache_compile.terminal import AnswerStream, format_bytes, format_rate

STATS = {
    "rounds": 2, "drafted": 30, "accepted": 20, "served_rows": 22, "tokens_per_round": 11.0,
    "seconds": {"draft": 1.0, "verify": 0.5, "prefill": 2.0, "compile": 9.0},
    "bytes": {"full": 4096, "draft": 1024, "per_token_full": 64, "per_token_draft": 16},
    "compressor": "snapkv", "window": 16, "sites": 30, "graphs": {"prefill": 1, "decode": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    identical: bool = True
    tokens_per_round: float = 11.0
    plain_seconds_per_token: float = 0.2
    seconds_per_token: float = 0.1

    def __str__(self) -> str:
        return "identical: 3 tokens" if self.identical else "different from token 1 on"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Tokenizer:
    """One token a character."""

    chat_template = "[{content}]"

    def __call__(self, text: str, **_: object) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[ord(character) for character in text]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return self.chat_template.format(**messages[0])

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(map(chr, tokens))


class Model:
    """Answers "abc" to everything."""

    device = torch.device("cpu")

    def compile(self, **settings: object) -> None:
        self.settings = settings

    def generate(self, input_ids: torch.Tensor, streamer: AnswerStream, **_: object) -> None:
        streamer.put(input_ids)
        for token in b"abc":
            streamer.put(torch.tensor([token]))
        streamer.end()


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    path = tmp_path / "prompt.txt"
    path.write_text("hello", encoding="utf-8")
    return str(path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A model and a library that only note what the command asked of them."""
    asked: list[dict[str, Any]] = []

    def check(model: Model, inputs: dict[str, torch.Tensor], **settings: Any) -> Report:
        asked.append({"shape": tuple(inputs["input_ids"].shape), **settings})
        return Report(identical=settings.get("compressor") != "streaming")

    library = SimpleNamespace(check=check, stats=lambda model: STATS)
    monkeypatch.setitem(sys.modules, "vericache_compile.api", library)
    monkeypatch.setattr(cli_commands, "load", lambda *args: (Model(), Tokenizer()))
    return asked


def test_every_command_takes_json() -> None:
    for words in (
        ["run", "--prompt-file", "f"],
        ["check", "--prompt-file", "f"],
        ["bench", "--prompt-file", "f"],
    ):
        assert make_parser().parse_args([*words, "--json"]).json
    assert make_parser().parse_args(["doctor", "--json"]).json


def test_options_that_are_not_given_stay_unset() -> None:
    args = make_parser().parse_args(["run", "--prompt-file", "f"])
    assert {name: getattr(args, name) for name in cli_commands.OPTIONS} == dict.fromkeys(cli_commands.OPTIONS)
    words = ["--keep", "0.2", "--window", "8", "--no-inductor", "--strict", "--no-chat"]
    args = make_parser().parse_args(["run", "--prompt-file", "f", *words])
    assert (args.keep, args.window, args.inductor, args.strict, args.chat) == (0.2, 8, False, True, False)


@pytest.mark.parametrize("words", [[], ["run"], ["walk"], ["run", "--prompt-file", "f", "--max-new-tokens", "0"]])
def test_a_wrong_command_line_exits_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: vericache" in capsys.readouterr().err


def test_run_streams_the_answer_and_then_the_numbers(
    prompt: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--prompt-file", prompt]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("abc\n")
    assert "2, 11.0 tokens each" in shown.out
    assert "prefill: reading 7 tokens" in shown.err  # the chat template adds two
    assert calls == []


def test_run_json_is_one_document_on_stdout(
    prompt: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--prompt-file", prompt, "--no-chat", "--check", "--keep", "0.2", "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert (document["text"], document["tokens"], document["prompt_tokens"]) == ("abc", [97, 98, 99], 5)
    assert document["stats"] == STATS
    assert document["check"]["identical"] is True
    assert "abc" in shown.err
    assert calls == [{"shape": (1, 5), "max_new_tokens": 256, "keep": 0.2}]


@pytest.mark.parametrize(("compressor", "code"), [("snapkv", 0), ("streaming", 1)])
def test_check_exits_with_1_when_tokens_differ(
    prompt: str, calls: list[dict[str, Any]], compressor: str, code: int
) -> None:
    assert main(["check", "--prompt-file", prompt, "--compressor", compressor]) == code
    assert calls == [{"shape": (1, 7), "max_new_tokens": 64, "compressor": compressor}]


def test_bench_warms_up_and_takes_medians(
    prompt: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--prompt-file", prompt, "--repeat", "2", "--batch", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["speedup"] == pytest.approx(2.0)
    assert len(document["runs"]) == 2
    assert [(call["shape"], call["max_new_tokens"]) for call in calls] == [((3, 7), n) for n in (32, 128, 128)]


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        (["--prompt-file", "{folder}/none.txt"], "the prompt cannot be read", "name a text file"),
        (["--prompt-file", "{folder}/empty.txt"], "the prompt is empty", "put some text"),
        (["--prompt-file", "{prompt}", "--compressor", "snapvk"], "snapvk", "did you mean 'snapkv'"),
        (["--prompt-file", "{prompt}", "--window", "7"], "window=7", "power of two"),
        (["--prompt-file", "{prompt}", "--model", "{folder}/no-model"], "the model cannot be loaded", "hub"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check", "bench"])
def test_wrong_input_says_three_things_and_exits_with_2(
    command: str, words: list[str], found: str, fix: str, prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(prompt).parent
    (folder / "empty.txt").write_text(" \n")
    given = [word.format(folder=folder, prompt=prompt) for word in words]
    assert main([command, *given, "--json"]) == 2
    shown = capsys.readouterr()
    error = json.loads(shown.out)["error"]
    assert found in error["found"]
    assert fix in error["fix"]
    assert f"where: {error['where']}" in shown.err
    assert "Traceback" not in shown.err


def test_our_error_is_found_inside_one_of_dynamos(
    prompt: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object) -> None:
        try:
            raise VericacheError("an unproven mask", "layer 3", "drop it")
        except VericacheError as error:
            raise RuntimeError("backend failed") from error

    monkeypatch.setattr(cli_commands, "load", load)
    assert main(["check", "--prompt-file", prompt]) == 2
    assert "an unproven mask" in capsys.readouterr().err


def test_an_error_that_is_not_ours_is_not_hidden(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_commands, "load", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["check", "--prompt-file", prompt])


def test_doctor_json_names_all_that_matters() -> None:
    command = [sys.executable, "-m", "vericache_compile.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    document = json.loads(done.stdout)
    assert done.returncode == (0 if document["ok"] else 1)
    findings = {finding["name"]: finding for finding in document["findings"]}
    names = {"python", "torch", "transformers", "triton", "C++ compiler", "Python.h", "entry point"}
    assert names | {"cache folder", "demo model"} <= set(findings)
    assert findings["entry point"]["ok"], findings["entry point"]["fix"]
    assert all(finding["ok"] or finding["fix"] for finding in findings.values())


def test_doctor_fails_only_for_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("triton", "not installed", False, needed=False, fix="none")]
    monkeypatch.setattr("vericache_compile.doctor.find_all", lambda: findings)
    assert main(["doctor"]) == 0
    findings.append(Finding("C++ compiler", "g++ not found", False, fix="apt install g++"))
    assert main(["doctor"]) == 1
    assert "apt install g++" in capsys.readouterr().out


def test_doctor_sees_a_missing_compiler_and_an_unwritable_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("VERICACHE_HOME", str(tmp_path / "file" / "cache"))
    missing = {finding.name for finding in find_all() if finding.needed and not finding.ok}
    assert {"C++ compiler", "cache folder"} <= missing


def test_a_character_is_shown_when_all_its_tokens_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    class Bytes(Tokenizer):
        def decode(self, tokens: list[int], **_: object) -> str:
            return bytes(tokens).decode(errors="replace")

    shown = []
    with AnswerStream(Bytes()) as stream:
        stream.put(torch.zeros(1, 4))
        for token in "aé!".encode():
            stream.put(torch.tensor([token]))
            shown.append(capsys.readouterr().out)
        stream.end()
    assert shown == ["", "", "aé", "!"]
    assert stream.text == "aé!"
    assert len(stream.seconds) == 4


def test_numbers_read_well() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 << 30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
    assert format_rate(0.05) == "20.0 tokens/s"
    assert format_rate(0.0) == "too few tokens to tell"


def test_compressors_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compressors", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [method["name"] for method in listed] == list(COMPRESSORS)
    snapkv = next(method for method in listed if method["name"] == "snapkv")
    assert snapkv["parameters"] == {"keep": 0.2, "refresh": 0, "window": 32, "kernel": 7}
    assert (snapkv["needs"], snapkv["paper"]) == (["queries"], "arXiv 2404.14469")

    assert main(["compressors"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMPRESSORS)
    assert "budgets, before a method and |: pyramid(beta=20.0), ada(floor=0.2)" in shown


@pytest.mark.parametrize(
    ("words", "variable", "file"),
    [
        ([], "", "vericache-trace.json"),
        ([], "from-variable.json", "from-variable.json"),
        (["--trace", "given.json"], "from-variable.json", "given.json"),
    ],
)
def test_a_trace_goes_where_the_options_say(
    words: list[str], variable: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERICACHE_TRACE", variable)
    monkeypatch.setattr(cli_commands, "run", lambda args: ({}, 0))
    args = make_parser().parse_args(["trace", "--prompt-file", "f", *words])
    assert cli_commands.trace(args) == ({"trace": file}, 0)


def test_a_file_that_cannot_be_written_is_found_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "missing" / "file")
    assert main(["sweep", "llama", "--markdown", out]) == 2
    assert main(["calibrate", "--compressor", "kvquant", "--text", "none", "--out", out]) == 2
    assert capsys.readouterr().err.count(f"{out} cannot be written") == 2


@pytest.mark.parametrize("option", ["--rows", "--tokens"])
def test_a_calibration_is_on_some_tokens(option: str) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", "--compressor", "kvquant", "--text", "f", "--out", "f", option, "0"])
