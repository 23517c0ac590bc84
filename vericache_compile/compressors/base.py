"""The one interface behind which every compression method stands.

A method sees one row of one attention site: real tokens only, no padding. What it does not cover stays in
the exact tail, which the runtime owns; rollback is lowering the tail's length and no method's business.

Shapes: H query heads, K KV heads, S tokens, N slots kept, D head size, Dv value head size, w queries.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

from torch import Tensor

from vericache_compile.compressors.facts import KINDS, NOTHING, Facts
from vericache_compile.compressors.packed import PackedSide
from vericache_compile.plan import Site


class CompressedKV(ABC):
    """A compressed region over the first `covered` tokens of one row of one site; what it holds of these stays."""

    covered: int
    """Tokens of the row that this region stands for: [0, covered)."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """Keys that attention reads from this region (N)."""

    @property
    def head_slots(self) -> tuple[int, ...] | None:
        """Slots per KV head [K] where heads keep different counts; None where each has `slots`.

        `materialize` then gives the most of them, with a head's own at the right end; what lies before is not read.
        """
        return None

    @property
    def in_order(self) -> bool:
        """Whether slots follow each other as their tokens do in the text.

        Where scores depend on where a token stands (ALiBi), a region that keeps all tokens is used only if they do.
        """
        return True

    @property
    def exact(self) -> int:
        """So many of its last tokens, [covered - exact, covered), lie in its last slots as they were cached.

        In all heads: full KV need not bring them to the device again. It is compared bit by bit, and counts
        only where it is true.
        """
        return 0

    @property
    def as_cached(self) -> tuple[int, ...] | None:
        """Slots per KV head [K], each of a token as it was cached, in ascending order; None where that is not so.

        Where full KV lives in host memory the others are set apart there, and only they come in again. Whether it is
        so is checked bit by bit: a method that is wrong gives the same rows, only later.
        """
        return None

    @property
    def packed(self) -> tuple[PackedSide, PackedSide] | None:
        """Keys and values as a kernel can read them; None where only `materialize` gives them."""
        return None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated for this region."""

    @abstractmethod
    def materialize(self) -> tuple[Tensor, Tensor]:
        """Keys [K, N, D] and values [K, N, Dv], in the dtype of the cache."""

    @abstractmethod
    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """A new region that also covers the next S tokens: keys [K, S, D], values [K, S, Dv].

        May cover fewer than S of them (see `Compressor.compress`). Queries [H, w, D] are the latest. All may be views
        of a cache that is read, or of memory that is soon written to: they must be neither written to nor kept. The
        region that was extended is of no use afterwards.
        """

    def leave_room(self, tokens: int) -> None:  # noqa: B027
        """Be ready for about so many tokens to join in the tensors that `packed` gives, so that a recording which reads
        them goes on; where nothing is, each join is recorded anew."""

    def select(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [K, N, D] and values [K, N, Dv] that one draft step with this query [H, D] reads: by default all.

        Where it depends on the query, `materialize` gives one choice of many.
        """
        return self.materialize()

    @property
    def attends(self) -> bool:
        """Whether `attend` does better than attention to what `select` gives."""
        return False

    def attend(self, query: Tensor, tail: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """What a draft step's query [H, D] reads of this region and of the tail behind it: [H, Dv], scores in float32.

        `tail` is keys [K, T, D] and values [K, T, Dv], T >= 1. Asked where the region `attends`, steps are launched one
        by one, and scores are only scaled; steps that are recorded for a GPU read `packed` or `materialize`.
        """
        raise AssertionError("a region that does not say that it attends")

    def knowing(self, facts: Facts) -> CompressedKV:
        """The same region for `extend`, its `method` (where it keeps one) told what it needs to know."""
        method = getattr(self, "method", None)
        if not isinstance(method, Compressor) or not method.wants & KINDS:
            return self
        told = copy.copy(self)
        vars(told)["method"] = method.knowing(facts)
        return told


LASTING = 128
"""Tokens after which a region has lived long."""


class Compressor(ABC):
    """A compression method with its parameters."""

    name: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the options this method takes, beside the common ones."""
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    """What it asks for: `queries`, the last ones; `layers`, which site of how many it stands at (`for_layer`);
    `calibration`, a file of what it learned beforehand, where there is one; `count`, a number that the data decides,
    and the host waits for it once per site and compression; or one of `Facts`:
    `pre_rope`, `attention`, `repeated`, `read`, `ids`, `shared`."""
    refresh: int = 0
    """Compress anew from the full KV after so many tokens, by the latest queries; 0: never."""
    facts: Facts = NOTHING
    """What the runtime has told it (`knowing`)."""

    @property
    def least_tail(self) -> int:
        """Newest tokens that are left to the tail, at least, whenever others join a region."""
        return 0

    @property
    def is_lasting(self) -> bool:
        """Whether a region lives so long that it pays to set apart, in host memory, what it leaves out."""
        return self.refresh == 0 or self.refresh >= LASTING

    @property
    def queries(self) -> int:
        """How many of the last queries `compress` reads; 0 when it reads none."""
        return 0

    @property
    def learned(self) -> Sequence[Tensor]:
        """What all its regions share and none counts: what a calibration file held."""
        return ()

    @property
    def shared_nbytes(self) -> int:
        """Bytes of what is `learned`, each tensor counted once, however many of its methods read it."""
        return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in self.learned}.values())

    @property
    def wants(self) -> frozenset[str]:
        """All that it `needs`, and what it is made of."""
        return frozenset(self.needs)

    def knowing(self, facts: Facts) -> Self:
        """The method told of one row of one site; itself, where it wants to know nothing."""
        if not self.wants & KINDS:
            return self
        told = copy.copy(self)
        vars(told)["facts"] = facts
        return told

    def __str__(self) -> str:
        """The method with its parameters."""
        return repr(self) + (f", anew every {self.refresh} tokens" if self.refresh else "")

    def for_layer(self, layer: int, layers: int) -> Compressor:
        """The method as it is at site `layer` of `layers`: itself, unless sites have budgets of their own.

        The runtime asks it at every site before `compress`; `queries` is asked of the method as it was given.
        """
        return self

    @property
    def donor(self) -> int | None:
        """The earlier site whose region this one reads in place of one of its own; None for its own."""
        return None

    def check_model(self, sites: Sequence[Site], parameters: Iterable[Sequence[int]]) -> None:  # noqa: B027
        """Raise OptionError where the method was calibrated for a model of other sites or shapes of `parameters`.

        Asked once per captured graph, before it runs; a method that is not calibrated serves all.
        """

    @abstractmethod
    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> CompressedKV:
        """Compress keys [K, S, D] and values [K, S, Dv] (post-RoPE, as cached) by the last queries [H, w, D].

        Returns a region with `covered` <= S; tokens [covered, S) stay exact in the tail. All may be views of the full
        cache, which verify reads: they must not be written to.
        """
