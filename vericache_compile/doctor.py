"""`vericache doctor`: what is here, what is missing, and how to get it. Changes nothing."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vericache_compile.demo_model import FOLDER, cache_root, demo_model_ready


@dataclass(frozen=True)
class Finding:
    """One thing looked for."""

    name: str
    found: str
    ok: bool = True
    needed: bool = True
    fix: str = ""

    @property
    def mark(self) -> str:
        return "ok" if self.ok else "MISSING" if self.needed else "-"


def doctor(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Exit code 1 when something needed is missing."""
    findings = find_all()
    healthy = all(finding.ok for finding in findings if finding.needed)
    if not args.json:
        _print(findings)
    return {"ok": healthy, "findings": [asdict(finding) for finding in findings]}, 0 if healthy else 1


def find_all() -> list[Finding]:
    """Everything, in the order of dependence."""
    findings = [_find_python()]
    findings += [_find_package("torch", 2, 11), _find_package("transformers", 5, 17)]
    findings += [_find_package("safetensors", 0)]
    findings += [_find_triton(), _find_compiler(), _find_headers()]
    if findings[1].ok:
        findings += [*_find_devices(), _find_backend()]
    return [*findings, _find_cache(), _find_demo_model()]


def _find_python() -> Finding:
    ok = sys.version_info >= (3, 11)
    found = f"{platform.python_version()} at {sys.executable}"
    return Finding("python", found, ok, fix="install Python 3.11 or newer")


def _find_package(name: str, *least: int) -> Finding:
    wanted = ".".join(map(str, least))
    fix = f'pip install "{name}>={wanted}"'
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "not installed", False, fix=fix)
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[: len(least)] if part.isdigit())
    return Finding(name, found, numbers >= least, fix=fix)


def _find_triton() -> Finding:
    fix = "comes with the CUDA builds of torch; CPUs need none"
    try:
        return Finding("triton", version("triton"), needed=False)
    except PackageNotFoundError:
        return Finding("triton", "not installed", False, needed=False, fix=fix)


def _find_compiler() -> Finding:
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    found = shutil.which(name.split()[0])
    fix = "install g++ (apt install g++, dnf install gcc-c++, xcode-select --install), or set CXX"
    return Finding("C++ compiler", found or f"{name} not found", found is not None, fix=fix)


def _find_headers() -> Finding:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    fix = "apt install python3-dev, dnf install python3-devel"
    return Finding("Python.h", str(header), header.is_file(), fix=fix)


def _find_devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        fix = "the CPU is used; for a GPU install NVIDIA's driver and a CUDA build of torch"
        yield Finding("CUDA", f"no device; torch {torch.__version__}", False, needed=False, fix=fix)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        yield Finding(f"cuda:{index}", found)


def _find_backend() -> Finding:
    import torch

    ok = "vericache" in torch.compiler.list_backends()
    found = 'torch.compile(backend="vericache")' if ok else "torch does not list the backend"
    fix = "pip install vericache-compile (or, in a checkout, pip install -e .)"
    return Finding("entry point", found, ok, fix=fix)


def _find_cache() -> Finding:
    root = cache_root()
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    fix = "make it writable, or set VERICACHE_HOME to a folder that is"
    try:
        with tempfile.TemporaryFile(dir=existing):
            free = shutil.disk_usage(existing).free / 2**30
    except OSError as error:
        return Finding("cache folder", f"{root}: {error.strerror}", False, fix=fix)
    return Finding("cache folder", f"{root}, {free:.0f} GiB free", fix=fix)


def _find_demo_model() -> Finding:
    fix = 'fetched on first use; now: python -c "import vericache_compile as v; v.demo_model_path()"'
    found = str(cache_root() / FOLDER) if demo_model_ready() else "not fetched yet"
    return Finding("demo model", found, demo_model_ready(), needed=False, fix=fix)


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="vericache doctor", title_justify="left")
    for header in ("", "", "found", "how to get it"):
        table.add_column(header, overflow="fold")
    for finding in findings:
        cells = (finding.mark, finding.name, finding.found, "" if finding.ok else finding.fix)
        table.add_row(*map(Text, cells))
    Console().print(table)
