"""One Triton launch for Adam over any number of tensors in any mix of fp32, bf16 and fp16.

Imported only where there is something for it to do: a CPU build of torch comes without Triton.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from .adam_kernels import AdamSettings, AdamTensors, Row

# Elements of one program: large tensors are cut into this many, each a row of the table.
CHUNK_NUMEL = 1 << 16
BLOCK_NUMEL = 1024
# Bytes; with less the compiler must load element by element.
ALIGNMENT = 16
# Batches of tensors whose launches are kept. Updates in the backward pass of 13b are 400.
MAX_KEPT = 512
# A row of the table: the addresses of gradient, parameter, moments and copy (0: none), and the elements left.
COLUMNS = 6

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def adam_kernel(  # type: ignore[no-untyped-def]
    table,
    step_size,
    decay,
    l2,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    inverse_root_correction2,
    div_scale,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    COPY: tl.constexpr,
    SCALED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update the chunk of row `program_id` of `table`: five addresses and the number of elements from there on.

    The fifth, where COPY is a dtype, gets the updated parameter in that dtype. `div_scale` is the address of the
    gradients' divisor, read where SCALED.
    """
    row = table + tl.program_id(0).to(tl.int64) * 6
    grads = tl.load(row).to(tl.pointer_type(GRAD))
    params = tl.load(row + 1).to(tl.pointer_type(PARAM))
    firsts = tl.load(row + 2).to(tl.pointer_type(FIRST))
    seconds = tl.load(row + 3).to(tl.pointer_type(SECOND))
    if COPY is not None:
        copies = tl.load(row + 4).to(tl.pointer_type(COPY))
    if ALIGNED:
        grads = tl.multiple_of(grads, 16)
        params = tl.multiple_of(params, 16)
        firsts = tl.multiple_of(firsts, 16)
        seconds = tl.multiple_of(seconds, 16)
        if COPY is not None:
            copies = tl.multiple_of(copies, 16)
    inverse_scale = 1.0
    if SCALED:
        inverse_scale = 1.0 / tl.load(div_scale)
    end = tl.minimum(tl.load(row + 5), CHUNK).to(tl.int32)
    # Only unmasked blocks are loaded and stored 16 bytes at a time.
    whole = end - end % BLOCK
    for start in range(0, whole + BLOCK, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        if start < whole:
            grad = tl.load(grads + offset)
            param = tl.load(params + offset)
            first = tl.load(firsts + offset)
            second = tl.load(seconds + offset)
        else:
            mask = offset < end
            grad = tl.load(grads + offset, mask=mask)
            param = tl.load(params + offset, mask=mask)
            first = tl.load(firsts + offset, mask=mask)
            second = tl.load(seconds + offset, mask=mask)
        param32 = param.to(tl.float32)
        grad32 = grad.to(tl.float32) * inverse_scale + l2 * param32
        first32 = beta1 * first.to(tl.float32) + one_minus_beta1 * grad32
        second32 = beta2 * second.to(tl.float32) + one_minus_beta2 * grad32 * grad32
        param32 = param32 * decay - step_size * first32 / (tl.sqrt(second32) * inverse_root_correction2 + eps)
        if start < whole:
            tl.store(params + offset, param32.to(PARAM))
            tl.store(firsts + offset, first32.to(FIRST))
            tl.store(seconds + offset, second32.to(SECOND))
            if COPY is not None:
                tl.store(copies + offset, param32.to(COPY))
        else:
            mask = offset < end
            tl.store(params + offset, param32.to(PARAM), mask=mask)
            tl.store(firsts + offset, first32.to(FIRST), mask=mask)
            tl.store(seconds + offset, second32.to(SECOND), mask=mask)
            if COPY is not None:
                tl.store(copies + offset, param32.to(COPY), mask=mask)


@dataclass(frozen=True)
class Launch:
    """What the kernel is told of tensors of the same dtypes.

    Args:
        table: `chunk_table`, on the device.
        kinds: Triton's dtypes of the five columns, the last None without copies.
        aligned: whether every address is a multiple of ALIGNMENT.
    """

    table: torch.Tensor
    kinds: tuple[Any, ...]
    aligned: bool

    def run(self, settings: AdamSettings) -> None:
        device = self.table.device
        with _on(device):
            adam_kernel[(len(self.table),)](
                self.table,
                *kernel_scalars(settings),
                settings.divisor(device) if settings.scales_gradients else self.table,  # then not read
                *self.kinds,
                SCALED=settings.scales_gradients,
                ALIGNED=self.aligned,
                CHUNK=CHUNK_NUMEL,
                BLOCK=BLOCK_NUMEL,
            )


class TritonAdam:
    """Updates any number of tensors, on one stream; launches are kept for tensors that stay where they are."""

    def __init__(self) -> None:
        # Last layout and launches of each batch of tensors, by the address of its first parameter.
        self._kept: dict[int, tuple[list[Any], list[Launch]]] = {}

    def update(self, tensors: AdamTensors, settings: AdamSettings) -> None:
        """Update CUDA parameters and states in place; gradients are not modified. Does not block on the device.

        One launch for each combination of dtypes and alignment: one or two in training.
        """
        layout, first = layout_of(tensors), tensors.params[0].data_ptr()
        kept, launches = self._kept.get(first, (None, []))
        if layout != kept:
            launches = launches_of(tensors)
            if first not in self._kept and len(self._kept) == MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[first] = layout, launches
        for launch in launches:
            launch.run(settings)


def layout_of(tensors: AdamTensors) -> list[Any]:
    """Return all that launches depend on: where each tensor is, how large, of which dtype, and whether it has gaps."""
    every = [tensor for column in tensors.columns for tensor in column]
    return [
        [tensor.data_ptr() for tensor in every],
        [tensor.dtype for tensor in every],
        [tensor.is_contiguous() for tensor in every],
        [param.numel() for param in tensors.params],
        tensors.params[0].device,
    ]


def launches_of(tensors: AdamTensors) -> list[Launch]:
    """Return the launches that update these tensors.

    Raises:
        ValueError: a tensor has gaps or another dtype.
    """
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in tensors.rows():
        groups[_key(row)].append(row)
    launches = []
    for (device, dtypes, aligned), rows in groups.items():
        # Pinned, so that the copy does not wait for the backward pass.
        host = torch.from_numpy(chunk_table(rows))
        table = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
        kinds = [TRITON_DTYPES[dtype] for dtype in dtypes]
        launches.append(Launch(table, (*kinds, *[None] * (5 - len(kinds))), aligned))
    return launches


def _key(row: Row) -> tuple[torch.device, tuple[torch.dtype, ...], bool]:
    """Return what a launch needs in common.

    Raises:
        ValueError: a tensor has gaps or another dtype.
    """
    dtypes = tuple(tensor.dtype for tensor in row)
    if not all(tensor.is_contiguous() for tensor in row) or not set(dtypes) <= TRITON_DTYPES.keys():
        raise ValueError(f"Adam needs contiguous fp32, bf16 or fp16 tensors, got {dtypes}, {tuple(row[0].shape)}")
    return row[1].device, dtypes, all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in row)


def chunk_table(rows: list[Row]) -> np.ndarray:
    """Return the kernel's table, (chunks, 6) int64, for rows of four tensors, or five with the copy."""
    width = len(rows[0])
    addresses = np.array([[tensor.data_ptr() for tensor in row] for row in rows], dtype=np.int64)
    item_bytes = np.array([tensor.element_size() for tensor in rows[0]], dtype=np.int64)
    numels = np.array([row[1].numel() for row in rows], dtype=np.int64)
    num_chunks = -(-numels // CHUNK_NUMEL)
    tensor_of_chunk = np.repeat(np.arange(len(rows)), num_chunks)
    first_chunk = np.cumsum(num_chunks) - num_chunks
    start = (np.arange(len(tensor_of_chunk)) - first_chunk[tensor_of_chunk]) * CHUNK_NUMEL
    table = np.zeros((len(start), COLUMNS), dtype=np.int64)
    table[:, :width] = addresses[tensor_of_chunk] + start[:, None] * item_bytes
    table[:, -1] = numels[tensor_of_chunk] - start
    return table


def kernel_scalars(settings: AdamSettings) -> tuple[float, ...]:
    """Return the kernel's numbers, differences taken in double precision."""
    correction1 = 1 - settings.beta1**settings.step if settings.bias_correction else 1.0
    correction2 = 1 - settings.beta2**settings.step if settings.bias_correction else 1.0
    return (
        settings.lr / correction1,
        1 - settings.lr * settings.weight_decay if settings.decoupled else 1.0,
        0.0 if settings.decoupled else settings.weight_decay,
        settings.beta1,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        settings.eps,
        1 / math.sqrt(correction2),
    )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    # Triton launches on the current device. A host device means Triton's interpreter.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
