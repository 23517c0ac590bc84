"""Over a cache written in place a mask is taken when it shows the columns that were written, whichever it is."""

from __future__ import annotations

import pytest
import torch
from looked_up import LookedUp
from torch import Tensor

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.evaluate import bounds


class Computed(LookedUp):
    """Computes its mask."""

    def shown(self, input_pos: Tensor) -> Tensor:
        return torch.where(torch.arange(self.columns) <= input_pos, 0.0, float("-inf"))[None, None, None]


class Banded(LookedUp):
    """Sees the newest five columns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen &= torch.ones_like(self.seen).triu(-4)


class Spelled(LookedUp):
    """Spells attention out."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ keys.mT / 3).masked_fill(~self.shown(*more), float("-inf"))
        return scores.softmax(-1) @ values


@pytest.mark.parametrize(("model", "window"), [(LookedUp, None), (Computed, None), (Banded, 5), (Spelled, None)])
def test_masks_over_buffers_are_proved_for_their_columns(model: type[LookedUp], window: int | None) -> None:
    program = model().program("prove_mask", batch=3)
    assert program.sites[0].site.window == window
    assert bounds(program) == (0, 19)


class Holed(LookedUp):
    """One token does not see one of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen[13, 2] = False


class SpelledHoled(Spelled):
    """The same, spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen[13, 2] = False


class Peeking(LookedUp):
    """One token sees a column that nothing was written to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen[17, 19] = True


class Looking(LookedUp):
    """Sees one column more than there are."""

    def shown(self, input_pos: Tensor) -> Tensor:
        return (torch.arange(self.columns) <= input_pos + 1)[None, None, None]


class Unmasked(LookedUp):
    """Sees all of the buffers."""

    def shown(self, input_pos: Tensor) -> None:
        return None


@pytest.mark.parametrize("model", [Holed, SpelledHoled, Peeking, Looking, Unmasked])
def test_other_masks_over_buffers_are_refused(model: type[LookedUp]) -> None:
    with pytest.raises(UnsupportedGraph, match="under no mask" if model is Unmasked else "not causal"):
        model().program("prove_mask")
