"""Where the Triton kernels run, and the sizes they are launched with. Triton is imported by the first launch.

A CUDA build of torch brings triton; a CPU needs none. VERICACHE_KERNELS=0 leaves everything to torch's kernels.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

DEVICE = "cuda"
"""The type of device that kernels are launched on."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST = 16
"""The smallest side of a tile that a matrix product takes."""


def serves(tensor: Tensor) -> bool:
    """Whether the kernels are for tensors like this one, and there."""
    return takes(tensor.device, tensor.dtype)


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are for tensors of a device and a type, and there."""
    return device.type == DEVICE and dtype in TYPES and installed()


@cache
def installed() -> bool:
    """Whether triton can be imported; said once where it cannot."""
    if os.environ.get("VERICACHE_KERNELS") == "0":
        return False
    if importlib.util.find_spec("triton") is not None:
        return True
    log.warning(
        "vericache: no kernels of its own on this device: triton is not installed\n  where: %s\n  fix: %s",
        __name__,
        "pip install triton, which a CUDA build of torch brings; until then torch's kernels run, and what verify gives "
        "may differ in the last bits from place to place in a window",
    )
    return False


def pad_size(size: int) -> int:
    """The extent of a tile that holds `size` numbers: a power of two, 16 or more."""
    return max(LEAST, 1 << (size - 1).bit_length())
