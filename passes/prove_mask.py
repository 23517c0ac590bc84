"""Prove that every mask is causal with left padding, by running the mask's own subgraph; find ALiBi on the way.

Before: each site may carry a mask node. After: every mask was evaluated in several scenes (columns cached, left
padding per row) and shows column c to the new token of row b exactly when c >= padding of b. What it adds to the
scores that it shows is nothing, or slope[h] * place in every scene, which the site's `alibi` then says. The decode
variants need no mask: lengths, paddings and slopes say the same. Anything else raises UnsupportedGraph with the mask's
source line. Where attention is spelled out, the mask is what its softmax reads for products of zero; that each product
seen does reach it is tried with another number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from vericache_compile.passes.evaluate import FailsAt, Scene, evaluate, scenes
from vericache_compile.passes.program import Program, SiteNodes, unsupported
from vericache_compile.plan import Alibi, Site

HIDDEN = -1e9
"""What an additive mask must at least take off a score to hide it (or the lowest number of its type)."""
PROBE = 4096.0
"""A product that is large beside any bias, so that it is seen in types of few digits."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In which slope and place may have been multiplied."""
WITHOUT = "run this model without vericache"
FIX = "use a causal mask with left padding (tokenizer.padding_side = 'left')"


def prove_mask(program: Program) -> int:
    """Prove the masks of all sites; returns how many sites carried one."""
    for nodes in program.sites:
        if nodes.mask is None and program.found_roles.mask is not None:
            raise unsupported("an attention that leaves out the padding mask", nodes.attention, FIX)
    sites = {nodes.mask: nodes for nodes in program.sites if nodes.mask is not None}
    rules: dict[Node, list[Alibi | None]] = {}
    for scene, masks, probes in _run(program, sites):
        for node, mask in masks.items():
            bias = _bias(mask, scene)
            if bias is None:
                raise unsupported("an attention mask that is not causal with left padding", node, FIX)
            candidates = rules[node] if node in rules else _read_rules(bias, scene)
            rules[node] = [rule for rule in candidates if _follows(bias, scene, rule)]
            if not rules[node]:
                raise unsupported("a bias on attention scores that is not linear in the key's place", node, WITHOUT)
            if node in probes and not _reaches(probes[node], mask, sites[node].site, scene):
                raise unsupported("attention scores that do not reach the softmax as they are", node, WITHOUT)
    for i, nodes in enumerate(program.sites):
        alibi = rules[nodes.mask][0] if nodes.mask is not None else None
        if alibi is not None:
            alibi = replace(alibi, slopes=alibi.slopes * (nodes.site.heads // len(alibi.slopes)))
            program.sites[i] = replace(nodes, site=replace(nodes.site, alibi=alibi))
    return sum(bool(nodes.sides) for nodes in program.sites)


def _run(
    program: Program, sites: dict[Node, SiteNodes]
) -> Iterator[tuple[Scene, dict[Node, Tensor], dict[Node, Tensor]]]:
    """Every distinct mask in every scene; where attention is spelled out for products of zero, and then of PROBE.

    Lengths at which the model itself fails set `program.column_limit`.
    """
    masks, spelled = list(sites), [mask for mask, nodes in sites.items() if nodes.products]
    zero, probe = (_products(program, number) for number in (0.0, PROBE))
    longest = 0
    for scene in sorted(scenes(program, masks, zero), key=lambda scene: scene.past) if masks else ():
        if program.column_limit is not None and scene.past >= program.column_limit:
            break
        try:
            values = evaluate(program, masks, scene, zero)
        except FailsAt:
            if longest == 0:
                raise
            program.column_limit = _first_failure(program, masks, zero, longest, scene)
            continue
        longest = scene.past
        probes = evaluate(program, spelled, scene, probe) if spelled else ()
        shaped, probed = (
            {mask: _by_head(value, sites[mask]) for mask, value in zip(nodes, made, strict=True)}
            for nodes, made in ((masks, values), (spelled, probes))
        )
        yield scene, shaped, probed


def _products(program: Program, number: float) -> dict[Node, float]:
    """What stands for the product of queries and keys at each site that spells attention out, if it is `number`."""
    filled: dict[Node, float] = {}
    for nodes in program.sites:
        numbers = (number,) if len(nodes.products) == 1 else (number, 1 / nodes.site.head_size)
        filled |= zip(nodes.products, numbers, strict=False)
    return filled


def _by_head(mask: Tensor, nodes: SiteNodes) -> Tensor:
    """Scores [B * H, 1, C] as [B, H, 1, C]; any other mask as it is."""
    return mask.view(-1, nodes.site.heads, *mask.shape[1:]) if nodes.products and mask.dim() == 3 else mask


def _first_failure(program: Program, masks: list[Node], zero: dict[Node, float], works: int, fails: Scene) -> int:
    """The fewest cached columns, more than `works`, at which masks cannot be computed."""
    low, high = works, fails.past
    while high - low > 1:
        middle = (low + high) // 2
        try:
            evaluate(program, masks, replace(fails, past=middle), zero)
            low = middle
        except FailsAt:
            high = middle
    return high


def _bias(mask: Tensor, scene: Scene) -> Tensor | None:
    """What a mask [B or 1, H or 1, 1, past + 1] adds to the scores it shows: float32 [B, H or 1, past + 1], zero where
    hidden. None unless it shows exactly the columns from each row's padding on."""
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[-1] != scene.past + 1 or mask.shape[-2] != 1:
        return None
    shown, bias = mask, torch.zeros_like(mask, dtype=torch.float32)
    if mask.is_floating_point():
        shown = ~(mask <= max(HIDDEN, torch.finfo(mask.dtype).min))
        bias = mask.float().masked_fill(~shown, 0)
    expected = torch.arange(scene.past + 1, device=mask.device) >= torch.tensor(scene.pads, device=mask.device)[:, None]
    wide = expected[:, None, None, :].expand(len(scene.pads), mask.shape[1], 1, scene.past + 1)
    if shown.dtype != torch.bool or not torch.equal(shown.expand_as(wide), wide):
        return None
    return bias.expand_as(wide)[:, :, 0]


def _read_rules(bias: Tensor, scene: Scene) -> list[Alibi | None]:
    """The rules that a bias may follow, by the first two or last two columns that its first row sees."""
    if not bias.any():
        return [None]
    own = bias[0, :, scene.pads[0] :]
    relative = bool(own[:, 0].any())
    slopes = tuple((-own[:, -2] if relative else own[:, 1]).tolist())
    return [Alibi(slopes, dtype, relative) for dtype in TYPES]


def _follows(bias: Tensor, scene: Scene, alibi: Alibi | None) -> bool:
    """Whether a bias is the rule's in each row and head, to within two units in the last place of float32."""
    if alibi is None:
        return not bias.any()
    column = torch.arange(scene.past + 1, device=bias.device)
    first = torch.tensor(scene.pads, device=bias.device)[:, None]
    places = (column - scene.past).expand(len(scene.pads), -1) if alibi.relative else column - first
    slopes = torch.tensor(alibi.slopes, dtype=alibi.dtype, device=bias.device)
    expected = (slopes[:, None] * places[:, None].to(alibi.dtype)).float().masked_fill((column < first)[:, None], 0)
    return torch.allclose(bias.expand_as(expected), expected, rtol=2.4e-7, atol=0)


def _reaches(probe: Tensor, mask: Tensor, site: Site, scene: Scene) -> bool:
    """Whether a product of PROBE adds, wherever it is seen, what the site says: no mask puts a number in its place."""
    score = site.scale * PROBE
    if site.soft_cap is not None:
        score = site.soft_cap * math.tanh(score / site.soft_cap)
    seen = torch.arange(scene.past + 1, device=mask.device) >= torch.tensor(scene.pads, device=mask.device)[:, None]
    added = (probe.float() - mask.float())[seen[:, None, None].expand_as(mask)]
    return bool((added - score).abs().max() <= 0.02 * abs(score))
