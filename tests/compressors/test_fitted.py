"""What is fitted: the hook for keys in another form sees every stored key once, at its own place in the row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vericache_compile.compressors.kvquant import KVQuant

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Ramped(KVQuant):
    """Stores keys less a ramp over the row, as one that undoes a rotation would."""

    def as_stored(self, keys: Tensor, first: int) -> Tensor:
        return keys - _ramp(keys, first)

    def as_cached(self, keys: Tensor, first: int) -> Tensor:
        return keys + _ramp(keys, first)


def _ramp(keys: Tensor, first: int) -> Tensor:
    return torch.arange(first, first + keys.shape[1], dtype=keys.dtype).view(1, -1, 1)


def test_keys_are_turned_at_their_own_places(random_row: Row) -> None:
    keys, values, _ = random_row(330)
    ramped = keys + _ramp(keys, 0)
    plain, turned = KVQuant(residual=0, sinks=2), Ramped(residual=0, sinks=2)
    for start in (20, 140):  # the first covers nothing yet
        expected = plain.compress(keys[:, :start], values[:, :start], None)
        region = turned.compress(ramped[:, :start], values[:, :start], None)
        covered = region.covered
        expected = expected.extend(keys[:, covered:], values[:, covered:], None)
        region = region.extend(ramped[:, covered:], values[:, covered:], None)
        assert region.covered == 258
        torch.testing.assert_close(
            region.materialize()[0], expected.materialize()[0] + _ramp(keys[:, :258], 0), atol=1e-3, rtol=0
        )
