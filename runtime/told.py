"""What a compressor is told of each row at each site (`compressors/facts.py`), gathered from all who know it."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from functools import cache, cached_property

from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.facts import Facts, Read
from vericache_compile.plan import DecodePlan
from vericache_compile.runtime.caches import FullKV
from vericache_compile.runtime.rotations import Rotations
from vericache_compile.runtime.sequences import Sequence

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Telling:
    """The facts of one compression of one sequence."""

    sequence: Sequence
    plan: DecodePlan
    inputs: Rows[Tensor]
    rotations: Rotations
    compressor: Compressor
    shared: dict[int, dict[object, Tensor]] = field(default_factory=dict)
    """Per row."""

    def of(self, layer: int, b: int, begin: int, end: int) -> Facts:
        """The facts of row b's columns [begin, end) at a site."""
        row, full, wants = self.sequence.rows[b], self.sequence.full, self.compressor.wants
        known = len(row.ids) >= end
        if "ids" in wants and not known:
            _tell_unknown()
        drawn = self.sequence.drawn if "attention" in wants else None
        repeated = self.sequence.repeated if "repeated" in wants else None
        scores = {} if repeated is None else {i: repeated.of(i, b, begin, end) for i in self._alike(layer)}
        return Facts(
            layer=layer,
            token=begin - row.pad,
            position=begin + row.offset,
            end=row.length + row.offset,
            rotation=self.rotations.of(self.plan, self.inputs, layer) if "pre_rope" in wants else None,
            attention=drawn.of(layer, b, begin, end) if drawn is not None else None,
            repeated=scores.get(layer),
            everywhere=tuple(scores.values()),
            read=reader(full, layer, b, row.pad) if "read" in wants else None,
            ids=row.ids[begin:end] if "ids" in wants and known else None,
            shared=self.shared.setdefault(b, {}) if "shared" in wants else None,
        )

    def _alike(self, layer: int) -> list[int]:
        """Sites that have the method of this one, sliding windows apart: these are not compressed."""
        sites, methods = self.plan.captured.sites, self._methods
        return [site.layer for site in sites if site.window is None and methods[site.layer] == methods[layer]]

    @cached_property
    def _methods(self) -> list[Compressor]:
        """Per site."""
        count = len(self.plan.captured.sites)
        return [self.compressor.for_layer(layer, count) for layer in range(count)]


@cache
def _tell_unknown() -> None:
    log.warning(
        "vericache: a compressor that looks at tokens does without: which they were is not known\n"
        "  where: a cache of a fixed size, or one that an uncompiled model built\n"
        "  fix: read the prompt through the compiled model, into a cache that grows"
    )


def reader(full: FullKV, layer: int, b: int, pad: int) -> Read:
    """Reads tokens of a row from the full cache, wherever that lies."""

    def read(tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [K, n, D] and values [K, n, Dv] of tokens [K, n], counted from the row's first real one."""
        return full.gather(layer, b, tokens + pad)

    return read
