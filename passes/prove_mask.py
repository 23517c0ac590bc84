"""Prove that every mask is causal with left padding, and maybe a sliding window, by running the mask's own subgraph.

Before: each site may carry a mask node. After: every mask was evaluated in several scenes (columns cached, left
padding per row) and shows column c to the new token of row b exactly when c >= padding of b and c > own - window;
`Site.window` is the width that was found (None: all columns). The decode variants then need no mask: lengths, paddings
and windows say the same. Anything else raises UnsupportedGraph with the mask's source line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from vericache_compile.passes.evaluate import Scene, evaluate, scenes
from vericache_compile.passes.program import Program, unsupported

HIDDEN = -1e9
"""What an additive mask must at least take off a score to hide it (or the lowest number of its type)."""
FIX = "use a causal mask with left padding (tokenizer.padding_side = 'left')"


def prove_mask(program: Program) -> int:
    """Prove the masks of all sites and set their windows; returns how many sites carried a mask."""
    for nodes in program.sites:
        if nodes.mask is None and program.found_roles.mask is not None:
            raise unsupported("an attention that leaves out the padding mask", nodes.attention, FIX)
    masks = [nodes.mask for nodes in program.sites if nodes.mask is not None]
    if program.writes:
        _find_given_mask(program, masks)
        return len(masks)
    found = _windows(program, list(dict.fromkeys(masks)))
    for i, nodes in enumerate(program.sites):
        cut = None if nodes.site.recent is None else nodes.site.recent + 1
        window = found[nodes.mask] if nodes.mask is not None and found[nodes.mask] is not None else cut
        program.sites[i] = replace(nodes, site=replace(nodes.site, window=window))
    return len(masks)


def _find_given_mask(program: Program, masks: list[Node]) -> None:
    """Over caches written in place the caller gives the mask whole: its role is set, and each call looks at it."""
    inputs, distinct = program.placeholders, list(dict.fromkeys(masks))
    if len(masks) < len(program.sites) or len(distinct) != 1 or distinct[0] not in inputs:
        fix = "use transformers' DynamicCache (the default), or call generate"
        raise unsupported("a cache updated in place under no mask that is an input", program.sites[0].attention, fix)
    program.roles = replace(program.found_roles, shown=inputs.index(distinct[0]))


def _windows(program: Program, masks: list[Node]) -> dict[Node, int | None]:
    """The window of each mask; raises UnsupportedGraph for a mask of another kind."""
    held = scenes(program, masks) if masks else []
    values = [evaluate(program, masks, scene) for scene in held]
    return {node: _window(node, [row[i] for row in values], held) for i, node in enumerate(masks)}


def _window(node: Node, values: Sequence[Tensor], held: Sequence[Scene]) -> int | None:
    shown = [_columns_shown(value, scene) for value, scene in zip(values, held, strict=True)]
    windows = {
        int(row.sum())
        for heads, scene in zip(shown, held, strict=True)
        if heads is not None
        for row, pad in zip(heads[:, 0], scene.pads, strict=True)
        if not row[pad]
    }
    window = min(windows, default=None)
    for heads, scene in zip(shown, held, strict=True):
        if window == 0 or heads is None or not torch.equal(heads, _expected(scene, window)[:, None].expand_as(heads)):
            raise unsupported("an attention mask that is not causal with left padding", node, FIX)
    return window


def _expected(scene: Scene, window: int | None) -> Tensor:
    """Which columns [B, past + 1] the new token of each row attends to."""
    column = torch.arange(scene.past + 1)
    shown = column >= torch.tensor(scene.pads)[:, None]
    return shown if window is None else shown & (column > scene.past - window)


def _columns_shown(mask: Tensor, scene: Scene) -> Tensor | None:
    """A mask [B or 1, H or 1, 1, C] of the newest C columns as booleans [B, H or 1, past + 1]; or None."""
    mask = mask[(None,) * (4 - mask.dim())]
    columns = scene.past + 1
    if mask.shape[-1] > columns or mask.shape[-2] != 1:
        return None
    if mask.is_floating_point():
        shown, hidden = mask == 0, mask <= max(HIDDEN, torch.finfo(mask.dtype).min)
        if not bool((shown | hidden).all()):
            return None
        mask = shown
    if mask.dtype != torch.bool:
        return None
    wide = mask[:, :, 0].expand(len(scene.pads), -1, -1).cpu()
    return torch.nn.functional.pad(wide, (columns - mask.shape[-1], 0))
