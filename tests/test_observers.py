"""torch's own channels: TORCH_LOGS, TORCH_TRACE and TORCH_COMPILE_DEBUG, each in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs import Toy, toy_decode
from torch.fx import GraphModule

from vericache_compile import backend
from vericache_compile.config import Config
from vericache_compile.errors import UnsupportedGraph
from vericache_compile.observers import dump_root, make_observers
from vericache_compile.passes.program import Program, is_weight, placeholders

PROGRAM = """
import torch
from models import make_prompt, make_tiny

model = make_tiny("llama")
model.compile(backend="vericache", options={"inductor": False, "window": 4})
model.generate(**make_prompt(7), max_new_tokens=4, do_sample=False)


class Alone(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x) + 1


alone = Alone()
alone.compile(backend="vericache", options={"inductor": False})
with torch.no_grad():
    alone(torch.ones(2, 3))
"""
ASIDE = ("TORCH_LOGS", "TORCH_TRACE", "TORCH_COMPILE_DEBUG", "VERICACHE_DUMP")


def run(**environment: str) -> str:
    """What a small program says on stderr."""
    kept = {name: value for name, value in os.environ.items() if name not in ASIDE}
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=kept | {"PYTHONPATH": paths} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_by_default_there_is_one_line_for_a_model_and_one_warning_for_a_graph_not_taken() -> None:
    """Beside lines that are torch's own: a CUDA build without a GPU has something to say."""
    said = [line for line in run().splitlines() if not re.match(r" |W\d{4} .* torch/", line)]
    assert [line.split(":")[:2] for line in said] == [
        ["vericache", said[0].split(":")[1]],
        ["vericache", " graph not taken, it runs under plain Inductor"],
    ]


@pytest.mark.slow
def test_torchs_channels_carry_our_lines_artifacts_and_dumps(tmp_path: Path) -> None:
    traces, debug = tmp_path / "traces", tmp_path / "debug"
    said = run(
        TORCH_LOGS="+vericache_compile",
        TORCH_TRACE=str(traces),
        TORCH_COMPILE_DEBUG="1",
        TORCH_COMPILE_DEBUG_DIR=str(debug),
    )
    assert re.search(r"\[0/1\] partition: 6$", said, re.MULTILINE)
    assert re.search(r"\[1/0\] vericache: graph not taken", said)
    text = "".join(path.read_text() for path in traces.iterdir())
    rows = [json.loads(line[line.index("{") :]) for line in text.splitlines() if '"name": "vericache_' in line]
    names = [row["artifact"]["name"] for row in rows]
    assert {"vericache_plan", "vericache_draft", "vericache_verify", "vericache_not_taken"} <= set(names)
    assert "torch.ops.vericache.attend.default" in text
    assert all("frame_id" in row for row in rows)
    folders = list(debug.rglob("vericache/graph_*"))
    assert {folder.name.split("_pid")[0] for folder in folders} >= {"graph_0_0", "graph_0_1", "graph_1_0"}


def test_dumps_go_where_the_option_says_else_to_torchs_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_COMPILE_DEBUG", raising=False)
    assert dump_root(Config()) is None
    assert len(make_observers(Config(), set())) == 1
    assert dump_root(Config(dump="here")) == "here"
    monkeypatch.setenv("TORCH_COMPILE_DEBUG", "1")
    assert dump_root(Config(dump="here")) == "here"
    assert str(dump_root(Config())).endswith("vericache")


def test_a_refusal_for_a_later_batch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Told:
        def after(self, name: str, count: int, program: Program) -> None: ...

        def done(self, program: Program) -> None: ...

        def refused(self, module: GraphModule, reason: UnsupportedGraph) -> None:
            told.append(reason.found)

    def refuse(*_: object) -> None:
        raise UnsupportedGraph("this batch", "here", "another")

    monkeypatch.setattr(backend, "make_observers", lambda *_: (Told(),))
    call = toy_decode(Toy())
    nodes = placeholders(call.module)
    inputs = [torch.nn.Parameter(x) if is_weight(node) else x for node, x in zip(nodes, call.inputs, strict=True)]
    with torch.no_grad():
        run = backend.vericache(call.module, inputs, options={"inductor": False, "strict": True})
        monkeypatch.setattr(backend, "plan_capture", refuse)
        more = [x.expand(3, *x.shape[1:]) if getattr(x, "dtype", None) is torch.int64 else x for x in inputs]
        for _ in range(2):
            with pytest.raises(UnsupportedGraph, match="this batch"):
                run(*more)
        assert told == ["this batch"]
        with pytest.raises(UnsupportedGraph):
            backend.vericache(call.module, inputs, options={"inductor": False, "strict": True})
    assert told == ["this batch"] * 2
