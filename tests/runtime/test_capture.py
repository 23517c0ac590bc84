"""A launch is eager, then recorded, then replayed; on the CPU, and where recording fails, it stays eager."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

from vericache_compile.runtime import capture
from vericache_compile.runtime.capture import Captured, Launch, Pool, record

GPU = torch.device("cuda")


class Recording:
    """Stands for a CUDA graph: replaying does the launch's work without its Python."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work


class Counter:
    """A launch that counts: runs of its Python, and times that its work was done."""

    def __init__(self) -> None:
        self.python = self.done = 0
        self.recording = False

    def work(self) -> None:
        self.done += 1

    def __call__(self) -> None:
        self.python += 1
        if not self.recording:
            self.work()


def captured_on(device: torch.device, pool: Pool | None = None) -> Captured[None]:
    return Captured(device, "a launch", pool)


@pytest.fixture
def counter() -> Counter:
    return Counter()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, counter: Counter) -> None:
    """Recording as a GPU does it: the Python runs once more, the work does not."""

    def fake_record(launch: Launch[None], pool: Pool) -> tuple[Recording, None]:
        counter.recording = True
        launch()
        counter.recording = False
        return Recording(counter.work), None

    monkeypatch.setattr(capture, "record", fake_record)


@pytest.mark.usefixtures("recorded")
def test_a_launch_is_eager_once_then_recorded_then_replayed(counter: Counter) -> None:
    captured = captured_on(GPU)
    seen = []
    for _ in range(4):
        captured(counter)
        seen.append((counter.python, counter.done, captured.replays))
    assert seen == [(1, 1, False), (2, 2, True), (2, 3, True), (2, 4, True)]


@pytest.mark.usefixtures("recorded")
def test_on_the_cpu_it_stays_eager(counter: Counter) -> None:
    captured = captured_on(torch.device("cpu"))
    for _ in range(3):
        captured(counter)
    assert (counter.python, counter.done, captured.replays) == (3, 3, False)


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("out of memory. {} MiB are free")]
)
def test_a_recording_that_fails_is_said_once_and_launched_eagerly(
    error: Exception, counter: Counter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(launch: Launch[None], pool: Pool) -> Any:
        raise type(error)(str(error).format(next(free)))

    free = count()
    capture._tell.cache_clear()
    monkeypatch.setattr(capture, "record", fail)
    with caplog.at_level(logging.WARNING, "vericache_compile"):
        for _ in range(2):
            captured = captured_on(GPU)
            for _ in range(3):
                captured(counter)
    assert (counter.python, counter.done, captured.replays) == (6, 6, False)
    [told] = caplog.records
    assert all(part in told.getMessage() for part in (str(error).split(".")[0], "a launch", "where:", "fix:"))


def test_where_one_recording_fails_none_is_tried_again_in_its_memory(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[Pool] = []

    def fail(launch: Launch[None], pool: Pool) -> Any:
        tries.append(pool)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(capture, "record", fail)
    pool = Pool()
    for shared in (pool, pool, None):
        captured = captured_on(GPU, shared)
        for _ in range(3):
            captured(counter)
    assert (counter.python, counter.done) == (9, 9)
    assert [tried is pool for tried in tries] == [True, False]


def test_a_launch_that_is_wrong_is_not_hidden(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(capture, "record", lambda launch, pool: launch())
    with pytest.raises(RuntimeError, match="shapes differ"):
        captured_on(GPU)(wrong)


def double(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x * 2)


@pytest.mark.gpu
def test_a_real_recording_reads_what_its_buffers_hold() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    x, out = torch.zeros(4, device=GPU), torch.zeros(4, device=GPU)
    captured = captured_on(GPU)
    for value in range(5):
        x.fill_(value)
        captured(lambda: double(x, out))
        assert out.tolist() == [2.0 * value] * 4
    assert captured.replays


@pytest.mark.gpu
def test_an_illegal_recording_leaves_the_device_usable() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    x = torch.zeros(4, device=GPU)
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        record(lambda: x.tolist(), Pool())
    assert torch.cuda.current_stream() == stream
    assert (x + 1).tolist() == [1.0] * 4
