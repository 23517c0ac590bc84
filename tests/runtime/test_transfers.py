"""The link: in order, held back, and loud when something goes wrong; its thread ends with it."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import streams
import torch

from vericache_compile.errors import TransferError
from vericache_compile.runtime import transfers
from vericache_compile.runtime.transfers import Link


def note(log: list[str], name: str, pieces: int = 1, nbytes: int = 1) -> Iterator[int]:
    for piece in range(pieces):
        log.append(f"{name}{piece}")
        yield nbytes


def test_transfers_come_in_the_order_in_which_they_were_begun() -> None:
    link, log = Link(), list[str]()
    begun = [link.submit(note(log, name, 2)) for name in "abc"]
    begun[2].result()
    assert log == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert all(each.done and each.nbytes == 2 for each in begun)


def test_a_copy_is_exact_in_every_type() -> None:
    link = Link()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        source = torch.randn(2, 300, 16).to(dtype)
        target = torch.zeros(2, 512, 16, dtype=dtype)
        link.submit(link.copy(target[:, 100:400], source)).result()
        assert torch.equal(target[:, 100:400], source)
        assert not target[:, :100].any()
        assert not target[:, 400:].any()


def test_copies_on_streams_are_there_for_who_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in buffers of inference mode: the link's thread is another than the one that made them."""
    streams.use(monkeypatch)
    link, source = Link(), torch.randn(2, 300, 16)
    link.pinned(torch.device("cuda"))
    with torch.inference_mode():
        target, page = torch.zeros(2, 300, 16), torch.zeros(2, 300, 16)
        with link.outgoing(source):
            link.store(page, source)
        coming = link.submit(link.copy(target, page))
        assert coming.drain()
        assert not target.any(), "on its way"
        coming.result()
    assert torch.equal(target, source), "what comes in waits for what goes out"


def test_what_fails_on_a_stream_is_raised_once_nothing_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    streams.use(monkeypatch)
    link, target, source = Link(), torch.zeros(2, 8, 4), torch.ones(2, 8, 4)
    link.pinned(torch.device("cuda"))

    def broken() -> Iterator[int]:
        yield from link.copy(target, source)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        link.submit(broken()).result()
    assert torch.equal(target, source), "its buffer may be given to others now"


def test_a_link_that_moves_to_a_gpu_takes_its_thread_along(monkeypatch: pytest.MonkeyPatch) -> None:
    link, source = Link(), torch.randn(2, 8, 4)
    target = torch.zeros_like(source)
    link.submit(note([], "a")).result()
    streams.use(monkeypatch)
    link.pinned(torch.device("cuda"))
    coming = link.submit(link.copy(target, source))
    assert coming.drain()
    assert not target.any()
    coming.result()
    assert torch.equal(target, source)


def test_the_host_does_not_run_far_ahead_of_what_goes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prefill leaves behind layer by layer is not free before it is gone."""
    streams.use(monkeypatch)
    monkeypatch.setattr(transfers, "AHEAD", 1000)
    link, layer = Link(), torch.zeros(400, dtype=torch.uint8)
    link.pinned(torch.device("cuda"))
    waits = []
    for _ in range(6):
        with link.outgoing(layer):
            pass
        waits.append(link._outgoing.host_waits)  # type: ignore[union-attr]
    assert waits == [0, 0, 0, 1, 2, 3], "two of them and the newest may be on their way"


def test_a_cap_holds_the_link_back() -> None:
    link = Link(gbps=0.001)
    first, second = (link.submit(note([], name, pieces=4, nbytes=25_000)) for name in "ab")  # a tenth of a second each
    second.result()
    assert first.seconds >= 0.0999
    assert second.began >= first.began + 0.0999
    assert time.perf_counter() >= first.began + 0.1999


def test_a_late_thread_does_not_slow_the_link_down() -> None:
    """The cap is the link's: what a busy machine keeps its thread from is made up for."""
    link, log = Link(gbps=0.0001), list[str]()

    def late() -> Iterator[int]:
        time.sleep(0.5)
        yield 25_000

    slow, quick = link.submit(late()), link.submit(note(log, "b", nbytes=25_000))
    quick.result()
    assert quick.began == pytest.approx(slow.began + 0.25)


def test_the_caller_does_not_wait_for_what_it_begins() -> None:
    held = threading.Event()

    def slow() -> Iterator[int]:
        held.wait(10)
        yield 1

    transfer = Link().submit(slow())
    assert not transfer.done
    held.set()
    transfer.result()
    assert transfer.done


def test_an_error_is_raised_where_the_data_is_waited_for_and_the_link_goes_on() -> None:
    def broken_copy() -> Iterator[int]:
        yield 1
        raise ValueError("the cable is out")

    link, log = Link(), list[str]()
    first, second = link.submit(broken_copy()), link.submit(note(log, "b"))
    with pytest.raises(ValueError, match="cable") as raised:
        first.result()
    assert any(entry.name == "broken_copy" for entry in raised.traceback)
    second.result()
    assert log == ["b0"]


def test_a_dead_thread_is_an_error_and_no_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "PULSE", 0.01)
    monkeypatch.setattr(transfers, "_drive", lambda *_: None)
    transfer = Link().submit(note([], "a"))
    with pytest.raises(TransferError, match=r"(?s)thread has died.*fix"):
        transfer.result()
    assert not transfer.drain()


def test_a_link_that_nobody_holds_ends_its_thread() -> None:
    link = Link()
    link.submit(note([], "a")).result()
    thread = link._thread
    assert thread is not None
    assert thread.is_alive()
    del link
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_program_that_is_interrupted_ends() -> None:
    """Ctrl-C while it waits for a transfer that has no end."""
    program = """
import signal, time
from vericache_compile.runtime.transfers import Link
signal.signal(signal.SIGINT, signal.default_int_handler)
def slow():
    print("under way", flush=True)
    while True:
        time.sleep(0.01)
        yield 1
Link().submit(slow()).result()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"under way\n"
        running.send_signal(signal.SIGINT)
        try:
            _, err = running.communicate(timeout=60)
        finally:
            running.kill()
    assert b"KeyboardInterrupt" in err
    assert running.returncode == -signal.SIGINT
