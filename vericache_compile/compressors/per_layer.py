"""A choice per attention site: one method here, another there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.errors import OptionError
from vericache_compile.plan import Site


@dataclass(frozen=True)
class PerLayer(Compressor):
    """The first entry that names a site chooses its method; None names every site."""

    name: ClassVar[str] = "per-layer"
    needs: ClassVar[tuple[str, ...]] = ("layers",)

    entries: tuple[tuple[range | None, Compressor], ...]
    """Sites and their method, e.g. ((range(0, 2), NoCompression()), (None, SnapKV()))."""

    def __post_init__(self) -> None:
        rests = [place for place, (sites, _) in enumerate(self.entries) if sites is None]
        if not rests:
            raise OptionError("sites without a method", "a compressor per layer", "end with `rest: method`")
        if rests[0] < len(self.entries) - 1:
            fix = "write `rest: method` once, at the end"
            raise OptionError("a method after `rest`, which no site has", "a compressor per layer", fix)

    @property
    def queries(self) -> int:
        """The most that one of the methods reads."""
        return max(method.queries for _, method in self.entries)

    @property
    def wants(self) -> frozenset[str]:
        """What any of the methods wants."""
        return frozenset(self.needs).union(*(method.wants for _, method in self.entries))

    @property
    def learned(self) -> Sequence[Tensor]:
        """What each of the methods has: the same tensors where they have one file."""
        return [tensor for _, method in self.entries for tensor in method.learned]

    @property
    def refresh(self) -> int:  # type: ignore[override]
        """All sites are compressed anew when the most restless of the methods asks for it."""
        return min((method.refresh for _, method in self.entries if method.refresh), default=0)

    def for_layer(self, layer: int, layers: int) -> Compressor:
        """The method of site `layer` of `layers`."""
        chosen = next(method for sites, method in self.entries if sites is None or layer in sites)
        return chosen.for_layer(layer, layers)

    def check_model(self, sites: Sequence[Site], parameters: Iterable[Sequence[int]]) -> None:
        """Ask every method; raises OptionError where an entry names no site that is left to it."""
        shapes, left = list(parameters), set(range(len(sites)))
        for named, method in self.entries:
            if named is not None and named.start >= len(sites):
                fix = f"name some of its {len(sites)} sites, which are counted from 0"
                raise OptionError(f"the model has no site {named.start}", "a compressor per layer", fix)
            own = {site for site in left if named is None or site in named}
            if not own:
                fix = "name fewer sites in the entries before it"
                raise OptionError(f"no site is left to {method}", "a compressor per layer", fix)
            left -= own
            method.check_model(sites, shapes)

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> CompressedKV:
        """Never called: `for_layer` hands out the methods."""
        raise AssertionError("ask for_layer first")
