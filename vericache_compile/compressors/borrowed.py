"""A site without a region of its own: it reads an earlier site's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from vericache_compile.compressors.base import CompressedKV, Compressor


class BorrowedKV(CompressedKV):
    """Another site's region, which that site holds."""

    def __init__(self, lent: CompressedKV) -> None:
        self.lent, self.covered = lent, lent.covered

    @property
    def slots(self) -> int:
        """Those of the region that is lent."""
        return self.lent.slots

    @property
    def head_slots(self) -> tuple[int, ...] | None:
        """Those of the region that is lent."""
        return self.lent.head_slots

    @property
    def in_order(self) -> bool:
        """As in the region that is lent."""
        return self.lent.in_order

    @property
    def nbytes(self) -> int:
        """None: the lender has counted them."""
        return 0

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Keys [K, N, D] and values [K, N, Dv] of the lender."""
        return self.lent.materialize()

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Never called: who holds both sites borrows the lender's next region."""
        raise AssertionError("the lender's region is extended, and borrowed anew")


@dataclass(frozen=True)
class Borrower(Compressor):
    """The method of a site that reads the region of an earlier one."""

    name: ClassVar[str] = "borrower"

    lender: int
    """The earlier site, which has a region of its own."""

    @property
    def donor(self) -> int:
        """The lender."""
        return self.lender

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> CompressedKV:
        """Never called: the runtime lends."""
        raise AssertionError("a borrowed region is not made of the site's own keys")
