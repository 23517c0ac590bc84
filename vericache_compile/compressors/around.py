"""A method around another one: it reads, wants and refreshes what that does, and what it needs itself.

Shapes: none of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from vericache_compile.compressors.base import Compressor


class Around(Compressor):
    """What a chain and the budgets across layers and heads share."""

    around: ClassVar[str]
    """The field that holds the method inside."""

    @property
    def inner(self) -> Compressor:
        """The method inside."""
        held: Compressor = getattr(self, self.around)
        return held

    @property
    def queries(self) -> int:
        """Those that the method inside reads."""
        return self.inner.queries

    @property
    def wants(self) -> frozenset[str]:
        """What the method inside wants, and this one needs."""
        return self.inner.wants | frozenset(self.needs)

    @property
    def least_tail(self) -> int:
        """Those of the method inside."""
        return self.inner.least_tail

    @property
    def learned(self) -> Sequence[Tensor]:
        """What the method inside has."""
        return self.inner.learned

    @property
    def refresh(self) -> int:  # type: ignore[override]
        """When the method inside chooses anew."""
        return self.inner.refresh
