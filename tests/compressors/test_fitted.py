"""What is fitted: every stored key is turned back at its own place in the row, and forth when it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.cskv import CSKV
from vericache_compile.compressors.facts import Facts
from vericache_compile.compressors.fitted import Fitted
from vericache_compile.compressors.kvquant import KVQuant
from vericache_compile.compressors.recalkv import ReCalKV
from vericache_compile.compressors.rotatekv import RotateKV
from vericache_compile.compressors.rotation import Rotation

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


METHODS = [method(residual=0, sinks=2) for method in (KVQuant, RotateKV, CSKV, ReCalKV)]


def _rotation(size: int) -> Rotation:
    """RoPE as Llama has it: channel i turns with i + D / 2, by position * 10000^(-2 i / D)."""
    half = size // 2

    def table(count: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(count).unsqueeze(1) * 10000.0 ** (-torch.arange(half) / half)
        return torch.cat([angles.cos()] * 2, 1), torch.cat([-angles.sin(), angles.sin()], 1)

    return Rotation(torch.arange(size).roll(half), table)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.name))
@pytest.mark.parametrize("begin", [20, 140])
def test_keys_are_stored_as_before_rope(random_row: Row, method: Fitted, begin: int) -> None:
    """Turned keys are read as the turned ones of what would be read without: whole rows, and what joins later."""
    keys, values, _ = random_row(330)
    rotation = _rotation(16)
    turned, first = rotation.rotate(keys, 7), Facts(position=7, rotation=rotation)
    expected = method.compress(keys[:, :begin], values[:, :begin], None)
    region = method.knowing(first).compress(turned[:, :begin], values[:, :begin], None)
    covered = region.covered
    later = replace(first, token=covered, position=7 + covered)
    expected = expected.extend(keys[:, covered:], values[:, covered:], None)
    region = region.knowing(later).extend(turned[:, covered:], values[:, covered:], None)
    assert region.covered >= 258
    mine, theirs = region.materialize()[0], rotation.rotate(expected.materialize()[0], 7)
    assert float((mine - theirs).norm()) < 0.01 * float(theirs.norm())  # rounding falls otherwise here and there
    assert torch.equal(mine[:, :2], turned[:, :2])


def test_few_directions_are_found_again(random_row: Row) -> None:
    """Keys of few directions, turned: in as many coordinates they are read well, but not as they are cached."""
    keys, values, _ = random_row(300)
    keys = keys @ torch.diag(torch.tensor([1.0] * 4 + [0.0] * 12))
    rotation = _rotation(16)
    turned = rotation.rotate(keys, 0)
    method = CSKV(rank=0.25, residual=0)
    both = (method.knowing(Facts(rotation=rotation)), method)
    told, untold = (each.compress(turned, values, None).materialize()[0] for each in both)
    assert float((told - turned).norm()) < 0.01 * float(turned.norm())
    assert float((untold - turned).norm()) > 0.1 * float(turned.norm())
