"""Page-locked host memory of exactly the size asked for, which a GPU copies from and to without the host's help."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


def pinned_empty(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (numel,) on the host, page-locked for as long as the tensor or a view of it is there.

    `torch.empty(pin_memory=True)` takes the next power of two of bytes.

    Raises:
        torch.cuda.CudaError: the driver locks no more memory.
    """
    tensor = torch.empty(numel, dtype=dtype)
    if numel == 0:
        return tensor
    tensor.zero_()  # touches the pages with all cores; the driver would with one
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(tensor.data_ptr(), numel * tensor.element_size(), 0)))
    weakref.finalize(tensor, runtime.cudaHostUnregister, tensor.data_ptr())
    return tensor
