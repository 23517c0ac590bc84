"""`write_token` in Triton: each row's new key and value where its place says, and nothing else touched."""

from __future__ import annotations

import pytest
import torch

from vericache_compile.kernels.write_token import write_token, write_token_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "value_size"), [(16, 16), (20, 40)])
def test_each_row_is_written_at_its_own_place(
    dtype: torch.dtype, size: int, value_size: int, device: torch.device
) -> None:
    draw = torch.Generator().manual_seed(0)
    keys, values, k, v = (
        torch.randn(2, 3, slots, width, generator=draw).to(device, dtype)
        for slots, width in ((9, size), (9, value_size), (1, size), (1, value_size))
    )
    places = torch.tensor([8, 0], device=device)
    expected = keys.clone(), values.clone()
    write_token_reference(*expected, k, v, places)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)  # as a projection gives it
    write_token(keys, values, k, v, places)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


def test_values_that_are_a_part_of_the_keys_are_written_once(device: torch.device) -> None:
    keys, k = torch.zeros(1, 1, 4, 24, device=device), torch.randn(1, 1, 1, 24, device=device)
    write_token(keys, keys[..., :16], k, k[..., :16], torch.tensor([2], device=device))
    assert torch.equal(keys[0, 0, 2], k[0, 0, 0])
    assert not keys[0, 0, [0, 1, 3]].any()
