"""A decoder in the style of gpt-fast: keys and values lie in buffers of a fixed size, written in place at `input_pos`.

The buffers stay the caller's and hold what plain decoding puts there. As in `plain_pytorch.py`, weights are random.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vericache_compile
from vericache_compile.terminal import format_bytes, print_table


class Attention(nn.Module):
    """Causal self-attention over its own buffers [B, K, C, D]; heads share keys in pairs."""

    keys: Tensor
    values: Tensor

    def __init__(self, width: int, heads: int, batch: int, columns: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, heads // 2
        self.to_qkv = nn.Linear(width, width // heads * (heads + 2 * self.kv_heads), bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        for name in ("keys", "values"):
            room = torch.zeros(batch, self.kv_heads, columns, width // heads)
            self.register_buffer(name, room, persistent=False)

    def forward(self, x: Tensor, input_pos: Tensor, turns: Tensor, seen: Tensor) -> Tensor:
        """x [B, T, width] at columns input_pos [T], turned by turns [T, D / 2, 2]; seen is a mask [1, 1, T, C]."""
        heads = self.to_qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k, v = (each.transpose(1, 2) for each in (turn(q, turns), turn(k, turns), v))
        self.keys[:, :, input_pos] = k
        self.values[:, :, input_pos] = v
        attended = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen, enable_gqa=True)
        made: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return made


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """RoPE: x [B, T, H, D] turned by cosines and sines [T, D / 2, 2]."""
    cos, sin = turns[:, None].unbind(-1)
    one, other = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([one * cos - other * sin, other * cos + one * sin], dim=-1).flatten(-2).to(x.dtype)


class Layer(nn.Module):
    """Attention and a gated feed-forward network, each on a normalised residual."""

    def __init__(self, width: int, heads: int, batch: int, columns: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_feed = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads, batch, columns)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, input_pos: Tensor, turns: Tensor, seen: Tensor) -> Tensor:
        """x [B, T, width]; returns the same shape."""
        x = x + self.attention(self.norm_attention(x), input_pos, turns, seen)
        fed = self.norm_feed(x)
        made: Tensor = x + self.down(F.silu(self.gate(fed)) * self.up(fed))
        return made


class Decoder(nn.Module):
    """A small decoder-only transformer with room for `columns` tokens."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, batch: int, columns: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, batch, columns) for _ in range(layers))
        self.norm, self.to_logits = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.seen = torch.ones(columns, columns, dtype=torch.bool).tril()
        size = width // heads
        angles = torch.arange(columns)[:, None] / 10_000 ** (torch.arange(0, size, 2) / size)
        self.turns = torch.stack([angles.cos(), angles.sin()], dim=-1)

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        """ids [B, T] for the columns input_pos [T] of the buffers; returns logits [B, T, vocabulary]."""
        turns, seen = self.turns[input_pos], self.seen[None, None, input_pos]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, input_pos, turns, seen)
        logits: Tensor = self.to_logits(self.norm(x))
        return logits


@torch.no_grad()
def decode(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """`count` greedy tokens [B, count] after ids [B, T], from column 0 on."""
    input_pos, tokens = torch.arange(ids.shape[1]), []
    for _ in range(count):
        ids = model(ids, input_pos)[:, -1:].argmax(-1)
        tokens.append(ids)
        input_pos = input_pos[-1:] + 1
    return torch.cat(tokens, dim=1)


def main(arguments: list[str] | None = None) -> int:
    """Decode with the plain and with the compiled model; 1 if their tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of the prompt")
    parser.add_argument("--count", type=int, default=64, help="tokens to decode")
    parser.add_argument("--width", type=int, default=256, help="of the residual stream")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    columns = args.tokens + args.count
    model = Decoder(1000, args.width, heads=4, layers=4, batch=1, columns=columns).eval()
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
    print_table("fixed buffers", rows)
    return 0 if torch.equal(ours, plain) else 1


if __name__ == "__main__":
    raise SystemExit(main())
