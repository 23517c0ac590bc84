"""A dump: the files of each captured graph, what they hold, and that a bad folder stops nothing."""

from __future__ import annotations

import ast
import errno
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from graphs import PASSES, Toy, tiny_decode, toy_decode
from models import make_prompt, make_tiny

from vericache_compile.dump.folder import Dump, _make_folder, unified_diff
from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.pipeline import plan_capture
from vericache_compile.plan import Staging

NAMES = ["captured", *(getattr(each, "func", each).__name__ for each in PASSES)]
OPTIONS = {"inductor": False, "window": 4}


def dump_of(root: Path, name: str = "llama", batch: int = 1, staging: Staging | None = None) -> Path:
    """The folder that one decode step is written down in."""
    dump = Dump(str(root), set())
    plan_capture(tiny_decode(name, batch).module, batch, 4, False, {}, staging=staging, observers=[dump])
    assert dump.folder is not None
    assert not dump.failed
    return dump.folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump_of(tmp_path_factory.mktemp("dump"))


def stages(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9][0-9]_*.py"))


def test_there_is_a_file_for_the_captured_graph_and_for_each_pass(folder: Path) -> None:
    assert [path.name for path in stages(folder)] == [f"{i:02d}_{name}.py" for i, name in enumerate(NAMES)]
    assert len(list(folder.glob("*.diff"))) == len(NAMES) - 1


def test_transfers_are_in_every_file(tmp_path: Path) -> None:
    """Two slots for three sites: what is asked for when, in the graphs, the plan, and a file that runs."""
    import networkx

    folder = dump_of(tmp_path, staging=Staging(2 * 64 * 256, 64))
    assert {"10_spell_products.py", "11_insert_transfers.py", "12_hoist_prefetch.py"} <= {
        p.name for p in stages(folder)
    }
    assert "vericache.prefetch" in (folder / "12_hoist_prefetch.diff").read_text()
    program = json.loads((folder / "program.json").read_text())
    placed = [(row["layer"], row["asked_for_in"], row["after_attention"]) for row in program["transfers"]]
    assert placed == [(0, "draft", None), (1, "draft", None), (2, "verify", 0)]
    kinds = [data["kind"] for _, data in networkx.read_graphml(folder / "program.verify.graphml").nodes(data=True)]
    assert [kinds.count(kind) for kind in ("site", "prefetch", "wait")] == [3, 3, 6]
    assert "#c6e5b3" in (folder / "program.draft.dot").read_text()
    done = subprocess.run(
        [sys.executable, str(folder / "repro_verify.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_each_file_is_python_that_shows_the_graphs_of_its_time(folder: Path) -> None:
    shown = {}
    for path in stages(folder):
        tree = ast.parse(path.read_text())
        shown[path.stem[3:]] = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert shown["captured"] == ["captured"]
    assert shown["split_captured"] == ["captured", "as_captured"]
    assert shown["split_modes"] == shown["spell_products"] == ["draft", "verify"]
    assert shown["partition"][:2] == ["draft", "verify"]
    assert len(shown["partition"]) == 2 + 6
    assert all(name.startswith("segment_") for name in shown["partition"][2:])


def test_files_carry_shapes_types_source_lines_and_what_was_found(folder: Path) -> None:
    text = stages(folder)[-1].read_text()
    assert 'f32[4, 1, 1, 64]"' in text
    assert "modeling_llama.py:" in text
    assert "code: logits = self.lm_head(hidden_states" in text
    assert "# site 2: 4 heads, 2 KV heads, size 16, float32" in text
    assert "the same program as 2" in text


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs `patch`: apt-get install patch")
def test_diffs_turn_each_file_into_the_next(folder: Path, tmp_path: Path) -> None:
    files = stages(folder)
    for before, after in itertools.pairwise(files):
        out = tmp_path / after.name
        diff = after.with_suffix(".diff")
        subprocess.run(["patch", "-s", "-o", out, before, diff], check=True, timeout=60)
        assert out.read_text() == after.read_text()


def test_only_a_newline_ends_a_line_of_a_diff() -> None:
    assert unified_diff("a", "x\x0cy\n", "b", "x\x0cz\n").split("\n")[3:] == ["-x\x0cy", "+x\x0cz", ""]


def test_a_diff_names_both_files() -> None:
    assert unified_diff("a.py", "x\n", "b.py", "y\n").splitlines() == [
        "--- a.py",
        "+++ b.py",
        "@@ -1 +1 @@",
        "-x",
        "+y",
    ]


def test_the_program_is_described_in_json(folder: Path) -> None:
    known = json.loads((folder / "program.json").read_text())
    assert [site["layer"] for site in known["sites"]] == [0, 1, 2]
    assert known["sites"][0]["bytes_per_token"] == 2 * (16 + 16) * 4
    assert known["sites"][0]["bytes_written_per_verify_pass"] == 4 * known["sites"][0]["bytes_per_token"]
    assert known["roles"]["tokens"] == "l_kwargs_input_ids_"
    segments = known["variants"]["verify"]["segments"]
    assert [segment["shared_with"] for segment in segments] == [[], [2], [1], []]
    targets = [node["target"] for node in known["variants"]["draft"]["nodes"]]
    assert targets.count("vericache.attend.default") == 3


def test_no_two_captures_share_a_folder(tmp_path: Path) -> None:
    first, second = dump_of(tmp_path, "gpt2", 3), dump_of(tmp_path, "gpt2", 3)
    assert first != second
    assert first.parent == second.parent == tmp_path


def test_whoever_asks_first_gets_a_name(tmp_path: Path) -> None:
    """Making the folder claims its name, so it does not matter who asks: a thread here, a process elsewhere."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: _make_folder(tmp_path / "root"), range(64)))
    assert len(set(made)) == 64
    assert all(f"pid{os.getpid()}" in folder.name for folder in made)


def test_a_graph_that_is_not_taken_says_why(tmp_path: Path) -> None:
    class Doubled(Toy):
        def positions(self, ids: torch.Tensor, past: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
            return super().positions(ids, past) + past.shape[2]

    model, ids = Doubled(), torch.ones(1, 1, dtype=torch.int64)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    cache = [torch.randn(1, 2, 6, 8) for _ in range(2)]
    for held in cache:
        torch._dynamo.maybe_mark_dynamic(held, 2)
    model.compile(backend="vericache", options={**OPTIONS, "dump": str(tmp_path)})
    model(ids, *cache)
    [folder] = tmp_path.iterdir()
    reason = (folder / "not_taken.txt").read_text()
    assert "where: " in reason
    assert "fix: " in reason
    assert stages(folder)[-1].name.endswith("prove_mask.py")


def test_a_refusal_before_any_pass_still_shows_the_graph(tmp_path: Path) -> None:
    dump = Dump(str(tmp_path), set())
    dump.refused(toy_decode(Toy()).module, UnsupportedGraph("found", "where", "fix"))
    assert sorted(path.name for path in next(tmp_path.iterdir()).iterdir()) == ["00_captured.py", "not_taken.txt"]


def test_a_run_writes_a_folder_per_graph_and_gives_the_same_tokens(tmp_path: Path) -> None:
    prompt = make_prompt(9)
    settings = {"max_new_tokens": 6, "do_sample": False}
    plain = make_tiny("qwen3", layers=3).generate(**prompt, **settings)
    model = make_tiny("qwen3", layers=3)
    model.compile(backend="vericache", options={**OPTIONS, "dump": str(tmp_path)})
    assert torch.equal(model.generate(**prompt, **settings), plain)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2
    assert all((folder / "program.json").exists() for folder in folders)
    assert (folders[0] / "program.captured.graphml").exists()
    assert (folders[1] / "program.verify.graphml").exists()


def test_dumps_hold_no_tokens_and_no_weights(tmp_path: Path) -> None:
    model = make_tiny("llama", layers=3)
    model.compile(backend="vericache", options={**OPTIONS, "dump": str(tmp_path)})
    with torch.no_grad():
        model.lm_head.weight[:] = 0.123456789
        model(torch.full((1, 5), 61))
    text = "".join(path.read_text() for path in tmp_path.rglob("*.*"))
    assert "0.12345" not in text
    assert "61, 61" not in text


@pytest.mark.parametrize("fault", ["a file in the way", "a full disk"])
def test_a_folder_that_cannot_be_written_to_is_said_once_and_stops_nothing(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    if fault == "a full disk":

        def full(*_: object, **__: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
    else:
        root.touch()
    prompt, settings = make_prompt(9), {"max_new_tokens": 6, "do_sample": False}
    plain = make_tiny("llama", layers=3).generate(**prompt, **settings)
    model = make_tiny("llama", layers=3)
    model.compile(backend="vericache", options={**OPTIONS, "dump": str(root)})
    with caplog.at_level(logging.WARNING, logger="vericache_compile"):
        assert torch.equal(model.generate(**prompt, **settings), plain)
    [record] = [each for each in caplog.records if "not written down" in each.getMessage()]
    assert str(root) in record.getMessage()
    assert "fix: name a folder" in record.getMessage()
