"""How much the last queries attend to each token: the score of every method that asks attention.

Shapes: H query heads, K KV heads, G = H / K, S tokens, D head size, w queries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_attention(keys: Tensor, queries: Tensor, unscored: int = 0) -> Tensor:
    """Attention [K, S - unscored], in float32, that queries [H, w, D] pay to keys [K, S, D]: the mean of G and w.

    Scale is 1 / sqrt(D); query head h belongs to KV head h // G. With `unscored` = 0 the queries come after
    all the keys. Otherwise they are those of the last w <= unscored tokens: causal among these, and the last
    `unscored` keys take their share of the softmax but get no score.
    """
    kv_heads, size = keys.shape[0], keys.shape[2]
    rows = queries.shape[1]
    assert rows > 0, "attention needs at least one query"
    assert queries.shape[0] % kv_heads == 0, "query heads must share the KV heads evenly"
    assert unscored == 0 or rows <= unscored < keys.shape[1], "queries must lie among the unscored tokens"
    grouped = queries.reshape(kv_heads, -1, rows, size)
    future = torch.ones(rows, rows, dtype=torch.bool, device=keys.device).triu(1)
    scores = []
    for head_keys, head_queries in zip(keys, grouped, strict=True):  # one at a time: the logits are [G, w, S]
        logits = head_queries.float() * size**-0.5 @ head_keys.float().T
        if unscored:
            logits[..., -rows:].masked_fill_(future, float("-inf"))
        attention = logits.softmax(dim=-1)
        scores.append(attention[..., : keys.shape[1] - unscored].mean(dim=(0, 1)))
    return torch.stack(scores)
