"""Adam on the host, in a thread of its own, while the device goes on: gradients down, update, parameters up.

Of the gradients that are there the newest goes first. In a backward pass that is the layer nearest to the input; what is
left at its end are the last layers, which the next forward pass needs last, and it can begin meanwhile.

Gradients come down and parameters go up in fp32, and the device casts both: the host then makes one pass, torch's fused
kernel over a whole buffer in one parallel region. Casting parameters on the host costs a third more (0.29 instead of
0.21 ns a parameter, measured beside an H100, 14 of 16 cores). Casting gradients there in blocks that fit its caches
forks and joins the threads every 0.2 ms, beside a thread that feeds the GPU: 1.1 ns.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adam_kernels import AdamSettings, AdamTensors, HostAdam

# Elements of one staging buffer: 128 MiB of fp32, a power of two, since pinned blocks are rounded up to one.
SLOT_NUMEL = 2**25
# Gradients wait in these for the host's Adam; when all are taken the backward pass waits too.
NUM_SLOTS = 16
# Share of the cores that the host's Adam leaves to the threads that feed the GPU and to the copies: beside those, 12 of
# 16 cores took 0.31 ns a parameter, 14 took 0.38 and 16 took 0.70.
FEEDING_SHARE = 4


@dataclass
class Slot:
    """A staging buffer for gradients on their way down.

    Args:
        grad: fp32, pinned where there is a GPU.
        arrived: when the buffer's content is there.
    """

    grad: Tensor
    arrived: torch.cuda.Event | None


@dataclass(frozen=True)
class HostUpdate:
    """One parameter with its states on the host.

    Args:
        working: flat parameter of the model, on the device, overwritten with the updated value.
        master: flat fp32 parameter on the host, pinned where there is a GPU (`pinned.py`).
        exp_avg, exp_avg_sq: flat fp32 moments on the host.
    """

    working: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    settings: AdamSettings


@dataclass(frozen=True)
class _Piece:
    """What one buffer holds of one update."""

    slot: Slot
    update: HostUpdate
    part: slice

    @property
    def is_there(self) -> bool:
        try:
            return self.slot.arrived is None or self.slot.arrived.query()
        except RuntimeError:  # the device has failed, as whoever waits for the event will see
            return True


class HostUpdates:
    """Takes gradients from the device and gives updated parameters back.

    Host memory: NUM_SLOTS pinned buffers and nothing else; the states belong to the caller.
    """

    def __init__(self, device: torch.device, *, largest_numel: int) -> None:
        """Start the thread. Its Adam uses torch's number of threads, less those that feed a GPU.

        Args:
            device: a GPU with its index.
            largest_numel: elements of the largest parameter; no buffer needs to be larger.
        """
        self._device, self._on_gpu = device, device.type == "cuda"
        self._down: Any = torch.cuda.Stream(device) if self._on_gpu else None
        self._up: Any = torch.cuda.Stream(device) if self._on_gpu else None
        self._changed = threading.Condition()  # guards what follows
        self._pieces: list[_Piece] = []  # not begun, the newest last
        self._unfinished: Counter[int] = Counter()  # pieces by id of their master weights
        self._unawaited: set[int] = set()  # finished, but no stream waits for the copies on their way up
        self._is_closed = False
        self._error: BaseException | None = None
        self._free: queue.Queue[Slot] = queue.Queue()
        self._slot_numel = min(SLOT_NUMEL, 1 << (largest_numel - 1).bit_length())
        for _ in range(NUM_SLOTS):
            grad = torch.empty(self._slot_numel, pin_memory=self._on_gpu)
            self._free.put(Slot(grad, torch.cuda.Event() if self._on_gpu else None))
        self._num_threads = num_threads(torch.get_num_threads(), on_gpu=self._on_gpu)
        self._thread = threading.Thread(target=self._run, name="host-adam", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that comes back to an interpreter at its end aborts the process

    def submit(self, grad: Tensor, update: HostUpdate) -> None:
        """Update one parameter from its gradient, which may be freed at once; waits only for a free buffer.

        The device's current stream must not read the working parameter after this call until `wait` or `finish`.
        """
        for part in _parts(grad.numel(), self._slot_numel):
            slot = self._free.get()
            piece = grad.view(-1)[part]
            with self._stream(self._down, after_current=True):
                slot.grad[: piece.numel()].copy_(piece.float(), non_blocking=True)
                if slot.arrived:
                    slot.arrived.record()
                    piece.record_stream(self._down)
            with self._changed:
                self._pieces.append(_Piece(slot, update, part))
                self._unfinished[id(update.master)] += 1
                self._changed.notify_all()

    def wait(self, masters: Iterable[Tensor]) -> None:
        """Wait until the updates of these master weights are made and on their way up; the current stream for the rest.

        Raises:
            RuntimeError: an update failed. torch.OutOfMemoryError: for want of memory on the device.
        """
        wanted = {id(master) for master in masters}
        with self._changed:
            self._changed.wait_for(lambda: wanted.isdisjoint(self._unfinished))
            if not wanted.isdisjoint(self._unawaited):
                self._arrive()

    def finish(self) -> None:
        """Wait as `wait` does, for everything.

        Raises:
            RuntimeError: an update failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished)
            self._arrive()

    def close(self) -> None:
        """End the thread when everything is done. Repeating it is fine."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.close)

    def _arrive(self) -> None:
        if isinstance(self._error, torch.OutOfMemoryError):
            raise self._error
        if self._error:
            raise RuntimeError("Adam on the host failed") from self._error
        if self._on_gpu:
            torch.cuda.current_stream().wait_stream(self._up)
        self._unawaited.clear()

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._num_threads)  # of this thread, as is the device
            if self._on_gpu:
                torch.cuda.set_device(self._device)
        except BaseException as error:
            self._error = error
        adam = HostAdam()  # whose buffers are for this thread's number of threads
        while (piece := self._next()) is not None:
            try:
                if self._error is None:
                    self._update(adam, piece.slot, piece.update, piece.part)
            except BaseException as error:
                self._error = error
            finally:
                self._free.put(piece.slot)
                self._note_done(id(piece.update.master))
                del piece  # and with it the states, while the next one is waited for

    def _next(self) -> _Piece | None:
        """Return the newest gradient that is there, else the one that comes next; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self._is_closed)
            if not self._pieces:
                return None
            there = (number for number in reversed(range(len(self._pieces))) if self._pieces[number].is_there)
            return self._pieces.pop(next(there, 0))

    def _note_done(self, master: int) -> None:
        with self._changed:
            self._unfinished[master] -= 1
            if not self._unfinished[master]:
                del self._unfinished[master]
                self._unawaited.add(master)
            self._changed.notify_all()

    @torch.no_grad()
    def _update(self, adam: HostAdam, slot: Slot, update: HostUpdate, part: slice) -> None:
        if slot.arrived:
            slot.arrived.synchronize()
        numel = part.stop - part.start
        states = (state[part] for state in (update.master, update.exp_avg, update.exp_avg_sq))
        adam.update(AdamTensors([slot.grad[:numel]], *([state] for state in states)), update.settings)
        with self._stream(self._up):
            on_device = update.master[part].to(update.working.device, non_blocking=True)
            update.working[part].copy_(on_device)

    def _stream(self, stream: Any, *, after_current: bool = False) -> AbstractContextManager[Any]:
        if stream is None:
            return nullcontext()
        if after_current:
            stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)


def num_threads(num_cores: int, *, on_gpu: bool) -> int:
    """Return the threads of the host's Adam: all cores, or beside a GPU those that feeding it leaves."""
    return max(1, num_cores - max(2, num_cores // FEEDING_SHARE)) if on_gpu else num_cores


def _parts(numel: int, size: int) -> Iterator[slice]:
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))
