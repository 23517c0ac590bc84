"""A torch.compile backend that makes lossy KV-cache compression lossless.

Nothing here needs importing to use it: `model.compile(backend="vericache")` finds the entry point. The names
below load what they need when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vericache_compile.api import CheckReport, check, stats
    from vericache_compile.demo_model import demo_model_path
    from vericache_compile.explanation import Explanation, explain
    from vericache_compile.learning import calibrate

__version__ = "0.1.0"
__all__ = ["CheckReport", "Explanation", "__version__", "calibrate", "check", "demo_model_path", "explain", "stats"]

_HOMES = {
    "CheckReport": "api",
    "Explanation": "explanation",
    "calibrate": "learning",
    "check": "api",
    "demo_model_path": "demo_model",
    "explain": "explanation",
    "stats": "api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"vericache_compile.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
