"""Reads a model's rotation by position off its own graph: run on unit vectors, it says which channels turn together.

Shapes: B batch, P positions, D head size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vericache_compile.compressors.rotation import Rotation, turn
from vericache_compile.plan import DecodePlan, Rope, Site

log = logging.getLogger(__name__)
PROBES = (1, 5)
"""Positions at which a graph is asked which channels turn together, and whether that is all it does."""
AT_ONCE = 1024
"""Positions for which a graph is run at once."""


class Rotations:
    """The rotations of one model's sites, each made when a compressor first asks for it."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, tuple[int, ...]], tuple[Rope, Rotation | None]] = {}

    def of(self, plan: DecodePlan, inputs: Sequence[Tensor], layer: int) -> Rotation | None:
        """The rotation of a site's keys; None where they are not rotated. `inputs` are those of a captured call."""
        rope = plan.rotations[layer] if plan.rotations else None
        if rope is None:
            return None
        weights = [inputs[i] for i in rope.weights]
        key = (id(rope), tuple(weight.data_ptr() for weight in weights))
        if key not in self._made:
            roles, site = plan.captured.roles, plan.captured.sites[layer]
            device = inputs[roles.weights[0]].device
            probe = Probe(rope, weights, site, roles.batch, plan.position_limit, device)
            made = probe.rotation()
            if made is None:
                log.warning(
                    "vericache: keys are compressed as they are cached, not as before RoPE: a position does more than "
                    "turn pairs of channels\n  where: layer %d\n  fix: choose a compressor that does not need pre_rope",
                    layer,
                )
            self._made[key] = (rope, made)  # the rope is kept alive, so that its id stays its own
        return self._made[key][1]


@dataclass(frozen=True)
class Probe:
    """A rope with its weights, ready to run."""

    rope: Rope
    weights: Sequence[Tensor]
    site: Site
    batch: int
    limit: int | None
    """First position that the model cannot embed."""
    device: torch.device

    def rotation(self) -> Rotation | None:
        """The rotation that the graph computes; None where it is none: images of unit vectors tell."""
        units = torch.eye(self.site.head_size, device=self.device)
        matrix = self._run(units, PROBES[0]).t()
        off = (matrix - matrix.diagonal().diag()).abs()
        own = torch.arange(len(units), device=self.device)
        pairs = torch.where(off.amax(dim=1) > 0, off.argmax(dim=1), own)
        if not torch.equal(pairs[pairs], own):
            return None
        made = Rotation(pairs, lambda count: self._table(pairs, count))
        return made if all(self._agrees(made, units, position) for position in PROBES) else None

    def _agrees(self, rotation: Rotation, units: Tensor, position: int) -> bool:
        """Whether the rotation turns unit vectors as the graph does, and back."""
        images = self._run(units, position)
        tolerance = torch.finfo(self.site.dtype).eps ** 0.5
        cos, sin = (x[0] for x in rotation.at(position, 1))
        back = rotation.unrotate(images.unsqueeze(1), position).squeeze(1)
        pairs = ((images, turn(units, rotation.pairs, cos, sin)), (back, units))
        return all(torch.allclose(*pair, atol=tolerance, rtol=tolerance) for pair in pairs)

    def _table(self, pairs: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin [count, D]: of each pair the image of its first channel, and that of its other."""
        own = torch.arange(len(pairs), device=self.device)
        first = own <= pairs
        parts = []
        for begin in range(0, count, AT_ONCE):
            positions = torch.arange(begin, min(begin + AT_ONCE, count), device=self.device)
            one, other = (self._run(x.float().expand(len(positions), -1), positions) for x in (first, ~first))
            parts.append((torch.where(first, one, other), torch.where(first, other, one) * (own != pairs)))
        cos, sin = (torch.cat(side) for side in zip(*parts, strict=True))
        return cos, sin

    def _run(self, x: Tensor, at: Tensor | int) -> Tensor:
        """Images [P, D], float32, of x [P, D] at positions [P], or all at one."""
        positions = torch.full((len(x),), at, device=self.device) if isinstance(at, int) else at
        if self.limit is not None:
            positions = positions.clamp(max=self.limit - 1)
        size = self.site.head_size

        def one(x: Tensor, position: Tensor) -> Tensor:
            spread = x.expand(self.batch, self.site.kv_heads, 1, size)
            made: Tensor = self.rope.module(spread, position.expand(self.batch, 1), *self.weights)
            return made.reshape(-1, size)[0]

        with torch.no_grad():
            images: Tensor = torch.func.vmap(one)(x.to(self.site.dtype), positions)
        return images.float()
