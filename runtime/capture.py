"""Owns torch.cuda.CUDAGraph: launches that are recorded once and replayed without their Python."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)

Launch = Callable[[], None]
"""Launches work that reads and writes tensors at fixed places, waits for nothing, and changes nothing in Python."""


class Captured:
    """A launch: on a GPU eager the first time, recorded the second, replayed from then on; elsewhere always eager.

    The first run compiles, tunes and allocates what a recording must not. Each call does the launch's work once. Where
    recording fails the launch stays eager, which is said once. The launch is given with each call, always the same one,
    and not kept: what owns both is then freed with its buffers as soon as nobody holds it.
    """

    def __init__(self, device: torch.device) -> None:
        self._eager = device.type != "cuda"
        self._warm = False
        self._graph: Any = None

    @property
    def replays(self) -> bool:
        """Whether calls replay a recording."""
        return self._graph is not None

    def __call__(self, launch: Launch) -> None:
        if self._warm and not self._eager and self._graph is None:
            self._record(launch)
        if self._graph is not None:
            self._graph.replay()
        else:
            launch()
            self._warm = True

    def _record(self, launch: Launch) -> None:
        try:
            self._graph = record(launch)
        except RuntimeError as error:  # out of memory too, and whatever a recording does not allow
            self._eager = True
            _tell(f"{type(error).__name__}: {error}".splitlines()[0])


def record(launch: Launch) -> Any:
    """A CUDA graph of what `launch` launches; nothing of it has run.

    Other threads may go on with what a recording does not allow. The outer context takes the stream back where the
    recording fails, which leaves its own stream current.
    """
    graph = torch.cuda.CUDAGraph()
    recording = torch.cuda.graph(graph, capture_error_mode="thread_local")
    with torch.cuda.stream(torch.cuda.current_stream()), recording:
        launch()
    return graph


@cache
def _tell(reason: str) -> None:
    log.warning(
        "vericache: a draft step could not be recorded as a CUDA graph, it is launched piece by piece: %s\n"
        "  where: %s\n  fix: %s",
        reason,
        __name__,
        "free memory on the GPU, or choose a compressor that its kernels read (docs/gpu.md); tokens are the same",
    )
