"""Walks a segmented program: compiled segments in order, attention and the transfers that it waits for between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from vericache_compile.plan import Act, Cast, SegmentedProgram

Attend = Callable[..., Tensor]
"""(layer, q [B, H, T, D], k [B, K, T, D], v [B, K, T, E], sinks [H] or None) -> [B, H, T, E]; after waits also the
site's full keys and values [B, K, C, *]."""


class Incoming(Protocol):
    """Full KV on its way to the device."""

    def prefetch(self, layer: int) -> None:
        """Ask for a site's full KV."""

    def wait(self, layer: int) -> tuple[Tensor, Tensor]:
        """A site's full keys and values [B, K, C, *], once they are there."""


class WeightCasts:
    """Copies of weights as draft reads them; made once, and again when autograd's version counter says that a weight
    was changed in place."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.Size, torch.dtype, Cast], tuple[int, tuple[Tensor, ...]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(part.nbytes for _, parts in self._held.values() for part in parts)

    def get(self, weight: Tensor, cast: Cast) -> Tensor:
        """The copy of a weight, or the scales of that copy."""
        version = 0 if weight.is_inference() else weight._version
        whole = replace(cast, scale=False)
        key = (weight.data_ptr(), weight.shape, weight.dtype, whole)
        held = self._held.get(key)
        if held is None or held[0] != version:
            with torch.inference_mode(False):
                held = (version, whole.copies(weight.detach()))
            self._held[key] = held
        return held[1][cast.scale]


def bind_weights(program: SegmentedProgram, inputs: Sequence[Tensor], casts: WeightCasts) -> list[Tensor | None]:
    """Slots of a program with the weights of a captured call in place."""
    slots: list[Tensor | None] = [None] * program.slots
    for slot, index, cast in program.weights:
        slots[slot] = inputs[index] if cast is None else casts.get(inputs[index], cast)
    return slots


def execute(
    program: SegmentedProgram,
    bound: list[Tensor | None],
    tokens: Tensor,
    positions: Tensor,
    attend: Attend,
    incoming: Incoming | None = None,
) -> tuple[Tensor, ...]:
    """Run a program on tokens and positions ([B, 1] or [W, B, 1], int64); returns its outputs in order.

    `incoming` serves its prefetches and waits; without one prefetches are left out (in all but a round's first step).
    """
    slots = list(bound)
    slots[program.tokens], slots[program.positions] = tokens, positions
    for step in program.steps:
        if step.act is Act.PREFETCH:
            if incoming is not None:
                incoming.prefetch(step.layer)
            continue
        made: Sequence[Tensor]
        inputs = [slots[i] for i in step.inputs]
        if step.act is Act.RUN:
            assert step.run is not None, "a segment that was not compiled"
            made = step.run(inputs)  # type: ignore[arg-type]
        elif step.act is Act.WAIT:
            assert incoming is not None, "a wait without transfers"
            made = (incoming.wait(step.layer)[step.side],)
        else:
            q, k, v, *rest = map(_present, inputs)
            sinks = rest.pop(0) if len(rest) % 2 else None  # what was waited for comes in pairs
            made = (attend(step.layer, q, k, v, sinks, *rest),)
        for slot, value in zip(step.outputs, made, strict=True):
            slots[slot] = value
        for slot in step.dead:
            slots[slot] = None
    return tuple(_present(slots[i]) for i in program.outputs)


def _present(value: Tensor | None) -> Tensor:
    assert isinstance(value, torch.Tensor), "a program value was freed"
    return value
