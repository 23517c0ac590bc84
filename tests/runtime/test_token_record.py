"""tokens.jsonl: what a caller gets can be read off it, and only who asks for tokens has them written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_prompt, make_tiny

OPTIONS = {"inductor": False, "window": 4}
ROOM = 9 + 12 - 1
"""Columns of a static cache: the last token is not fed."""


def records(folder: Path, batch: int, **asked: Any) -> tuple[list[dict[str, Any]], list[list[int]], list[list[int]]]:
    """What was written down of a generation, its prompt, and the tokens that it gave."""
    model, prompt = make_tiny("llama"), make_prompt(9, batch)
    model.compile(backend="vericache", options={**OPTIONS, "dump": str(folder), "dump_tokens": True})
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False, **asked)
    lines = (folder / "tokens.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], prompt["input_ids"].tolist(), out[:, 9:].tolist()


@pytest.mark.parametrize(
    ("batch", "asked"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        (3, {"cache_implementation": "static"}),
        pytest.param(3, {}, marks=pytest.mark.slow),
        pytest.param(1, {"cache_implementation": "static"}, marks=pytest.mark.slow),
    ],
)
def test_a_prompt_and_what_rounds_kept_are_what_the_caller_got(
    tmp_path: Path, batch: int, asked: dict[str, str]
) -> None:
    (fed, *rounds), prompt, given = records(tmp_path, batch, **asked)
    assert fed["fed"] == prompt
    for b, tokens in enumerate(given):
        judged = [each["rows"][b] for each in rounds]
        assert [each["column"] for each in judged][:1] == [9]
        kept = [token for each in judged for token in each["window"][: each["kept"]]]
        assert kept[: len(tokens)] == tokens[: len(kept)]
        assert len(kept) >= len(tokens) - 1
        for each in judged:
            stood = each["kept"]
            assert each["predicted"][: stood - 1] == each["window"][1:stood]
            ended = stood == len(each["window"]) or (asked and each["column"] + stood == ROOM)
            assert ended or each["predicted"][stood - 1] != each["window"][stood]


def test_nobody_else_has_tokens_written_down(tmp_path: Path) -> None:
    model = make_tiny("llama")
    model.compile(backend="vericache", options={**OPTIONS, "dump": str(tmp_path)})
    model.generate(**make_prompt(9), max_new_tokens=3, do_sample=False)
    assert list(tmp_path.iterdir())
    assert not (tmp_path / "tokens.jsonl").exists()


def test_tokens_go_where_a_dump_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_COMPILE_DEBUG", raising=False)
    monkeypatch.delenv("VERICACHE_DUMP", raising=False)
    model = make_tiny("llama")
    model.compile(backend="vericache", options={**OPTIONS, "dump_tokens": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="fix: name a folder with dump"):
        model.generate(**make_prompt(9), max_new_tokens=3, do_sample=False)
