"""A budget per layer: what a method keeps on average is spread over the layers, more in the first than in the last.

`pyramid | method` gives it to any method with a `keep`, and PyramidKV is SnapKV with it (Cai et al., arXiv 2406.02069,
section 4): attention spreads over many tokens in lower layers and gathers on few in upper ones. Budgets fall linearly
from the first layer to the last around the mean `keep`: the last has keep / beta, the first 2 * keep - keep / beta, or
all tokens where that is more than there are, and the last then the rest.

Shapes: K KV heads, S tokens, D head size, Dv value head size, w queries, H query heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from vericache_compile.compressors.around import Around
from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.chunkkv import ChunkKV
from vericache_compile.compressors.dense import is_number
from vericache_compile.errors import OptionError
from vericache_compile.plan import Site

BETA = 20.0


@dataclass(frozen=True)
class Pyramid(Around):
    """Any method that keeps a fraction, with a pyramid of budgets around it."""

    name: ClassVar[str] = "pyramid"
    around: ClassVar[str] = "method"
    paper: ClassVar[str] = "arXiv 2406.02069"
    needs: ClassVar[tuple[str, ...]] = ("layers",)

    method: Compressor
    beta: float = BETA
    """The mean budget by the last layer's, at least 1: how steep the pyramid is."""

    def __post_init__(self) -> None:
        check_beta(self.beta, self.name)
        keep_of(self.method)

    def for_layer(self, layer: int, layers: int) -> Compressor:
        """The method with the budget of site `layer` of `layers`."""
        keep = pyramid_share(keep_of(self.method), self.beta, layer, layers)
        return with_keep(self.method, keep).for_layer(layer, layers)

    def check_model(self, sites: Sequence[Site], parameters: Iterable[Sequence[int]]) -> None:
        """Ask the method."""
        self.method.check_model(sites, parameters)

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> CompressedKV:
        """As the method does with its mean budget; the runtime asks `for_layer` first."""
        return self.method.compress(keys, values, queries)


def pyramid_share(keep: float, beta: float, layer: int, layers: int) -> float:
    """The fraction that site `layer` of `layers` keeps, in (0, 1]; `keep` on average."""
    if layers == 1:
        return keep
    least = keep / beta
    most = 2 * keep - least
    if most > 1:
        most, least = 1.0, 2 * keep - 1
    return max(most - layer * (most - least) / (layers - 1), least)


def check_beta(beta: float, method: str) -> None:
    """Raise OptionError unless `beta` is a number of at least 1."""
    if not is_number(beta) or not 1 <= beta < float("inf"):
        raise OptionError(f"beta={beta!r}", f"compressor {method!r}", "give a number from 1 up")


def keep_of(method: Compressor) -> float:
    """The fraction that a method keeps; raises OptionError for one that has none to spread."""
    if isinstance(method, Around) and not isinstance(method, Pyramid) and "keep" not in method.parameters:
        return keep_of(method.inner)
    where = "a compressor after pyramid |"
    if "keep" not in method.parameters:
        fix = "write one that keeps a fraction of the tokens, as in pyramid | snapkv(keep=0.2)"
        raise OptionError(f"{method.name!r} has no budget to spread", where, fix)
    keep: float = vars(method)["keep"]
    if vars(method.for_layer(0, 2)).get("keep", keep) != keep:
        fix = "write pyramid | snapkv(keep=0.2), or pyramidkv alone"
        raise OptionError(f"{method.name!r} spreads its budget itself", where, fix)
    if isinstance(method, ChunkKV) and method.reuse > 1:
        found = f"reuse={method.reuse}: layers that share a choice have one budget"
        raise OptionError(found, where, "leave out reuse, or leave out pyramid")
    return keep


def with_keep(method: Any, keep: float) -> Compressor:
    """The same method, which keeps another fraction."""
    own = "keep" in method.parameters
    changed: dict[str, object] = {"keep": keep} if own else {method.around: with_keep(method.inner, keep)}
    made: Compressor = replace(method, **changed)
    return made
