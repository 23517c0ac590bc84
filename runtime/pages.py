"""Pages of full KV outside device memory: a run of columns of one row at one site, in host memory or in a file.

A file page carries a checksum; what does not match is lost, never read. Files are written and read by position, not
mapped: an unreadable or cut-off mapping ends the process, an unreadable file raises.

Shapes: K KV heads, P columns of a page, D head size, E value head size.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import IO

import torch
from torch import Tensor

from vericache_compile.errors import PageLost, VericacheError
from vericache_compile.plan import Site

log = logging.getLogger(__name__)
GROWTH = 64 << 20
"""Bytes by which a file of pages grows."""
REPAIR = "check the disk, or keep full KV elsewhere (placement='host'), and run the prompt again"


@dataclass
class HostPage:
    """Keys [K, P, D] and values [K, P, E] in host memory."""

    keys: Tensor
    values: Tensor
    shared: bool = False
    """Whether another sequence reads it too: then it is copied before it is written."""


@dataclass
class FilePage:
    """Keys and values of a page in a file, one after the other."""

    file: PageFile
    place: int
    """Which of the file's places for pages."""
    checksum: int

    def __post_init__(self) -> None:
        weakref.finalize(self, self.file.free.append, self.place).atexit = False

    def read(self, buffer: Tensor) -> None:
        """Fill buffer (uint8, a page long); raises PageLost where the file does not give back what was written."""
        self.file.read(self.place, self.checksum, buffer)


def host_pages(site: Site, columns: int, count: int, pinned: bool) -> list[HostPage]:
    """`count` pages of `columns` columns, zeroed, in few allocations; in pageable memory where none can be pinned.

    As many at once as a power of two: torch rounds the bytes that it pins up to one, and pinning is slow. Of these a
    head's columns lie side by side, so that one copy moves them (`join`).
    """
    made: list[HostPage] = []
    while left := count - len(made):
        together = 1 << left.bit_length() - 1
        shape, sizes = (site.kv_heads, together * columns), (site.head_size, site.value_size)[: site.sides]
        held = [host_memory((*shape, size), site.dtype, pinned) for size in sizes]
        keys, values = held[0], held[-1][..., : site.value_size]
        own = (slice(begin, begin + columns) for begin in range(0, together * columns, columns))
        made += [HostPage(keys[:, at], values[:, at]) for at in own]
    return made


def join(first: Tensor, second: Tensor) -> Tensor | None:
    """Columns [K, n, D] and [K, m, D] as one tensor [K, n + m, D], where they adjoin in memory."""
    one = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    behind = first.storage_offset() + first.shape[1] * first.stride(1)
    if not one or first.stride() != second.stride() or second.storage_offset() != behind:
        return None
    return first.as_strided((first.shape[0], first.shape[1] + second.shape[1], first.shape[2]), first.stride())


def host_memory(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool, *, zeroed: bool = True) -> Tensor:
    """Host memory, pinned where that is asked for; where it is refused pageable, which is said once."""
    make = torch.zeros if zeroed else torch.empty
    with torch.inference_mode(False):
        try:
            return make(shape, dtype=dtype, pin_memory=pinned)
        except RuntimeError as error:
            if not pinned:
                raise
            _tell_pageable(str(error).split(". ")[0].splitlines()[0])
            return make(shape, dtype=dtype)


@cache
def _tell_pageable(reason: str) -> None:
    log.warning(
        "vericache: host memory could not be pinned, transfers from what is not pinned are slower: %s\n"
        "  where: pages of full KV\n  fix: raise the limit on locked memory (ulimit -l), or free host memory",
        reason,
    )


def sides(flat: Tensor, site: Site, *shape: int) -> tuple[Tensor, Tensor]:
    """Keys [*shape, D] and values [*shape, E] that lie one after the other at the start of flat (uint8), or of a latent
    site the values within the keys."""
    count, width = math.prod(shape), site.dtype.itemsize
    ends = (count * site.head_size * width, count * (site.head_size + site.value_size) * width)
    keys = flat[: ends[0]].view(site.dtype).view(*shape, site.head_size)
    if site.latent:
        return keys, keys[..., : site.value_size]
    return keys, flat[ends[0] : ends[1]].view(site.dtype).view(*shape, site.value_size)


def check_folder(folder: str | None) -> None:
    """Raise VericacheError where files cannot be made in a folder, before anything is computed for them."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EROFS):
            where, fix = folder or tempfile.gettempdir(), "name a folder that can be written to with kv_folder"
            raise VericacheError(f"no file for KV pages: {error.strerror}", where, fix) from error


class PageFile:
    """A file without a name, of places for pages of one size; it is gone when nobody has it open, whatever happens."""

    def __init__(self, folder: str | None, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.free: list[int] = []
        self._places = 0
        self.where = folder or tempfile.gettempdir()
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as it is used

    def write(self, data: Tensor) -> FilePage:
        """Write one page (uint8); raises OSError where the disk is full."""
        if not self.free:
            self._grow()
        place = self.free.pop()
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        written = 0
        while written < self.page_bytes:
            written += os.pwrite(self._file.fileno(), view[written:], place * self.page_bytes + written)
        return FilePage(self, place, _checksum(view))

    def _grow(self) -> None:
        """More places, their room on the disk taken at once, so that a full disk shows here."""
        count = max(GROWTH // self.page_bytes, 1)
        os.posix_fallocate(self._file.fileno(), self._places * self.page_bytes, count * self.page_bytes)
        self.free += range(self._places + count - 1, self._places - 1, -1)
        self._places += count

    def read(self, place: int, checksum: int, buffer: Tensor) -> None:
        """Read one page into buffer (uint8); raises PageLost."""
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        try:
            got = sum(self._pieces(view, place * self.page_bytes))
        except OSError as error:
            raise PageLost(f"a page of KV cannot be read: {error.strerror}", self.where, REPAIR) from error
        if got < self.page_bytes or _checksum(view) != checksum:
            raise PageLost("a page of KV is not what was written", self.where, REPAIR)

    def _pieces(self, view: memoryview, at: int) -> Iterator[int]:
        done = 0
        while done < len(view) and (count := os.preadv(self._file.fileno(), [view[done:]], at + done)):
            done += count
            yield count


def _checksum(data: memoryview) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(data)
