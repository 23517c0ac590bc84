"""Who looks on while graphs are compiled: dumps for people, artifacts for torch's own trace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vericache_compile.config import Config

if TYPE_CHECKING:
    from vericache_compile.passes.pipeline import Observer


def make_observers(config: Config, failed: set[str]) -> tuple[Observer, ...]:
    """The observers of one captured graph; `failed` holds dump folders that could not be written to."""
    from vericache_compile.dump.trace import Trace

    root = dump_root(config)
    if root is None:
        return (Trace(),)
    from vericache_compile.dump.folder import Dump

    return Trace(), Dump(root, failed)


def dump_root(config: Config) -> str | None:
    """Where dumps go: the option, else torch's debug folder under TORCH_COMPILE_DEBUG=1, else nowhere."""
    if config.dump is not None:
        return config.dump
    if os.environ.get("TORCH_COMPILE_DEBUG", "0") != "1":
        return None
    from torch._dynamo.utils import get_debug_dir

    return str(Path(get_debug_dir()) / "vericache")


def tokens_path(config: Config) -> str | None:
    """The file that tokens are written to where they are asked for; in the dump's folder, else nowhere."""
    root = dump_root(config) if config.dump_tokens else None
    return None if root is None else str(Path(root) / "tokens.jsonl")
