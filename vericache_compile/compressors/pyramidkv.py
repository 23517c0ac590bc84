"""PyramidKV: SnapKV's choice, with more slots in the first layers than in the last.

Cai et al., arXiv 2406.02069, section 4: attention spreads over many tokens in lower layers and gathers on few in upper
ones. Budgets fall linearly from the first layer to the last around the mean `keep`: the last has keep / beta, the first
2 * keep - keep / beta, or all tokens where that is more than there are, and the last then the rest. A layer's budget is
a fraction, so that layer is SnapKV with it (slots are rounded up, where the paper rounds to the nearest).

Shapes: none of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vericache_compile.compressors.dense import is_number
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.errors import OptionError


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Keep the fraction `keep` on average over the layers; one layer alone, or one that is not asked, keeps it too."""

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "arXiv 2406.02069"
    needs: ClassVar[tuple[str, ...]] = ("queries", "layers")

    beta: float = 20.0
    """The mean budget by the last layer's, at least 1: how steep the pyramid is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.beta) or not 1 <= self.beta < float("inf"):
            raise OptionError(f"beta={self.beta!r}", f"compressor {self.name!r}", "give a number from 1 up")

    def for_layer(self, layer: int, layers: int) -> SnapKV:
        """SnapKV with the budget of site `layer` of `layers`."""
        return SnapKV(keep=self.share(layer, layers), window=self.window, kernel=self.kernel)

    def share(self, layer: int, layers: int) -> float:
        """The fraction that site `layer` of `layers` keeps, in (0, 1]."""
        if layers == 1:
            return self.keep
        least = self.keep / self.beta
        most = 2 * self.keep - least
        if most > 1:
            most, least = 1.0, 2 * self.keep - 1
        return most - layer * (most - least) / (layers - 1)
