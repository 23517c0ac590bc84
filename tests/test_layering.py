"""Who may import whom: compile time and run time meet in one file, and an import does no work."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vericache_compile

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("vericache_compile", "passes", "runtime") for path in (ROOT / folder).rglob("*.py"))
BOTH_HALVES = {"vericache_compile/backend.py"}
AT_MODULE_LEVEL = {"torch", "vericache_compile"} | sys.stdlib_module_names
TRITON_PROGRAMS = [path for path in FILES if path.stem.endswith("_triton")]
"""Decorators need triton when such a file is imported; launches import it."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def modules_of(node: ast.AST) -> list[str]:
    """The modules an import statement may load; `from a import b` may load a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imported(path: Path) -> set[str]:
    """Modules imported anywhere in the file."""
    return {module for node in ast.walk(ast.parse(path.read_text())) for module in modules_of(node)}


def run_at_import(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: into if, try and with, not into functions."""
    for node in nodes:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from run_at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in ("body", "orelse", "finalbody"):
                yield from run_at_import(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from run_at_import(handler.body)


def imports_half(path: Path, half: str) -> bool:
    wanted = f"vericache_compile.{half}"
    return any(module == wanted or module.startswith(f"{wanted}.") for module in imported(path))


def test_files_are_found() -> None:
    assert len(FILES) > 10


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_backend_imports_both_halves(path: Path) -> None:
    if name_of(path) not in BOTH_HALVES:
        assert not (imports_half(path, "passes") and imports_half(path, "runtime"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_halves_do_not_know_each_other(path: Path) -> None:
    name = name_of(path)
    if name.startswith(("passes/", "vericache_compile/compressors/", "vericache_compile/dump/")):
        assert not imports_half(path, "runtime")
    if name.startswith(("runtime/", "vericache_compile/compressors/")):
        assert not imports_half(path, "passes")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_torch_is_imported_at_module_level(path: Path) -> None:
    statements = list(run_at_import(ast.parse(path.read_text()).body))
    found = {module.split(".")[0] for node in statements for module in modules_of(node)}
    assert found <= AT_MODULE_LEVEL | ({"triton"} if path in TRITON_PROGRAMS else set()), "import it where it is used"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_triton_is_imported_by_launches_alone(path: Path) -> None:
    statements = run_at_import(ast.parse(path.read_text()).body)
    programs = {f"vericache_compile.kernels.{program.stem}" for program in TRITON_PROGRAMS}
    assert path in TRITON_PROGRAMS or not programs & {module for node in statements for module in modules_of(node)}
    assert programs, "the rule is about no file"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_are_absolute(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text()))
    assert not [node.lineno for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


def test_these_checks_can_say_no(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import only_for_types\n"
        "try:\n    import numpy.linalg\nexcept ImportError:\n    from rich import print\n"
        "class C:\n    import networkx\n"
        "def f():\n    import transformers\n    from vericache_compile import runtime\n"
        "    import vericache_compile.passes.pipeline\n"
    )
    found = {module for node in run_at_import(ast.parse(path.read_text()).body) for module in modules_of(node)}
    assert {"numpy.linalg", "rich", "networkx"} <= found
    assert not {"only_for_types", "transformers"} & found
    assert imports_half(path, "runtime")
    assert imports_half(path, "passes")
    assert not imports_half(Path(__file__), "runtime")


def test_importing_the_backend_imports_no_triton() -> None:
    code = (
        "import sys, vericache_compile.backend, vericache_compile.runtime.session, vericache_compile.ops;"
        "sys.exit('vericache_compile.kernels.verify_attention_triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, vericache_compile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("name", ["passes", "runtime"])
def test_a_bare_half_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=f"import vericache_compile.{name}, not {name}"):
        importlib.import_module(name)


def test_every_package_folder_is_installed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {name_of(path.parent) for path in FILES}
    dotted = {folder.replace("/", ".") for folder in folders}
    assert {name if name.startswith("vericache") else f"vericache_compile.{name}" for name in dotted} == listed


def test_public_names_load_when_asked_for() -> None:
    for name in vericache_compile.__all__:
        assert getattr(vericache_compile, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'chek'"):
        _ = vericache_compile.chek
