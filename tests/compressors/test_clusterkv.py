"""ClusterKV: k-means by direction, and the clusters that a query reads until its budget is used up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.clusterkv import ClusteredKV, ClusterKV
from vericache_compile.compressors.facts import Facts, reader_of
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def naive_choice(region: ClusteredKV, query: Tensor, sinks: int) -> list[list[int]]:
    """Sinks, then the tokens of cluster after cluster by the mean product with the query, cut at the budget."""
    centroids, cluster = region.index
    out = []
    for head in range(centroids.shape[0]):
        group = query.shape[0] // centroids.shape[0]
        own = query[head * group : (head + 1) * group]
        products = [float(sum(q @ c for q in own) / group) for c in centroids[head]]
        chosen = list(range(sinks))
        for number in sorted(range(len(products)), key=lambda n: -products[n]):
            chosen += [j for j in range(sinks, region.covered) if int(cluster[head, j]) == number]
        out.append(sorted(chosen[: region.slots]))
    return out


def naive_cluster(points: Tensor, centroids: Sequence[Tensor]) -> list[int]:
    """For each of points [S, D] which centroid [D] points most its way."""
    return [
        max(range(len(centroids)), key=lambda n: float(torch.cosine_similarity(p, centroids[n], 0))) for p in points
    ]


def naive_means(points: Tensor, count: int, iterations: int) -> Tensor:
    """Centroids [N, D] of points [S, D] from evenly spaced starts."""
    centroids = [points[i * len(points) // count] for i in range(count)]
    for _ in range(iterations):
        own = naive_cluster(points, centroids)
        for n in range(count):
            members = [p for p, o in zip(points, own, strict=True) if o == n]
            centroids[n] = torch.stack(members).mean(0) if members else centroids[n]
    return torch.stack(centroids)


def test_centroids_equal_the_naive_loops(random_row: Row) -> None:
    keys, _, _ = random_row(60)
    centroids, cluster = ClusterKV(tokens=10, iterations=4).cluster(keys, 8)
    for head in range(2):
        expected = naive_means(keys[head, 8:], 5, 4)
        torch.testing.assert_close(centroids[head], expected, atol=1e-5, rtol=1e-5)
        assert cluster[head, 8:].tolist() == naive_cluster(keys[head, 8:], list(expected))


def test_a_step_reads_clusters_in_the_order_of_its_query(random_row: Row) -> None:
    keys, values, queries = random_row(90)
    region = ClusterKV(keep=0.4, tokens=9, sinks=4).compress(keys, values, queries)
    assert (region.covered, region.slots) == (90, 36)
    for query in queries.unbind(1):
        expected = naive_choice(region, query, 4)
        read = region.select(query)
        for head in range(2):
            assert torch.equal(read[0][head], keys[head, expected[head]])
            assert torch.equal(read[1][head], values[head, expected[head]])


def test_keys_that_point_one_way_are_found_together() -> None:
    generator = torch.Generator().manual_seed(0)
    ways = torch.nn.functional.normalize(torch.randn(4, 32, generator=generator), dim=1)
    own = torch.randint(4, (1, 200), generator=generator)
    own[0, :: 200 // 4] = torch.arange(4)  # each start in a cluster of its own
    keys = (ways[own] + 0.05 * torch.randn(1, 200, 32, generator=generator)) * 7
    region = ClusterKV(keep=0.1, tokens=50, sinks=0).compress(keys, keys, ways[:1, None])
    assert set(own[0, region.choose(ways[2:3])[0]].tolist()) == {2}


def test_tokens_that_join_form_clusters_of_their_own(random_row: Row) -> None:
    keys, values, queries = random_row(200)
    facts = Facts(read=reader_of(keys, values))
    method = ClusterKV(tokens=20, sinks=4).knowing(facts)
    region = method.compress(keys[:, :104], values[:, :104], queries)
    longer = region.knowing(facts).extend(keys[:, 104:], values[:, 104:], queries)
    assert [x.shape[1] for x in longer.index] == [5 + 4, 200]
    for head in range(2):
        own = naive_cluster(keys[head, 104:], list(longer.index[0][head, 5:]))
        assert longer.index[1][head, 104:].tolist() == [5 + n for n in own]
    assert longer.nbytes == (2 * 9 * 16 + 2 * 200 + 4 * 16) * 4
    expected = naive_choice(longer, queries[:, 3], 4)
    for head in range(2):
        assert torch.equal(longer.select(queries[:, 3])[0][head], keys[head, expected[head]])


@pytest.mark.parametrize("tokens", [0, 1, 16, 17])
def test_short_rows(random_row: Row, tokens: int) -> None:
    keys, values, queries = random_row(tokens)
    region = ClusterKV(keep=1.0).compress(keys, values, queries)
    assert torch.equal(region.materialize()[0], keys)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"sinks": -1}, {"whole": -1}, {"iterations": -1}, {"keep": 2}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        ClusterKV(**wrong)
