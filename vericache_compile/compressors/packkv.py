"""PackKV: round tokens within an error bound, put like ones together, and use as many bits as that takes.

Jiang et al., arXiv 2512.24449, section 3. A token is rounded to steps that are a fixed share of its range, so that no
number is off by more than half of that. Attention does not depend on the order of tokens: those of a block of 64 are
sorted by the median of their value codes (the paper's cheaper order), keys and values alike. Then 16 tokens of one
channel are a pack: its least code, and as many bits per code as its range takes, from 0 up.

A pack of w bits is w planes of one 16-bit word, a bit per token. How many planes there are depends on the data: the
host waits for that count, once per site and compression.

Shapes: K KV heads, S tokens, D head size, p = 16 tokens in a pack, b = 64 tokens in a block, T planes in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import torch
from torch import Tensor

from vericache_compile.compressors.dense import check_count, is_number
from vericache_compile.compressors.facts import take_tokens
from vericache_compile.compressors.quantizer import Codes, Quantizer
from vericache_compile.errors import OptionError

BLOCK: Final = 64
PACK: Final = 16
WIDEST: Final = 4
"""Bits of the largest code: least code and width of a pack share a byte."""


class Packed(NamedTuple):
    """One side, its tokens in the block's order."""

    planes: Tensor
    """int16 [1, T], pack by pack: all heads and channels of the first 16 tokens come first."""
    packs: Tensor
    """Least code and, from bit 4 up, width: uint8 [K, S / p, D]."""
    step: Tensor
    """[K, S], in the dtype of the cache."""
    low: Tensor
    """[K, S], in the dtype of the cache."""


@dataclass(frozen=True)
class PackKV(Quantizer):
    """Pack whole blocks of 64 tokens; at least the last `residual` stay exact in the tail."""

    name: ClassVar[str] = "packkv"
    paper: ClassVar[str] = "arXiv 2512.24449"
    needs: ClassVar[tuple[str, ...]] = ("count",)
    in_order: ClassVar[bool] = False

    key_step: float = 0.1
    """Step as a fraction of a key's range."""
    value_step: float = 0.2
    """Step as a fraction of a value's range."""
    residual: int = 32
    """Least number of recent tokens left to the tail."""

    def __post_init__(self) -> None:
        check_count("residual", self.residual, 0, self.name)
        for option in ("key_step", "value_step"):
            step, least = getattr(self, option), 1 / (2**WIDEST - 1)
            if not is_number(step) or not least <= step <= 1:
                fix = f"give a fraction from {least:.3f} to 1: codes have at most {WIDEST} bits"
                raise OptionError(f"{option}={step!r}", f"compressor {self.name!r}", fix)

    @property
    def multiple(self) -> int:
        """64 tokens: a block."""
        return BLOCK

    def quantize(self, keys: Tensor, values: Tensor) -> tuple[Codes, Codes]:
        """Codes of keys [K, S, D] and values [K, S, Dv]; S is a multiple of 64."""
        rounded_keys, rounded_values = round_tokens(keys, self.key_step), round_tokens(values, self.value_step)
        order = block_order(rounded_values[0])
        return _pack(*rounded_keys, order), _pack(*rounded_values, order)

    def dequantize(self, keys: Codes, values: Codes) -> tuple[Tensor, Tensor]:
        """Keys [K, S, D] and values [K, S, Dv] from their codes, tokens in the order in which they are stored."""
        return _read(Packed(*keys)), _read(Packed(*values))


def round_tokens(x: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [K, S, D], step [K, S] and low [K, S] of x [K, S, D]: x = code * step + low, step = share * range."""
    low, high = x.amin(dim=2), x.amax(dim=2)  # aminmax takes seven times as long on a CPU
    step = ((high.float() - low.float()) * share).to(x.dtype)
    codes = (x.float() - low.float().unsqueeze(2)).div_(step.float().unsqueeze(2)).nan_to_num_(nan=0.0)
    return codes.round_().clamp_(0, 2**WIDEST - 1).to(torch.uint8), step, low


def block_order(codes: Tensor) -> Tensor:
    """Tokens [K, S] of value codes [K, S, D]: each block of 64 sorted by the tokens' medians."""
    counts = torch.zeros((*codes.shape[:2], 2**WIDEST), dtype=torch.int16, device=codes.device)
    counts.scatter_add_(2, codes.long(), torch.ones_like(codes, dtype=torch.int16))
    below = counts.cumsum(dim=2) <= (codes.shape[2] - 1) // 2  # a median by counting: there are few codes
    medians = torch.unflatten(below.sum(dim=2), 1, (codes.shape[1] // BLOCK, BLOCK))
    inside = medians.argsort(dim=2, stable=True)
    starts = torch.arange(0, codes.shape[1], BLOCK, device=codes.device)
    return (inside + starts[:, None]).flatten(1)


def _pack(codes: Tensor, step: Tensor, low: Tensor, order: Tensor) -> Packed:
    if codes.shape[1] == 0:
        empty = codes.new_empty(1, 0, dtype=torch.int16)
        return Packed(empty, codes.clone(), step.clone(), low.clone())
    codes, step, low = take_tokens(codes, order), step.gather(1, order), low.gather(1, order)
    packs = torch.unflatten(codes, 1, (-1, PACK)).permute(1, 0, 3, 2)  # [S / p, K, D, p]
    least, most = packs.amin(dim=3), packs.amax(dim=3)
    spread = most - least
    width = sum((spread > 2**bit - 1).to(torch.uint8) for bit in range(WIDEST))
    assert isinstance(width, Tensor), "there are bits"
    relative = (packs - least.unsqueeze(3)).to(torch.int16)
    tokens = torch.arange(PACK, dtype=torch.int16, device=codes.device)
    words = torch.stack(
        [((relative >> bit & 1) << tokens).sum(dim=3, dtype=torch.int16) for bit in range(WIDEST)], dim=3
    )
    kept = words[torch.arange(WIDEST, device=codes.device) < width.unsqueeze(3)]
    return Packed(kept.unsqueeze(0), (least | width << WIDEST).transpose(0, 1).contiguous(), step, low)


def _read(packed: Packed) -> Tensor:
    """x [K, S, D], in the dtype of the step."""
    packs = packed.packs.transpose(0, 1)
    width, least = packs >> WIDEST, packs & (2**WIDEST - 1)
    planes = torch.arange(WIDEST, device=packs.device)
    words = torch.zeros((*packs.shape, WIDEST), dtype=torch.int16, device=packs.device)
    words.masked_scatter_(planes < width.unsqueeze(3), packed.planes)
    tokens = torch.arange(PACK, dtype=torch.int16, device=packs.device)
    codes = least.to(torch.int16).unsqueeze(3).repeat(1, 1, 1, PACK)  # [S / p, K, D, p]
    for bit in range(WIDEST):
        codes += (words[..., bit, None] >> tokens & 1) << bit
    flat = codes.permute(1, 0, 3, 2).flatten(1, 2).to(packed.step.dtype)
    return flat.mul_(packed.step.unsqueeze(2)).add_(packed.low.unsqueeze(2))
