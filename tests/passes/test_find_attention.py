"""Sites are found however a model repeats its heads, and nothing else passes for one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from graphs import Toy, capture, node_named, run_until, tiny_decode, toy_decode
from torch import Tensor

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.plan import Output, OutputRole, Site

ROWS, LOGITS = OutputRole(Output.ROWS), OutputRole(Output.LOGITS)


def test_a_site_is_an_append_and_an_attention() -> None:
    program = run_until(toy_decode(Toy()), "find_attention")
    inputs = {node.name: i for i, node in enumerate(program.placeholders)}
    [nodes] = program.sites
    assert nodes.site == Site(
        layer=0,
        heads=4,
        kv_heads=2,
        head_size=8,
        value_size=8,
        scale=1 / math.sqrt(8),
        dtype=torch.float32,
        past=(inputs["l_k_"], inputs["l_v_"]),
    )
    assert nodes.attention is node_named(program.module, "scaled_dot_product_attention")
    appends = [node.args[0] for node in (nodes.attention.args[1], nodes.attention.args[2])]
    assert appends == [
        [program.placeholders[inputs["l_k_"]], nodes.key],
        [program.placeholders[inputs["l_v_"]], nodes.value],
    ]
    assert program.outputs == [LOGITS, OutputRole(Output.KEYS, 0), OutputRole(Output.VALUES, 0)]


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "batch"),
    [
        ("llama", 4, 2, 1),
        ("gpt2", 4, 4, 3),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("llama", 4, 2, 3), ("qwen3", 4, 2, 1))),
    ],
)
def test_every_layer_of_a_model_is_a_site(name: str, heads: int, kv_heads: int, batch: int) -> None:
    program = run_until(tiny_decode(name, batch), "find_attention", batch=batch)
    sites = [nodes.site for nodes in program.sites]
    assert [(s.layer, s.heads, s.kv_heads, s.head_size) for s in sites] == [(i, heads, kv_heads, 16) for i in range(3)]
    assert len({i for site in sites for i in site.past or ()}) == 6
    assert len({nodes.mask is None for nodes in program.sites}) == 1
    assert batch == 1 or program.sites[0].mask is not None
    kinds = [(role.kind, role.layer) for role in program.outputs if role.kind is not Output.LOGITS]
    assert sorted(kinds) == sorted((kind, i) for i in range(3) for kind in (Output.KEYS, Output.VALUES))


class Expanded(Toy):
    """repeat_kv, as transformers spells it."""

    def repeat(self, x: Tensor) -> Tensor:
        batch, heads, columns, size = x.shape
        return x[:, :, None].expand(batch, heads, 2, columns, size).reshape(batch, 2 * heads, columns, size)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v))


class Interleaved(Expanded):
    """Heads repeated by a library call."""

    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=1)


class Tiled(Expanded):
    """All heads, then all heads again: query heads read other keys than with repeat_kv."""

    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat(1, 2, 1, 1)


class Rolled(Expanded):
    """The second copy of each head comes from its neighbour's."""

    def repeat(self, x: Tensor) -> Tensor:
        return x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)[:, [0, 2, 1, 3]]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", [Toy, Expanded, Interleaved])
def test_heads_repeated_in_place_are_one_site(model: type[Toy], batch: int, dynamic: bool) -> None:
    program = run_until(toy_decode(model(), batch=batch, dynamic=dynamic), "find_attention", batch=batch)
    assert [(nodes.site.heads, nodes.site.kv_heads) for nodes in program.sites] == [(4, 2)]


@pytest.mark.parametrize("model", [Tiled, Rolled])
def test_other_repetitions_are_refused(model: type[Toy]) -> None:
    with pytest.raises(UnsupportedGraph, match="keys or values change between cache and attention"):
        run_until(toy_decode(model()), "find_attention")


def test_a_prefill_has_sites_without_a_past() -> None:
    class First(Toy):
        def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
            empty = torch.zeros(1, 2, 0, 8)
            return super().forward(ids, empty, empty)

        def append(self, past: Tensor, new: Tensor) -> Tensor:
            return new

    [call] = capture(First(), lambda model: model(torch.randint(29, (1, 5))))
    program = run_until(call, "split_captured")
    assert program.sites[0].site.past is None


class Dropped(Toy):
    """Drops attention weights."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, enable_gqa=True)


class Causal(Toy):
    """Lets one token see the first column only."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Flat(Toy):
    """Attends with one head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        flat = (x.flatten(0, 1)[:2] for x in (q, k, v))
        return F.scaled_dot_product_attention(*flat)[None].repeat(1, 2, 1, 1)


class Doubled(Toy):
    """Attends to twice the cached keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, 2 * k, v, enable_gqa=True)


class Kept(Toy):
    """Returns no keys."""

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        logits, _, v = super().forward(ids, k, v)
        return logits, v


class Front(Toy):
    """Puts new keys before the cached ones."""

    def append(self, past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new, past], dim=-2)


class Sinks(Toy):
    """Appends to three parts."""

    def append(self, past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([past[:, :, :2], past[:, :, 2:], new], dim=-2)


class Static(Toy):
    """Writes into a cache of fixed size."""

    def append(self, past: Tensor, new: Tensor) -> Tensor:
        return past.index_copy(2, torch.tensor([3]), new)


class Shared(Toy):
    """Attends twice over one cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        once = super().attend(q, k, v)
        return once + F.scaled_dot_product_attention(q + 1, k, v, enable_gqa=True)


class Quiet(Toy):
    """Returns no logits."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return x.sum()


class Counting(Toy):
    """Returns another integer than the new length beside the tensors."""

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        return *super().forward(ids, k, v), k.shape[2] + self.ahead

    ahead = 2


class Counted(Counting):
    """Returns the new length."""

    ahead = 1


def test_a_returned_length_is_known() -> None:
    program = run_until(toy_decode(Counted()), "find_attention")
    [length] = program.found_roles.lengths
    assert program.outputs[-1] == OutputRole(Output.LENGTH, source=length)


class Newest(Toy):
    """A sliding layer: returns the newest columns, attends to all that it was given."""

    last = 5

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        logits, keys, values = super().forward(ids, k, v)
        return logits, keys[:, :, -self.last :], values[:, :, -self.last :]


class NewestRead(Toy):
    """A sliding layer that can be cropped: returns all, attends to the newest columns."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return super().attend(q, k[:, :, -6:], v[:, :, -6:])


@pytest.mark.parametrize(("model", "kept"), [(Newest, 5), (NewestRead, None)])
def test_a_cache_cut_to_its_newest_columns_is_a_sliding_layer(model: type[Toy], kept: int | None) -> None:
    program = run_until(toy_decode(model(), columns=5, dynamic=False), "find_attention")
    [nodes] = program.sites
    assert (nodes.site.recent, nodes.site.kept) == (5, kept)
    assert [role.kind for role in program.outputs] == [Output.LOGITS, Output.KEYS, Output.VALUES]


class Lopsided(Newest):
    """Cuts keys and values to different columns."""

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        logits, keys, values = Toy.forward(self, ids, k, v)
        return logits, keys[:, :, -4:], values[:, :, -5:]


COMPUTED = "keys or values computed anew from what is cached, otherwise than of a latent by one weight"
NOT_RETURNED = "attention over keys or values that are not returned"
REFUSED = [
    (Dropped, "attention with dropout", "dropout_p=0.1"),
    (Causal, "is_causal=True over a filled cache", "is_causal=True"),
    (Flat, "an attention that is not [batch, heads, tokens, size]", "scaled_dot_product_attention(*flat)"),
    (Doubled, COMPUTED, "2 * k"),
    (Kept, NOT_RETURNED, "scaled_dot_product_attention(q, k, v"),
    (Front, "an append to something other than the cache", "torch.cat([new, past]"),
    (Sinks, "an append that is not cat([past, new], -2)", "torch.cat([past[:, :, :2]"),
    (Static, "a cache that is updated in place", "index_copy"),
    (Shared, "two uses of one cache tensor", "q + 1"),
    (Quiet, "no logits [batch, tokens, vocabulary] among the outputs", "output"),
    (Counting, "an output that is not a tensor", "output"),
    (Lopsided, "keys cut to other columns than values", "scaled_dot_product_attention(q, k, v"),
]


@pytest.mark.parametrize(("model", "found", "line"), REFUSED)
def test_a_graph_is_refused_with_its_reason_and_source_line(model: type[Toy], found: str, line: str) -> None:
    with pytest.raises(UnsupportedGraph) as error:
        run_until(toy_decode(model()), "find_attention")
    assert error.value.found == found
    assert line in error.value.where
