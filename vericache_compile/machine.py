"""This machine's bandwidths, measured once and kept in a file; nothing is measured before somebody asks."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vericache_compile.demo_model import cache_root
from vericache_compile.runtime.pages import host_memory

log = logging.getLogger(__name__)
FILE = "machine.json"
BYTES = 256 << 20
"""Copied in each measurement: more than a cache holds."""
REPEATS = 3


@dataclass(frozen=True)
class Bandwidths:
    """In gigabytes per second: reading and writing device memory together, and the link from host memory."""

    memory_gbps: float
    link_gbps: float


UNKNOWN = Bandwidths(1000.0, 20.0)
"""Of an accelerator without room to measure."""


def bandwidths(device: torch.device) -> Bandwidths:
    """The bandwidths of a device of this machine: from the file, else measured (less than a second) and put there."""
    path = cache_root() / FILE
    name = _name(device)
    known = _read(path)
    try:
        return Bandwidths(**known[name])
    except (KeyError, TypeError):
        pass
    try:
        measured = measure(device)
    except torch.OutOfMemoryError:
        return UNKNOWN  # not kept: there may be room next time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{FILE}.{os.getpid()}")
        beside.write_text(json.dumps({**known, name: asdict(measured)}, indent=1))
        beside.replace(path)
    except OSError as error:
        log.debug("the machine's bandwidths are not kept: %s", error)
    return measured


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def measure(device: torch.device) -> Bandwidths:
    """Copy BYTES within the device, and to it from (pinned) host memory; the best of REPEATS each."""
    on_device = torch.zeros(BYTES, dtype=torch.uint8, device=device)
    other = torch.zeros_like(on_device)
    host = host_memory((BYTES,), torch.uint8, device.type == "cuda")
    memory = 2 * BYTES / _best(lambda: other.copy_(on_device), device)
    if device.type == "cpu":
        link = BYTES / _best(lambda: other.numpy().__setitem__(..., host.numpy()), device)  # as the link copies
    else:
        link = BYTES / _best(lambda: on_device.copy_(host, non_blocking=True), device)
    return Bandwidths(round(memory / 1e9, 2), round(link / 1e9, 2))


def _best(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):  # the first one warms up
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
