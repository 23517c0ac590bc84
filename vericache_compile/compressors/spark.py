"""SparK: every token stays, with the channels that queries weigh most; the others are guessed from their sign.

Liao et al., arXiv 2508.15212, section 4. A key number's saliency is k^2 |q|, with |q| the norm of its channel over the
last queries (the mean over the query heads of a KV head). Each token keeps its own most salient channels. A channel
that it lost reads back as sign(k) sqrt(m / |q|), where m is the mean saliency of those that this token lost: so lost
channels still have their share of the logits. Values may lose channels too (saliency 0.7 |v| + 0.3 variance of the
channel, read back as 0); by default they do not.

Stored: the kept numbers, a bit per channel that says which, a bit that says the sign, and the root of m.

Shapes: K KV heads, S tokens, D head size, Dv value head size, n kept of a token, w queries, H query heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vericache_compile.compressors.dense import check_count, is_number
from vericache_compile.compressors.fitted import Fit, Fitted
from vericache_compile.compressors.quantizer import Codes
from vericache_compile.errors import OptionError


class Sparse(NamedTuple):
    """Keys, or values of which some channels are lost (these without signs and m)."""

    numbers: Tensor
    """Kept ones, channels in order: [K, S, n]."""
    kept: Tensor
    """A bit per channel: uint8 [K, S, ceil(D / 8)]."""


@dataclass(frozen=True)
class SparK(Fitted):
    """Keep a fraction of each token's key channels; at least the last `window` tokens stay exact in the tail."""

    name: ClassVar[str] = "spark"
    paper: ClassVar[str] = "arXiv 2508.15212"
    needs: ClassVar[tuple[str, ...]] = ("queries",)

    channels: float = 0.5
    """Fraction of a key's channels that stay, in (0, 1]."""
    value_channels: float = 1.0
    """Fraction of a value's channels that stay, in (0, 1]."""
    window: int = 32
    """Last queries that weigh channels."""
    sinks: int = 0
    refresh: int = field(default=0, kw_only=True, repr=False)
    """Weigh all channels anew after so many tokens; 0: never."""

    def __post_init__(self) -> None:
        check_count("window", self.window, 1, self.name)
        check_count("sinks", self.sinks, 0, self.name)
        check_count("refresh", self.refresh, 0, self.name)
        for option in ("channels", "value_channels"):
            if not is_number(share := getattr(self, option)) or not 0 < share <= 1:
                fix = "give the fraction to keep, in (0, 1]"
                raise OptionError(f"{option}={share!r}", f"compressor {self.name!r}", fix)
        object.__setattr__(self, "residual", self.window)

    @property
    def queries(self) -> int:
        """The window."""
        return self.window

    def fit(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Fit:
        """Norms of query channels [K, 1, D] and variances of value channels [K, 1, Dv], float32.

        Of queries [H, w, D], the last `window` of them, and values [K, S, Dv].
        """
        assert queries is not None, f"{self.name} weighs channels by the last queries: pass them"
        norms = queries[:, -self.window :].float().norm(dim=1)
        grouped = norms.view(keys.shape[0], -1, keys.shape[2]).mean(dim=1, keepdim=True)
        apart = values.float() - values.mean(dim=1, keepdim=True, dtype=torch.float32)
        return grouped, apart.square_().mean(dim=1, keepdim=True)  # `var` takes eight times as long on a CPU

    def encode(self, keys: Tensor, values: Tensor, fit: Fit) -> tuple[Codes, Codes]:
        """Codes of keys [K, S, D] and values [K, S, Dv]."""
        norms, variances = fit
        saliency = keys.float().square() * norms
        held, lost = _keep(keys, saliency, self.channels)
        root = (lost.sum(dim=2) / max(lost.shape[2], 1)).sqrt_()  # m itself may overflow float16
        made = (*held, pack_bits(keys < 0), root.to(keys.dtype))
        if self.value_channels == 1:
            return made, (values.clone(memory_format=torch.contiguous_format),)
        return made, _keep(values, 0.7 * values.float().abs() + 0.3 * variances, self.value_channels)[0]

    def decode(self, keys: Codes, values: Codes, fit: Fit) -> tuple[Tensor, Tensor]:
        """Keys [K, S, D] and values [K, S, Dv] from their codes."""
        numbers, kept, negative, root = keys
        norms, variances = fit
        size = norms.shape[2]
        guess = (root.float().unsqueeze(2) / norms.sqrt()).nan_to_num_(nan=0.0, posinf=0.0)
        signed = torch.where(unpack_bits(negative, size), -guess, guess).to(numbers.dtype)
        read_keys = signed.masked_scatter_(unpack_bits(kept, size), numbers)
        if len(values) == 1:
            return read_keys, values[0]
        held = Sparse(*values)
        shape = (*held.numbers.shape[:2], variances.shape[2])
        return read_keys, held.numbers.new_zeros(shape).masked_scatter_(unpack_bits(held.kept, shape[2]), held.numbers)


def _keep(x: Tensor, saliency: Tensor, share: float) -> tuple[Sparse, Tensor]:
    """What is stored of x [K, S, D], the most salient of each token; and the saliency [K, S, D - n] of the others."""
    count = math.ceil(share * x.shape[2] - 1e-6)  # as `budget`: 0.07 * 100 is a little more than 7 in binary
    lost = saliency.topk(x.shape[2] - count, dim=2, largest=False, sorted=False)
    kept = torch.ones_like(x, dtype=torch.bool).scatter_(2, lost.indices, value=False)
    slots = torch.where(kept, kept.cumsum(dim=2), 0)  # a lost number's slot is one that is not stored
    numbers = x.new_empty(*x.shape[:2], count + 1).scatter_(2, slots, x)[..., 1:]
    return Sparse(numbers.clone(memory_format=torch.contiguous_format), pack_bits(kept)), lost.values


def pack_bits(flags: Tensor) -> Tensor:
    """uint8 [K, S, ceil(D / 8)] of bool [K, S, D], lowest bit first."""
    bits = torch.unflatten(F.pad(flags.float(), (0, -flags.shape[2] % 8)), 2, (-1, 8))
    return (bits @ torch.arange(8, dtype=torch.float32, device=flags.device).exp2()).to(torch.uint8)


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """bool [K, S, D] of uint8 [K, S, ceil(D / 8)]; D = `size`."""
    bits = packed.unsqueeze(3) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    flags: Tensor = bits.flatten(2)[:, :, :size].bool()
    return flags
