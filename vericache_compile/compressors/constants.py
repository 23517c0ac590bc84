"""Tensors that follow from a few numbers alone, such as a rotation by its size and seed: no region counts them.

They are made on the CPU whatever the caller's default device is, and kept for good on every device that asked: a
recording of draft steps may not copy one there, and reads it as long as it is replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Concatenate, ParamSpec, cast

import torch
from torch import Tensor

Numbers = ParamSpec("Numbers")


def constant(make: Callable[Numbers, Tensor]) -> Callable[Concatenate[torch.device, Numbers], Tensor]:
    """What `make` gives for the numbers that follow a device, there."""

    @cache
    def find(device: torch.device, *args: Numbers.args, **kwargs: Numbers.kwargs) -> Tensor:
        with torch.inference_mode(False), torch.device("cpu"):
            return make(*args, **kwargs).to(device)

    return cast(Callable[Concatenate[torch.device, Numbers], Tensor], find)
