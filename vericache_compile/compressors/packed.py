"""How packed keys and values are handed to a kernel that dequantises them as it reads them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PackedSide(NamedTuple):
    """Keys or values of a region as a kernel can read them: x = code * scale, plus zero where there is one."""

    codes: Tensor
    """As `quantizer.pack` lays them, or of 8 bits [K, S, D]; contiguous, as the others are."""
    scale: Tensor
    """[K, S, D / channels], or, `channels` being 0, [K, S / group, D]."""
    zero: Tensor | None
    """Shaped as the scale."""
    tokens: int
    """Of S, the room that the tensors have, those that are held, the first ones."""
    size: int
    """D."""
    bits: int
    group: int
    """Tokens that are packed together (g)."""
    channels: int
    """Channels of a token that share a scale; 0 where the tokens of a group share a channel's."""

    @property
    def room(self) -> int:
        """S."""
        return self.codes.shape[1] * self.group

    @property
    def zero_or_scale(self) -> Tensor:
        """Some tensor to point to, where there is no zero."""
        return self.scale if self.zero is None else self.zero
