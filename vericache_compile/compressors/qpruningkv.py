"""QPruningKV: more tokens in lower precision. SnapKV's choice, stored by KIVI.

Zhang et al., arXiv 2412.12706: at equal bytes four times the tokens in 4 bits beat the tokens in 16. Their budget for
16 bits, times 16 / bits, is the `keep` here. Any other pair is written `one | another`, see `Chain`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from vericache_compile.compressors.chain import Chain
from vericache_compile.compressors.dense import check_count, check_keep
from vericache_compile.compressors.kivi import Kivi
from vericache_compile.compressors.quantizer import Quantizer
from vericache_compile.compressors.scorer import Chooser
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.errors import OptionError


@dataclass(frozen=True)
class QPruningKV(Chain):
    """Keep a fraction of the tokens, in 2 or 4 bits per number."""

    name: ClassVar[str] = "qpruningkv"
    parameters: ClassVar[tuple[str, ...]] = ("keep", "bits")
    needs: ClassVar[tuple[str, ...]] = ("queries",)

    drop: Chooser = field(init=False, repr=False)
    quantise: Quantizer = field(init=False, repr=False)
    keep: float = 0.5
    bits: int = 4
    refresh: int = field(default=0, kw_only=True, repr=False)
    """Choose anew among all tokens after so many tokens; 0: never."""

    def __post_init__(self) -> None:
        check_keep(self.keep, self.name)
        check_count("refresh", self.refresh, 0, self.name)
        if isinstance(self.bits, bool) or self.bits not in (2, 4):
            raise OptionError(f"bits={self.bits!r}", f"compressor {self.name!r}", "give 2 or 4")
        object.__setattr__(self, "drop", SnapKV(keep=self.keep))
        object.__setattr__(self, "quantise", Kivi(bits=self.bits))

    def for_layer(self, layer: int, layers: int) -> QPruningKV:
        """Itself: the same at every site."""
        return self
