"""Make `torch.compile(model, backend="vericache").generate(...)` use the compiled model.

torch.compile(model) returns an OptimizedModule that hands out the original module's `generate`, which then calls the
original, uncompiled forward: no backend is ever reached. For modules compiled with this backend, and for no other,
`generate` here runs with the original module's calls compiled, as `model.compile(...)` would have it.

This wraps a method of a private torch class. Set VERICACHE_PATCH_GENERATE=0 before the backend is looked up to leave
torch alone; `model.compile(backend="vericache")` needs no patch.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule

MARK = "_vericache_wraps"
_lock = threading.Lock()


def install() -> bool:
    """Wrap `OptimizedModule.__getattr__` once; returns whether it is wrapped."""
    if os.environ.get("VERICACHE_PATCH_GENERATE", "1").lower() in ("0", "false", "off", "no"):
        return False
    with _lock:
        original = OptimizedModule.__getattr__
        if not hasattr(original, MARK):
            OptimizedModule.__getattr__ = _wrap(original)  # type: ignore[method-assign]
    return True


def _wrap(original: Callable[[OptimizedModule, str], Any]) -> Callable[[OptimizedModule, str], Any]:
    @functools.wraps(original)
    def __getattr__(self: OptimizedModule, name: str) -> Any:
        found = original(self, name)
        if name == "generate" and callable(found) and uses_vericache(self):
            return _compiled_generate(self, found)
        return found

    setattr(__getattr__, MARK, original)
    return __getattr__


def uses_vericache(module: OptimizedModule) -> bool:
    """Whether an OptimizedModule was compiled with this backend."""
    backend: Any = getattr(module.dynamo_ctx, "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return getattr(backend, "compiler_name", getattr(backend, "__name__", None)) == "vericache"


def _compiled_generate(module: OptimizedModule, generate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate)
    def compiled_generate(*args: Any, **kwargs: Any) -> Any:
        with calls_compiled(module):
            return generate(*args, **kwargs)

    return compiled_generate


@contextmanager
def calls_compiled(module: OptimizedModule) -> Iterator[None]:
    """While this is open, calls of the original module run compiled. Nests, and is shared between threads."""
    original = module._orig_mod
    with _lock:
        users = original.__dict__.get("_vericache_users", 0)
        if not users:
            original.__dict__["_vericache_before"] = original._compiled_call_impl
            original._compiled_call_impl = _compiled_call(module, original)
        original.__dict__["_vericache_users"] = users + 1
    try:
        yield
    finally:
        with _lock:
            original.__dict__["_vericache_users"] -= 1
            if not original.__dict__["_vericache_users"]:
                original._compiled_call_impl = original.__dict__.pop("_vericache_before")
                del original.__dict__["_vericache_users"]


def _compiled_call(module: OptimizedModule, original: torch.nn.Module) -> Callable[..., Any]:
    """The original's `_call_impl` under the OptimizedModule's compiler; made once, so that Dynamo's cache is kept."""
    held = module.__dict__.get("_vericache_call")
    if held is None:
        held = module.dynamo_ctx(original._call_impl)
        module.__dict__["_vericache_call"] = held
    return held  # type: ignore[no-any-return]
