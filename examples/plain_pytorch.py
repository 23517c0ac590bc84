"""A decoder of your own in plain PyTorch, and its own decoding loop: one `torch.compile`, the same tokens.

The model is given the past keys and values and returns them grown by this call's; that is all that a model has to do.
Weights are random: what is shown is how it is written, not what it says.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vericache_compile
from vericache_compile.terminal import format_bytes, print_table

Cache = list[tuple[Tensor, Tensor]]
"""Per layer keys and values [B, H, S, D]."""


class Attention(nn.Module):
    """Causal self-attention over a cache that it appends to."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, T, width]; returns the same shape, and the grown cache."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.to_out(seen.transpose(1, 2).flatten(2)), (k, v)


class Layer(nn.Module):
    """Attention and a gated feed-forward network, each on a normalised residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_feed = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, T, width]; returns the same shape, and the grown cache."""
        attended, grown = self.attention(self.norm_attention(x), past)
        x = x + attended
        fed = self.norm_feed(x)
        return x + self.down(F.silu(self.gate(fed)) * self.up(fed)), grown


class Decoder(nn.Module):
    """A small decoder-only transformer with learned positions."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, places: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(places, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.to_logits = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """ids [B, T] that follow the cache; returns logits [B, T, vocabulary] and the grown cache."""
        begin = 0 if cache is None else cache[0][0].shape[2]
        positions = torch.arange(begin, begin + ids.shape[1], device=ids.device)
        x = self.embed(ids) + self.place(positions)[None]
        grown: Cache = []
        for i, layer in enumerate(self.layers):
            x, held = layer(x, None if cache is None else cache[i])
            grown.append(held)
        return self.to_logits(self.norm(x)), grown


@torch.no_grad()
def decode(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """`count` greedy tokens [B, count] after ids [B, T]."""
    cache, tokens = None, []
    for _ in range(count):
        logits, cache = model(ids, cache)
        ids = logits[:, -1:].argmax(-1)
        tokens.append(ids)
    return torch.cat(tokens, dim=1)


def main(arguments: list[str] | None = None) -> int:
    """Decode with the plain and with the compiled model; 1 if their tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of the prompt")
    parser.add_argument("--count", type=int, default=64, help="tokens to decode")
    parser.add_argument("--width", type=int, default=256, help="of the residual stream")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = Decoder(1000, args.width, heads=4, layers=4, places=args.tokens + args.count).eval()
    prompt = torch.randint(1000, (1, args.tokens))
    plain = decode(model, prompt, args.count)

    model.compile(backend="vericache", options={"compressor": "snapkv", "keep": 0.25})
    began = time.perf_counter()
    ours = decode(model, prompt, args.count)
    found = vericache_compile.stats(model)
    rows = {
        "tokens identical to the plain model's": "yes" if torch.equal(ours, plain) else "NO",
        "tokens per round": f"{found['tokens_per_round']:.1f}",
        "KV bytes, draft": format_bytes(found["bytes"]["draft"]),
        "KV bytes, full": format_bytes(found["bytes"]["full"]),
        "seconds, with compiling": f"{time.perf_counter() - began:.1f}",
    }
    print_table("plain PyTorch", rows)
    return 0 if torch.equal(ours, plain) else 1


if __name__ == "__main__":
    raise SystemExit(main())
