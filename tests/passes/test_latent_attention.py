"""Keys and values that are made anew from a cached latent are read, however they are put together, and windows over
the latent give the rows of single steps; what is made in any other way is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Toy, calls_of, run_until, run_variant, take_steps, toy_decode
from torch import Tensor, nn

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.plan import Output


class Latent(Toy):
    """Caches a latent and the part of the keys that all heads share; tests override how both are put together."""

    kv_heads, own = 1, 5
    """Numbers of a head's key that come from the latent."""

    def __init__(self) -> None:
        super().__init__()
        width, each = self.heads * self.size, self.own + self.size
        self.to_q = nn.Linear(width, self.heads * each)
        self.to_both = nn.Linear(self.size, self.heads * each, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return q, *self.to_kv(x).unflatten(-1, (2, self.size)).transpose(1, 2).split(1, dim=1)

    def split(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Of each head what the latent gives of its keys [B, H, C, own], and its values [B, H, C, size]."""
        both = self.to_both(latent).view(latent.shape[0], latent.shape[2], self.heads, -1).transpose(1, 2)
        return torch.split(both, [self.own, self.size], dim=-1)

    def join(self, own: Tensor, rotated: Tensor) -> Tensor:
        """Keys [B, H, C, own + size]."""
        return torch.cat([own, rotated.expand(-1, self.heads, -1, -1)], dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        own, values = self.split(k)
        return F.scaled_dot_product_attention(q, self.join(own, v), values)


class Copied(Latent):
    """Keys are copied into an empty tensor, part by part."""

    def join(self, own: Tensor, rotated: Tensor) -> Tensor:
        keys = own.new_empty(*own.shape[:-1], self.own + self.size)
        keys[..., : self.own].copy_(own)
        keys[..., self.own :] = rotated
        return keys


class Spelled(Copied):
    """Softmax by hand."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        own, values = self.split(k)
        return (q @ self.join(own, v).transpose(-1, -2) * 0.3).softmax(-1) @ values


class Reversed(Latent):
    """The caller's first cache tensor holds what all heads share, the second the latent."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return super().attend(q, v, k)


TAKEN = [Latent, Copied, Spelled, Reversed]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", TAKEN)
def test_a_window_gives_the_rows_of_single_steps(model: type[Latent], batch: int) -> None:
    call = toy_decode(model(), batch=batch)
    program = run_until(call, "expand_window", batch=batch, window=4)
    steps = take_steps(program, call, 4)
    [made] = run_variant(program, "verify", call, steps, 4)
    expected = torch.stack([row for (row,) in steps.rows])
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    [token] = run_variant(program, "draft", call, steps, 0)
    assert torch.equal(token, expected[0].argmax(-1))


@pytest.mark.parametrize("model", TAKEN)
def test_a_site_is_one_key_for_all_heads(model: type[Latent]) -> None:
    program = run_until(toy_decode(model()), "find_attention")
    [nodes] = program.sites
    site = nodes.site
    assert (site.latent, site.heads, site.kv_heads, site.head_size, site.value_size) == (True, 4, 1, 16, 8)
    assert site.scale == pytest.approx(0.3 if model is Spelled else 13**-0.5), "that of the queries as they are"
    assert (site.cached_sizes, site.bytes_per_token) == ((8, 8), 64)
    kinds = [role.kind for role in program.outputs]
    assert kinds == [Output.LOGITS, *([Output.KEYS, Output.VALUES][:: -1 if model is Reversed else 1])]


def test_variants_make_no_keys_of_the_cache() -> None:
    program = run_until(toy_decode(Copied()), "split_modes")
    for variant in program.variants.values():
        calls = calls_of(variant)
        assert not {"new_empty", "copy_", "setitem", "view"} & set(calls)
        assert [name for name in calls if name in ("absorb", "expand", "attend.default")] == [
            "absorb", "attend.default", "expand",
        ]  # fmt: skip
    assert "copy_" in calls_of(program.captured), "what runs as captured does"


class Swapped(Latent):
    """The shared part comes first, where queries have it last."""

    def join(self, own: Tensor, rotated: Tensor) -> Tensor:
        return torch.cat([rotated.expand(-1, self.heads, -1, -1), own], dim=-1)


class Unfinished(Copied):
    """One of the keys' numbers is written over."""

    def join(self, own: Tensor, rotated: Tensor) -> Tensor:
        keys = super().join(own, rotated)
        keys[..., 0] = 1
        return keys


class Negative(Latent):
    """Values change on the way."""

    def split(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        own, values = super().split(latent)
        return own, -values


class Biased(Latent):
    def __init__(self) -> None:
        super().__init__()
        self.to_both = nn.Linear(self.size, self.heads * (self.own + self.size))


class Normed(Latent):
    """What is cached is not yet the latent."""

    def split(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        return super().split(latent * 2)


COMPUTED = "keys or values computed anew from what is cached, otherwise than of a latent by one weight"
REFUSED = [
    (Swapped, COMPUTED),
    (Negative, COMPUTED),
    (Biased, COMPUTED),
    (Normed, COMPUTED),
    (Unfinished, "a cache that is updated in place"),
]


@pytest.mark.parametrize(("model", "found"), REFUSED)
def test_what_is_made_in_any_other_way_is_refused(model: type[Latent], found: str) -> None:
    with pytest.raises(UnsupportedGraph) as error:
        run_until(toy_decode(model()), "find_attention")
    assert error.value.found.startswith(found)
    assert "test_latent_attention.py" in error.value.where
