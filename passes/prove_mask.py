"""Prove that every mask is causal with left padding, and maybe a sliding window, by running the mask's own subgraph.

Before: each site may carry a mask node. After: every mask was evaluated in several scenes (columns cached, left
padding per row) and shows column c to the new token of row b exactly when c >= padding of b and c > own - window;
`Site.window` is the width that was found (None: all columns). What it adds to the scores that it shows is nothing, or
slope[h] * place in every scene, which the site's `alibi` then says. The decode variants need no mask: lengths,
paddings, windows and slopes say the same. Anything else raises UnsupportedGraph with the mask's source line. Where
attention is spelled out, the mask is what its softmax reads for products of zero; that each product seen does reach it
is tried with another number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from vericache_compile.passes.evaluate import FailsAt, Scene, evaluate, least_room, scenes
from vericache_compile.passes.program import Program, SiteNodes, ancestors, unsupported
from vericache_compile.plan import Alibi, Site

HIDDEN = -1e9
"""What an additive mask must at least take off a score to hide it (or the lowest number of its type)."""
PROBE = 4096.0
"""A product that is large beside any bias, so that it is seen in types of few digits."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In which slope and place may have been multiplied."""
TOGETHER = 512
"""Columns that a mask is looked up for at once."""
WITHOUT = "run this model without vericache"
FIX = "use a causal mask with left padding (tokenizer.padding_side = 'left')"


@dataclass
class _Rule:
    """What a mask has been found to follow, scene by scene, from the shortest on."""

    window: int | None = None
    widest: int = 0
    """The most columns that a row was shown, all of its own."""
    biases: list[Alibi | None] | None = None
    """Those that fit so far; None before the first scene."""


def prove_mask(program: Program) -> int:
    """Prove the masks of all sites and set their windows and biases; returns how many sites carried a mask."""
    for nodes in program.sites:
        if nodes.mask is None and program.found_roles.mask is not None:
            raise unsupported("an attention that leaves out the padding mask", nodes.attention, FIX)
    if program.writes and _is_given(program):
        return len(program.sites)
    sites = {nodes.mask: nodes for nodes in program.sites if nodes.mask is not None}
    rules = {node: _Rule() for node in sites}
    for scene, masks, probes in _run(program, sites):
        for node, mask in masks.items():
            seen = _note_columns(rules[node], node, mask, scene)
            _note_bias(rules[node], node, mask, seen, scene)
            if node in probes and not _reaches(probes[node], mask, seen, sites[node].site):
                raise unsupported("attention scores that do not reach the softmax as they are", node, WITHOUT)
    if program.writes:
        _prove_tables(program, rules)
    for i, nodes in enumerate(program.sites):
        rule = _Rule() if nodes.mask is None else rules[nodes.mask]
        program.sites[i] = replace(nodes, site=_ruled(nodes.site, rule))
    return sum(bool(nodes.sides) for nodes in program.sites)


def _prove_tables(program: Program, rules: dict[Node, _Rule]) -> None:
    """Prove masks that are looked up in buffers, whose rows may hold anything, at each column that can be written."""
    zero, room = _products(program, 0.0), least_room(program)
    tables = {program.placeholders[i] for i in program.buffers}
    for node in [node for node in rules if not tables.isdisjoint(ancestors([node], zero))]:
        if room is None or program.found_roles.mask is not None:
            fix = "look it up in a buffer for one size of cache without padding, or give it whole: [B, 1, T, C]"
            raise unsupported("a mask that depends on a buffer and on a size or padding", node, fix)
        last = min(room, program.column_limit or room)
        for first in range(0, last, TOGETHER):
            past = torch.arange(first, min(first + TOGETHER, last))
            if not torch.equal(*_looked_up(program, node, zero, past, room, rules[node].window or room)):
                raise _irregular(node)


def _looked_up(
    program: Program, node: Node, zero: dict[Node, float], past: Tensor, room: int, window: int
) -> tuple[Tensor, Tensor]:
    """Which of `room` columns a mask shows when `past` [n] are filled, and which it should: [n, M, room] both."""
    scene = Scene(0, (0,) * program.batch)
    mask: Tensor = torch.func.vmap(lambda own: evaluate(program, [node], scene, zero, own)[0])(past)
    shown = (mask > hides(mask) if mask.is_floating_point() else mask).reshape(len(past), -1, room).cpu()
    behind = past[:, None, None] - torch.arange(room)
    return shown, ((behind >= 0) & (behind < window)).expand_as(shown)


def _ruled(site: Site, rule: _Rule) -> Site:
    """A site with the window and the bias that its mask follows; a cache that is cut is a window of its own."""
    cut = None if site.recent is None else site.recent + 1
    alibi = rule.biases[0] if rule.biases else None
    if alibi is not None:
        alibi = replace(alibi, slopes=alibi.slopes * (site.heads // len(alibi.slopes)))
    return replace(site, window=cut if rule.window is None else rule.window, alibi=alibi)


def _is_given(program: Program) -> bool:
    """Whether the caller gives the mask over caches written in place whole: its role is set, each call looks at it."""
    inputs, distinct = program.placeholders, list(dict.fromkeys(nodes.mask for nodes in program.sites))
    if None in distinct or (len(distinct) > 1 and not set(inputs).isdisjoint(distinct)):
        fix = "attend under one mask [B, 1, T, C] that hides what no token was written to"
        raise unsupported("a cache updated in place under no mask", program.sites[0].attention, fix)
    if distinct[0] not in inputs:
        return False
    program.roles = replace(program.found_roles, shown=inputs.index(distinct[0]))
    return True


def _run(
    program: Program, sites: dict[Node, SiteNodes]
) -> Iterator[tuple[Scene, dict[Node, Tensor], dict[Node, Tensor]]]:
    """Every distinct mask [B, H or 1, past + 1] in every scene; where attention is spelled out for products of zero,
    and then of PROBE.

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
            {mask: _by_head(value, sites[mask], scene) for mask, value in zip(nodes, made, strict=True)}
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


def _by_head(mask: Tensor, nodes: SiteNodes, scene: Scene) -> Tensor:
    """A mask [B or 1, H or 1, 1, C] or scores [B * H, 1, C] of the newest C columns as [B, H or 1, past + 1]: those
    before are hidden."""
    if nodes.products and mask.dim() == 3:
        mask = mask.view(-1, nodes.site.heads, *mask.shape[1:])
    mask = mask[(None,) * (4 - mask.dim())]
    if nodes.site.in_place:
        mask = _filled(mask, nodes, scene.past + 1)
    missing = scene.past + 1 - mask.shape[-1]
    if missing < 0 or mask.shape[-2] != 1 or not (mask.is_floating_point() or mask.dtype == torch.bool):
        assert nodes.mask is not None, "this is its value"
        raise _irregular(nodes.mask)
    hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
    return torch.nn.functional.pad(mask[:, :, 0].expand(len(scene.pads), -1, -1), (missing, 0), value=hidden)


def _filled(mask: Tensor, nodes: SiteNodes, columns: int) -> Tensor:
    """The mask's first `columns` columns, if it hides the others."""
    others = mask[..., columns:]
    if bool((others > hides(mask) if mask.is_floating_point() else others).any()):
        assert nodes.mask is not None, "this is its value"
        raise _irregular(nodes.mask)
    return mask[..., :columns]


def hides(mask: Tensor) -> float:
    """What an additive mask is at most where it hides."""
    return max(HIDDEN, torch.finfo(mask.dtype).min)


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


def _irregular(node: Node) -> Exception:
    return unsupported("an attention mask that is not causal with left padding", node, FIX)


def _note_columns(rule: _Rule, node: Node, mask: Tensor, scene: Scene) -> Tensor:
    """Which columns [B, 1, past + 1] a mask [B, H or 1, past + 1] shows: those of each row from its padding on, or the
    newest of them, as many in every scene. Raises UnsupportedGraph for any other."""
    shown = ~(mask <= hides(mask)) if mask.is_floating_point() else mask
    first = torch.tensor(scene.pads, device=mask.device)[:, None]
    column = torch.arange(scene.past + 1, device=mask.device)
    for row, pad in zip(shown[:, 0], scene.pads, strict=True):
        count = int(row.sum())
        if count < scene.past + 1 - pad and rule.window is None:
            rule.window = count
        rule.widest = max(rule.widest, count)
    window = rule.window
    seen = (column >= first) if window is None else (column >= first) & (column > scene.past - window)
    if (window is not None and not 0 < rule.widest <= window) or not torch.equal(shown, seen[:, None].expand_as(shown)):
        raise _irregular(node)
    return seen[:, None]


def _note_bias(rule: _Rule, node: Node, mask: Tensor, seen: Tensor, scene: Scene) -> None:
    """Drop the biases that a mask does not follow; raises UnsupportedGraph when none is left."""
    bias = torch.zeros_like(mask, dtype=torch.float32)
    if mask.is_floating_point():
        bias = mask.float().masked_fill(~seen, 0)
    if rule.biases is None and scene.past == 0 and not bias.any():
        return  # no bias follows from the place of one column
    candidates = _read_rules(bias, seen) if rule.biases is None else rule.biases
    rule.biases = [each for each in candidates if _follows(bias, seen, scene, each)]
    if not rule.biases:
        raise unsupported("a bias on attention scores that is not linear in the key's place", node, WITHOUT)


def _read_rules(bias: Tensor, seen: Tensor) -> list[Alibi | None]:
    """The rules that a bias [B, H or 1, past + 1] may follow, by the first two or last two columns that its first row
    sees."""
    if not bias.any():
        return [None]
    own = bias[0, :, seen[0, 0]]
    relative = bool(own[:, 0].any())
    slopes = tuple((-own[:, -2:][:, 0] if relative else own[:, 1]).tolist())
    return [Alibi(slopes, dtype, relative) for dtype in TYPES]


def _follows(bias: Tensor, seen: Tensor, scene: Scene, alibi: Alibi | None) -> bool:
    """Whether a bias is the rule's in each row and head, to within two units in the last place of float32."""
    if alibi is None:
        return not bias.any()
    column = torch.arange(scene.past + 1, device=bias.device)
    first = torch.tensor(scene.pads, device=bias.device)[:, None]
    places = (column - scene.past).expand(len(scene.pads), -1) if alibi.relative else column - first
    slopes = torch.tensor(alibi.slopes, dtype=alibi.dtype, device=bias.device)
    expected = (slopes[:, None] * places[:, None].to(alibi.dtype)).float().masked_fill(~seen, 0)
    return torch.allclose(bias.expand_as(expected), expected, rtol=2.4e-7, atol=0)


def _reaches(probe: Tensor, mask: Tensor, seen: Tensor, site: Site) -> bool:
    """Whether a product of PROBE adds, wherever it is seen, what the site says: no mask puts a number in its place."""
    score = site.scale * PROBE
    if site.soft_cap is not None:
        score = site.soft_cap * math.tanh(score / site.soft_cap)
    added = (probe.float() - mask.float())[seen.expand_as(mask)]
    return bool((added - score).abs().max() <= 0.02 * abs(score))
