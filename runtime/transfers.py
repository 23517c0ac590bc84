"""The link between a tier and the device: owns its thread, and on an accelerator its streams and events.

A transfer is a generator that copies one piece per step and yields its bytes. A worker thread drives it: putting
thousands of pieces on a stream takes as long as many drafts, which the caller launches meanwhile. On the CPU the thread
is held back to `gbps` where that is given, so that overlap with drafting can be measured on any machine; on an
accelerator copies from pinned memory go on a stream of the link's own, and what goes out on another: links carry both
ways at once, and what comes in must not wait for what verify has yet to compute.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from vericache_compile.errors import TransferError
from vericache_compile.runtime.clock import Moment, moment, seconds_between

PULSE = 0.5
"""Seconds after which a waiter looks whether the thread is still alive."""
AHEAD = 256 << 20
"""Bytes on their way out that the host goes on with: what they lie in is not free for what is computed next."""
NAP = 0.002
"""The shortest sleep, in seconds, that holds a link back before a transfer's end: each costs its thread the GIL."""


class Transfer:
    """One transfer under way."""

    def __init__(
        self,
        job: Iterator[int],
        thread: threading.Thread,
        stream: torch.cuda.Stream | None = None,
        after: torch.cuda.Event | None = None,
    ) -> None:
        """Its copies go on `stream`, where there is one, once the device has done what comes before `after`."""
        self.job = job
        self.nbytes = 0
        self.began = 0.0
        """When the link took it up, in seconds on `time.perf_counter`'s clock."""
        self.error: BaseException | None = None
        self._asked = time.perf_counter()
        self._thread, self._stream, self._after = thread, stream, after
        self._done = threading.Event()
        self._first: Moment = 0.0
        self._last: Moment = 0.0

    def run(self, gbps: float | None, free: float = 0.0) -> float:
        """Copy all pieces; an error is kept for whoever waits.

        A link held back to `gbps` takes up a transfer when that was asked for, or when it was `free` of those before,
        however late its thread got to run; returns when it is free again.
        """
        if self._stream is not None:
            gbps = None  # a link of a device is as fast as it is
        self.began = end = time.perf_counter() if gbps is None else max(self._asked, free)
        self._first = self._last = self.began
        try:
            with self._on_stream(), torch.inference_mode():
                for nbytes in self.job:
                    self.nbytes += nbytes
                    if gbps is not None:
                        end += nbytes / gbps / 1e9
                        _sleep_until(end, NAP)
                if gbps is not None:
                    _sleep_until(end, 0.0)
        except BaseException as error:  # noqa: BLE001 - it is raised where the data is waited for
            self.error = error
        if self._stream is None:
            self._last = time.perf_counter()
        self._done.set()
        return end

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """On the stream, with the moments before and after all that is put on it, however that ends."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if self._after is not None:
                self._stream.wait_event(self._after)
            self._first = moment(self._stream.device)
            try:
                yield
            finally:
                self._last = moment(self._stream.device)

    @property
    def seconds(self) -> float:
        """Of the link at work on it; on an accelerator only after the host has waited for what waited for it."""
        return seconds_between(self._first, self._last)

    @property
    def done(self) -> bool:
        """Whether all pieces were copied (on an accelerator: put on the link's stream)."""
        return self._done.is_set()

    def drain(self) -> bool:
        """Return once it has come to its end, well or not; False where its thread is dead, so that it never will."""
        while not self._done.wait(PULSE):
            if not self._thread.is_alive():
                return self.done
        return True

    def result(self) -> None:
        """Return once the data is there, for the device's current stream; raises what went wrong, with the link's
        traceback, once nothing more is on its way to where it should have gone."""
        if not self.drain():
            raise TransferError("the link's thread has died", "a transfer of full KV", "start the program again")
        if self._stream is not None and not isinstance(self._last, float):
            torch.cuda.current_stream(self._stream.device).wait_event(self._last)
        if self.error is not None:
            raise self.error


class Link:
    """Moves pages between a tier and the device, first come, first served."""

    def __init__(self, gbps: float | None = None) -> None:
        self.gbps = gbps
        self.stored = 0
        """Bytes of full KV that went to pages."""
        self._queue: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None
        self._outgoing: torch.cuda.Stream | None = None
        self._leaving: deque[tuple[torch.cuda.Event, int]] = deque()
        """What is on its way out: when it is gone, and its bytes."""
        self._leaving_bytes = 0

    def pinned(self, device: torch.device) -> bool:
        """Whether pages for this device should be pinned; from then on the link has streams of its own there."""
        if device.type == "cuda" and (self._stream is None or device.index not in (None, self._stream.device.index)):
            self.synchronize()
            self._stream, self._outgoing = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        return device.type == "cuda"

    @property
    def by_streams(self) -> bool:
        """Whether copies go on streams of its own."""
        return self._stream is not None

    def copy(self, target: Tensor, source: Tensor) -> Iterator[int]:
        """Copy source [K, T, D] to target of the same shape, in pieces; yields their bytes."""
        if self._stream is None:
            target.view(torch.uint8).numpy()[...] = source.view(torch.uint8).numpy()  # one thread, without the GIL
            yield source.nbytes
            return
        for to, own in zip(target, source, strict=True):  # a head's columns lie side by side: one copy each
            to.copy_(own, non_blocking=True)
            yield own.nbytes

    def store(self, target: Tensor, source: Tensor) -> None:
        """Copy source [K, T, D] from the device to target of the same shape in a page, within `outgoing`."""
        if self._stream is None:
            target.copy_(source)
            return
        for to, own in zip(target, source, strict=True):
            to.copy_(own, non_blocking=True)

    def submit(self, job: Iterator[int]) -> Transfer:
        """Begin a transfer, after those before it."""
        thread, after = self._thread, None
        if thread is None or not thread.is_alive():  # a forked process has none of its parent's
            thread = self._start()
        if self._outgoing is not None:  # the slot may still be read, and a page be on its way out
            self._outgoing.wait_stream(_current(self._outgoing))
            after = self._outgoing.record_event()
        made = Transfer(job, thread, self._stream, after)
        self._queue.put(made)
        return made

    @contextlib.contextmanager
    def outgoing(self, *sources: Tensor) -> Iterator[None]:
        """Copies from the device made in this block: on a stream of the link's, after what has been computed so far.

        Returns once no more than AHEAD bytes besides these are on their way out: a prefill, which the host launches far
        ahead of the device, would else hold every layer's keys and values there.
        """
        if self._outgoing is None:
            yield
            return
        self._outgoing.wait_stream(_current(self._outgoing))
        with torch.cuda.stream(self._outgoing):
            yield
        for source in sources:
            source.record_stream(self._outgoing)
        while self._leaving and (self._leaving_bytes > AHEAD or self._leaving[0][0].query()):  # type: ignore[no-untyped-call]
            gone, nbytes = self._leaving.popleft()
            gone.synchronize()
            self._leaving_bytes -= nbytes
        own = sum(source.nbytes for source in sources)
        self._leaving.append((self._outgoing.record_event(), own))
        self._leaving_bytes += own

    def catch_up(self) -> None:
        """What is launched from here on comes after what the link was given, so it may write to what that reads."""
        for stream in self._streams():
            _current(stream).wait_stream(stream)

    def synchronize(self) -> None:
        """Return once what was put on the link's streams has happened, so that the host may read it."""
        for stream in self._streams():
            stream.synchronize()

    def _streams(self) -> list[torch.cuda.Stream]:
        return [stream for stream in (self._stream, self._outgoing) if stream is not None]

    def _start(self) -> threading.Thread:
        self._queue = queue.SimpleQueue()
        arguments = (self._queue, self.gbps)
        self._thread = threading.Thread(target=_drive, args=arguments, name="vericache-link", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._queue.put, None).atexit = False
        return self._thread


def _drive(jobs: queue.SimpleQueue[Transfer | None], gbps: float | None) -> None:
    """The thread: knows the queue and not the link, so that a link that nobody holds ends it."""
    free = 0.0
    while (transfer := jobs.get()) is not None:
        free = transfer.run(gbps, free)
        del transfer


def _current(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """The current stream of a stream's device."""
    return torch.cuda.current_stream(stream.device)


def _sleep_until(moment: float, least: float) -> None:
    """Sleep up to a moment on `time.perf_counter`'s clock, if that is more than `least` seconds away."""
    left = moment - time.perf_counter()
    if left > least:
        time.sleep(left)
