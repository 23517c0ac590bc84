"""Moments in a device's work, and the seconds between them.

On a GPU the host runs ahead, and its clock says when work was launched. There a moment is an event in the current
stream, which can be read once the host has waited for what came after it.
"""

from __future__ import annotations

import time

import torch

Moment = float | torch.cuda.Event
"""Seconds on `time.perf_counter`'s clock, or an event in a stream."""


def moment(device: torch.device) -> Moment:
    """When what was launched so far in the device's current stream is done; where there are no streams, now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: Moment, last: Moment) -> float:
    """Seconds from one moment of a device to another, both of them past."""
    if isinstance(first, float) and isinstance(last, float):
        return last - first
    assert not isinstance(first, float) and not isinstance(last, float), "moments of one device are of one kind"
    milliseconds: float = first.elapsed_time(last)
    return 1e-3 * milliseconds
