"""Prove that every mask is causal with left padding, by running the mask's own subgraph.

Before: each site may carry a mask node. After: every mask was evaluated in several scenes (columns cached, left
padding per row) and shows column c to the new token of row b exactly when c >= padding of b. The decode variants then
need no mask: lengths and paddings say the same. Anything else raises UnsupportedGraph with the mask's source line.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from vericache_compile.passes.evaluate import Scene, evaluate, scenes
from vericache_compile.passes.program import Program, unsupported

HIDDEN = -1e9
"""What an additive mask must at least take off a score to hide it (or the lowest number of its type)."""
FIX = "use a causal mask with left padding (tokenizer.padding_side = 'left')"


def prove_mask(program: Program) -> int:
    """Prove the masks of all sites; returns how many sites carried one."""
    masks: list[Node] = []
    for nodes in program.sites:
        if nodes.mask is not None:
            masks.append(nodes.mask)
        elif program.found_roles.mask is not None:
            raise unsupported("an attention that leaves out the padding mask", nodes.attention, FIX)
    distinct = list(dict.fromkeys(masks))
    for scene in scenes(program, distinct) if distinct else ():
        for node, mask in zip(distinct, evaluate(program, distinct, scene), strict=True):
            if not _equals(mask, scene):
                raise unsupported("an attention mask that is not causal with left padding", node, FIX)
    return len(masks)


def _equals(mask: Tensor, scene: Scene) -> bool:
    """Whether a mask [B or 1, H or 1, 1, past + 1] shows exactly the columns from each row's padding on."""
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[-1] != scene.past + 1 or mask.shape[-2] != 1:
        return False
    if mask.is_floating_point():
        shown, hidden = mask == 0, mask <= max(HIDDEN, torch.finfo(mask.dtype).min)
        if not bool((shown | hidden).all()):
            return False
        mask = shown
    expected = torch.arange(scene.past + 1) >= torch.tensor(scene.pads)[:, None]
    wide = expected[:, None, None, :].expand(len(scene.pads), mask.shape[1], 1, scene.past + 1)
    return mask.dtype == torch.bool and torch.equal(mask.expand_as(wide).cpu(), wide)
