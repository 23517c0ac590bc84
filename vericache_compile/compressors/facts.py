"""What the runtime can tell a method beside keys, values and the last queries; each fact only where a method needs it.

Shapes: K KV heads, S tokens handed over, n columns, D head size, Dv value head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from vericache_compile.compressors.rotation import Rotation

Read = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Tokens of the row [K, n], counted from its first real one -> their keys [K, n, D] and values [K, n, Dv]."""


def reader_of(keys: Tensor, values: Tensor) -> Read:
    """Reads tokens of keys [K, S, D] and values [K, S, Dv]."""

    def read(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return take_tokens(keys, tokens), take_tokens(values, tokens)

    return read


def take_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens `indices` [K, N] of x [K, S, D], as an owned copy [K, N, D]."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), indices]  # take_along_dim takes six times as long


@dataclass(frozen=True)
class Facts:
    """Of one row of one site. A fact that nobody asked for, or that nobody knows, is None."""

    layer: int = 0
    token: int = 0
    """Which token of the row is the first that is handed over, counted from its first real one."""
    position: int = 0
    """That token's position."""
    end: int = 0
    """The position after the newest token: the last queries' positions end before it."""
    rotation: Rotation | None = None
    """`pre_rope`: how positions turned the keys; None where nothing turned them."""
    attention: Tensor | None = None
    """`attention`: [K, S], float32, the attention that each token has drawn so far, summed over queries and heads."""
    repeated: Tensor | None = None
    """`repeated`: [K, S], float32, the most attention that each token drew while the model repeated its context."""
    everywhere: tuple[Tensor, ...] = ()
    """`repeated` of every site of the row that has the same method, this one's too."""
    read: Read | None = None
    """`read`: reads the full KV, during draft too."""
    ids: Sequence[int] | None = None
    """`ids`: [S], the tokens that are handed over, as the tokenizer numbers them."""
    shared: dict[object, Tensor] | None = None
    """`shared`: what sites of one row leave for later ones, in one compression."""

    @property
    def lasting(self) -> Facts:
        """What a region may go on knowing: where its tokens stood and how their keys were turned, but no numbers of
        theirs, which would live as long as it does."""
        return Facts(self.layer, self.token, self.position, self.end, self.rotation)


NOTHING: Final = Facts()
KINDS: Final = frozenset({"pre_rope", "attention", "repeated", "read", "ids", "shared"})
"""What a method's `needs` can name of these."""
