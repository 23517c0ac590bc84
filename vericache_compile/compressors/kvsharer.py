"""KVSharer: some layers draft over the cache of an earlier layer, and hold none of their own.

Yang et al., arXiv 2410.18517, section 3 and algorithm 1. Pairs of layers are taken in order of the Euclidean distance
between their mean caches over some text, the LEAST alike first (their finding); the later layer of a pair is to read
the earlier one's cache, if the model's last hidden state stays within a cosine of 0.5 of its own, until enough layers
share. That order is calibrated: `vericache calibrate --compressor kvsharer` keeps the pairs that were accepted.

Without a file, layers are paired with the one below, from the last one down, which is at most half of them: a start,
not the paper's. A layer whose
cache has another shape than its lender's does not borrow.

Layers that do not share keep every token as it is. A borrowed region takes no bytes; a draft step reads it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.borrowed import Borrower
from vericache_compile.compressors.dense import is_number
from vericache_compile.compressors.learned import Learner
from vericache_compile.compressors.none import NoCompression
from vericache_compile.compressors.observed import last_hidden, observe
from vericache_compile.compressors.rotation import Rotation
from vericache_compile.errors import OptionError
from vericache_compile.plan import Site

COSINE = 0.5
"""Least cosine of the last hidden states with those of the model itself."""


@dataclass(frozen=True)
class KVSharer(Learner):
    """A fraction of the layers reads the cache of another."""

    name: ClassVar[str] = "kvsharer"
    paper: ClassVar[str] = "arXiv 2410.18517"
    needs: ClassVar[tuple[str, ...]] = ("layers", "calibration")

    share: float = 0.25
    """Fraction of the layers that borrow, from 0 up and below 1; fewer where no more pairs were accepted. At most 0.5
    without a file, and with one no more layers than it was calibrated for."""
    calibration: str | None = None

    def __post_init__(self) -> None:
        if not is_number(self.share) or not 0 <= self.share < 1:
            fix = "give a fraction from 0 up, below 1"
            raise OptionError(f"share={self.share!r}", f"compressor {self.name!r}", fix)
        self.load()

    def for_layer(self, layer: int, layers: int) -> Compressor:
        """A borrower, or no compression."""
        donors = self.donors(layers)
        return Borrower(donors[layer]) if layer in donors else NoCompression()

    def donors(self, layers: int) -> dict[int, int]:
        """Which layer borrows from which; raises OptionError for a `share` that there are no pairs for."""
        wanted, found, again = round(self.share * layers), f"share={self.share}", f"kvsharer(share={self.share})"
        if self.held is None:
            if self.share > 0.5:
                fix = f"give up to 0.5, since each layer borrows from the one below; or calibrate with {again}"
                raise OptionError(found, f"compressor {self.name!r} without a calibration file", fix)
            pairs = [(layer, layer - 1) for layer in range(layers - 1, 0, -2)]
        else:
            most = self.held.parameter("share")
            if wanted > round(most * layers):
                fix = f"give up to {most}, which it was calibrated for; or calibrate again with {again}"
                raise OptionError(found, self.held.where, fix)
            pairs = [(a, b) for a, b in self.held.part("pairs").tolist()]
        return dict(pairs[:wanted])

    def check_model(self, sites: Sequence[Site], parameters: Iterable[Sequence[int]]) -> None:
        """Raise OptionError where the file is of another model, or there are no pairs for `share`."""
        super().check_model(sites, parameters)
        self.donors(len(sites))

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> CompressedKV:
        """Copy keys [K, S, D] and values [K, S, Dv]: a layer by itself has nobody to borrow from."""
        return NoCompression().compress(keys, values, queries)

    def learn(self, model: Any, ids: Tensor, turned: Sequence[Rotation | None]) -> dict[str, Tensor]:
        """Pairs [C, 2] of borrower and lender, in order of acceptance, by the tokens ids [N, T]."""
        own = last_hidden(model, ids, lambda layer, keys, values: (keys, values))
        means = _means(model, ids)
        wanted, pairs = round(self.share * len(means)), dict[int, int]()
        for later, earlier in by_distance(means):
            if len(pairs) == wanted:
                break
            if later in pairs or earlier in pairs or later in pairs.values():
                continue
            tried = pairs | {later: earlier}
            states = last_hidden(model, ids, _lending(tried))
            if float(torch.cosine_similarity(states.float(), own.float(), dim=-1).mean()) > COSINE:
                pairs = tried
        return {"pairs": torch.tensor(list(pairs.items()), dtype=torch.int64).view(-1, 2)}


def by_distance(means: Mapping[int, tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
    """Pairs (later, earlier) of layers whose mean keys and values [K, T, *] have the same shape, the farthest first."""
    distances = {
        (later, earlier): sum(float((a - b).square().sum()) for a, b in zip(means[later], means[earlier], strict=True))
        for later in means
        for earlier in means
        if earlier < later and all(a.shape == b.shape for a, b in zip(means[later], means[earlier], strict=True))
    }
    return sorted(distances, key=lambda pair: (-distances[pair], pair))


def _means(model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Per layer mean keys and values [K, T, *] over the rows."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, seen in observe(model, ids):
        keys, values = seen.keys.float() / len(ids), seen.values.float() / len(ids)
        held = made.get(layer)
        made[layer] = (keys, values) if held is None else (held[0] + keys, held[1] + values)
    return made


def _lending(pairs: Mapping[int, int]) -> Any:
    """What a layer attends to while these pairs share."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def lend(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen[layer] = (keys, values)
        return seen[pairs.get(layer, layer)]

    return lend
