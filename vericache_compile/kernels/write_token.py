"""One new key and value per row and head written to its place in a buffer, in Triton: one launch, places on the device.

Shapes: B batch, K KV heads, S slots, D head size, E value head size.
"""

from __future__ import annotations

from torch import Tensor

from vericache_compile.kernels.launch import on, pad_size


def write_token(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, places: Tensor) -> None:
    """Write k [B, K, 1, D] to keys [B, K, S, D], and v [B, K, 1, E] to values [B, K, S, E], at slot places[b] of row b.

    Innermost strides are 1; places [B] are whole numbers on the device. Where values are a part of the keys, as in a
    latent cache, v is that part of k.
    """
    from vericache_compile.kernels import write_token_triton as programs

    assert keys.stride(-1) == values.stride(-1) == 1, "numbers of a key, and of a value, lie side by side"
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, heads, _, size = k.shape
    widest = pad_size(max(size, v.shape[3]))
    with on(k):
        programs.write_token[(heads, batch)](
            keys, values, k, v, places, *keys.stride()[:3], *values.stride()[:3], *k.stride()[:2], *v.stride()[:2],
            SIZE=size, VALUE=v.shape[3], PAD=widest, num_warps=1,
        )  # fmt: skip


def write_token_reference(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, places: Tensor) -> None:
    """The same by indexing, row by row."""
    for b, place in enumerate(places.tolist()):
        keys[b, :, place], values[b, :, place] = k[b, :, 0], v[b, :, 0]
