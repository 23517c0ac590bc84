"""Launches that are recorded once and replayed without their Python: as CUDA graphs, or on the CPU as calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Generic, TypeVar

import torch

from vericache_compile.runtime.host_capture import record_calls

log = logging.getLogger(__name__)

Made = TypeVar("Made")
Launch = Callable[[], Made]
"""Launches work that reads and writes tensors at fixed places, waits for nothing, and changes nothing in Python;
returns what it has allocated, if anything."""


class Pool:
    """Memory that recordings share which are replayed in the order of their recording, if at all."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.failed = False
        """Whether a recording in it has failed: then there are no more of them."""


class Captured(Generic[Made]):
    """A launch: eager the first time, recorded the second, replayed from then on.

    The first run compiles, tunes and allocates what a recording must not. Each call does the launch's work once, and
    returns what the launch returns: a replay, what it returned when it was recorded, filled anew. Where recording fails
    the launch stays eager, which is said once. The launch is given with each call, always the same one, and not kept:
    what owns both is then freed with its buffers as soon as nobody holds it.
    """

    def __init__(self, device: torch.device, what: str, pool: Pool | None = None, *, calls: bool = False) -> None:
        """`what` is launched, for the message; recordings share a `pool` or have memory of their own. On the CPU it is
        recorded where it does nothing but `calls` that can be; elsewhere than there and on a GPU it stays eager."""
        self._eager = device.type != "cuda" and not calls
        self._calls = calls
        self._refusals = Exception if calls else RuntimeError  # what Inductor writes may change in any way
        self._warm = False
        self._what, self._pool = what, pool or Pool()
        self._recorded: tuple[Any, Made] | None = None

    @property
    def replays(self) -> bool:
        """Whether calls replay a recording."""
        return self._recorded is not None

    def __call__(self, launch: Launch[Made]) -> Made:
        if self._warm and not self._eager and self._recorded is None:
            self._record(launch)
        if self._recorded is None:
            self._warm = True
            return launch()
        graph, made = self._recorded
        graph.replay()
        return made

    def _record(self, launch: Launch[Made]) -> None:
        self._eager = self._pool.failed
        if not self._eager:
            try:
                self._recorded = record_calls(launch) if self._calls else record(launch, self._pool)
            except self._refusals as error:  # out of memory too, and whatever a recording does not allow
                self._eager = self._pool.failed = True
                # what follows the first sentence says how much memory is free just now
                first = (str(error).split(". ")[0].splitlines() or [""])[0]
                (_note if self._calls else _tell)(self._what, f"{type(error).__name__}: {first}")


def record(launch: Launch[Made], pool: Pool) -> tuple[Any, Made]:
    """A CUDA graph of what `launch` launches, and what it returned; nothing of it has run.

    Other threads may go on with what a recording does not allow. The outer context takes the stream back where the
    recording fails, which leaves its own stream current.
    """
    graph = torch.cuda.CUDAGraph()
    if pool.handle is None:
        pool.handle = torch.cuda.graph_pool_handle()
    recording = torch.cuda.graph(graph, pool.handle, capture_error_mode="thread_local")
    with torch.cuda.stream(torch.cuda.current_stream()), recording:
        made = launch()
    return graph, made


@cache
def _tell(what: str, reason: str) -> None:
    log.warning(
        "vericache: %s could not be recorded as a CUDA graph, it is launched by the host: %s\n  where: %s\n  fix: %s",
        what,
        reason,
        __name__,
        "free memory on the GPU, or choose a compressor that its kernels read (docs/gpu.md); tokens are the same",
    )


@cache
def _note(what: str, reason: str) -> None:
    log.info("vericache: %s goes through Python on this CPU, a little slower: %s", what, reason)
