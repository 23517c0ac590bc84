"""Methods of other packages and programs are found by name like ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
from torch import Tensor

from vericache_compile.cli import main
from vericache_compile.compressors import table
from vericache_compile.compressors.scorer import WindowScorer
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.compressors.spec import parse
from vericache_compile.errors import OptionError
from vericache_compile.learning import learner


@dataclass(frozen=True)
class Newest(WindowScorer):
    """A method of a few lines."""

    name: ClassVar[str] = "newest"

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Later tokens above earlier ones."""
        return keys.new_ones(keys.shape[0], covered).cumsum(dim=1)


@dataclass(frozen=True)
class Listed(Newest):
    """Parameters whose defaults are made, or missing."""

    name: ClassVar[str] = "listed"

    levels: list[int] = field(default_factory=lambda: [2, 4])
    path: str = field(kw_only=True)


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(table, "_registered", {})
    return


def offer(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """As if a package with this entry point were installed."""
    points = [EntryPoint(name=name, value=value, group=table.GROUP)]
    monkeypatch.setattr(table, "entry_points", lambda group: points)


def test_a_registered_method_is_found() -> None:
    assert table.register(Newest) is Newest
    assert table.find_method("newest") is Newest
    assert parse("newest(keep=0.5, window=3)", {}) == Newest(keep=0.5, window=3)
    assert "newest" in table.method_names()
    table.register(Newest)


def test_defaults_that_are_made_are_listed() -> None:
    own = {"levels": [2, 4], "path": None}
    assert table.all_parameters(Listed) == {"keep": 0.2, "refresh": 0, "window": 32, **own}


def test_a_name_belongs_to_one_method() -> None:
    class Mine(SnapKV):
        """Takes a name of ours."""

    with pytest.raises(OptionError, match="'snapkv' is taken by SnapKV"):
        table.register(Mine)


@pytest.mark.parametrize("name", ["pyramid", "ada", "rest", "my-method", "4bit", "two words", ""])
def test_a_name_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mine = type("Mine", (Newest,), {"name": name})
    with pytest.raises(OptionError, match=f"the name {name!r} .*`compressor`[\\s\\S]*Mine[\\s\\S]*fix: choose"):
        table.register(mine)
    assert not table._registered
    offer(monkeypatch, name, "no_such_module:Method")
    with pytest.raises(OptionError, match=f"the name {name!r} .*`compressor`[\\s\\S]*entry point"):
        table.find_method(name)


def test_an_entry_point_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "snapkv2", "vericache_compile.compressors.snapkv:SnapKV")
    assert "snapkv2" in table.method_names()
    with pytest.raises(OptionError, match="whose name is 'snapkv2'"):
        table.find_method("snapkv2")

    monkeypatch.setattr(SnapKV, "name", "snapkv2")
    assert table.find_method("snapkv2") is SnapKV


@pytest.mark.parametrize("value", ["no_such_module:Method", "vericache_compile.errors:Method"])
def test_a_broken_entry_point_is_an_option_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    offer(monkeypatch, "broken", value)
    assert table.find_method("knorm").name == "knorm"
    with pytest.raises(OptionError, match="entry point 'broken'"):
        table.find_method("broken")


def test_a_package_that_fails_when_it_is_imported_is_an_option_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vericache_test_failing.py").write_text("raise RuntimeError('no such device')")
    monkeypatch.syspath_prepend(tmp_path)
    offer(monkeypatch, "failing", "vericache_test_failing:Method")
    with pytest.raises(OptionError, match="it cannot be loaded: no such device"):
        table.find_method("failing")


def test_a_broken_entry_point_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are listed, and what is said of another method is said of it."""
    offer(monkeypatch, "broken", "no_such_module:Method[/bold]")
    assert main(["compressors", "--json"]) == 0
    out, shown = capsys.readouterr()
    *listed, broken = json.loads(out)
    assert [method["name"] for method in listed] == list(table.COMPRESSORS)
    assert not any("error" in method for method in listed)
    assert broken["name"] == "broken"
    assert "entry point 'broken'" in broken["error"]["where"]
    assert "error, see below" in shown
    assert "\nbroken: it cannot be loaded: No module named 'no_such_module'\n  where: entry point 'broken'" in shown
    with pytest.raises(OptionError, match="'snapkv' learns nothing") as caught:
        learner("snapkv")
    assert caught.value.fix == "choose from: kvquant, recalkv, cskv, kvsharer"


def test_ours_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "snapkv", "no_such_module:Method")
    assert table.find_method("snapkv") is SnapKV
    assert table.method_names().count("snapkv") == 1
