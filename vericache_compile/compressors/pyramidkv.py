"""PyramidKV: SnapKV's choice, with more slots in the first layers than in the last.

Cai et al., arXiv 2406.02069, section 4; `layer_budget.py` has the budgets. The same as `pyramid | snapkv`. A layer's
budget is a fraction, so that layer is SnapKV with it (slots are rounded up, where the paper rounds to the nearest).

Shapes: none of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vericache_compile.compressors.layer_budget import BETA, check_beta, pyramid_share
from vericache_compile.compressors.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Keep the fraction `keep` on average over the layers; one layer alone, or one that is not asked, keeps it too."""

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "arXiv 2406.02069"
    needs: ClassVar[tuple[str, ...]] = ("queries", "layers")

    beta: float = BETA
    """The mean budget by the last layer's, at least 1: how steep the pyramid is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_beta(self.beta, self.name)

    def for_layer(self, layer: int, layers: int) -> SnapKV:
        """SnapKV with the budget of site `layer` of `layers`."""
        keep = pyramid_share(self.keep, self.beta, layer, layers)
        return SnapKV(keep=keep, window=self.window, kernel=self.kernel)
