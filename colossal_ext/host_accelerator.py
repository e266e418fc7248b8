"""A ColossalAI accelerator whose device is the host: every plugin runs on CPU tensors with gloo."""

from __future__ import annotations

import resource
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator, set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.pipeline import p2p

from .upstream import require_mended_version


class HostEvent:
    """A point in a stream that is always behind us: work on the host is done when the call returns."""

    def record(self, stream: HostStream | None = None) -> None: ...

    def wait(self, stream: HostStream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class HostStream:
    """A stream without asynchrony."""

    def wait_stream(self, stream: HostStream) -> None: ...

    def wait_event(self, event: HostEvent) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        return event or HostEvent()

    def query(self) -> bool:
        return True


class HostAccelerator(CpuAccelerator):
    """The CPU, answering what the plugins ask of a GPU.

    `name` says "cuda" because LowLevelZeroOptimizer, Chunk and others compare it with a list of GPUs; tensors,
    devices and collectives are the CPU's. Memory figures are the process's own, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._name = "cuda"
        self._stream = HostStream()

    # --- device -------------------------------------------------------------------------------------------------

    def current_device(self) -> int:
        return 0

    def set_device(self, device: torch.device | int | None = None) -> None: ...

    def get_device_name(self, device: torch.device | int | None = None) -> str:
        return "cpu"

    def synchronize(self, device: torch.device | int | None = None) -> None: ...

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return (0, 0)

    def get_device_properties(self, device: Any) -> SimpleNamespace:
        return SimpleNamespace(name="cpu", total_memory=psutil.virtual_memory().total)

    def utilization(self, device: Any = None) -> int:
        return 0

    # --- random numbers -----------------------------------------------------------------------------------------

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [torch.get_rng_state()]

    def set_rng_state_all(self, new_states: list[torch.Tensor]) -> None:
        torch.set_rng_state(new_states[0])

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def seed(self) -> None:
        torch.seed()

    def seed_all(self) -> None:
        torch.seed()

    def initial_seed(self) -> int:
        return torch.initial_seed()

    # --- memory -------------------------------------------------------------------------------------------------

    def empty_cache(self) -> None: ...

    def memory_stats(self, device: Any = None) -> dict[str, Any]:
        return {}

    def memory_summary(self, device: Any = None, abbreviated: bool = False) -> str:
        return f"resident set: {self.memory_allocated()} bytes"

    def memory_snapshot(self) -> list[Any]:
        return []

    def memory_allocated(self, device: Any = None) -> int:
        return psutil.Process().memory_info().rss

    def max_memory_allocated(self, device: Any = None) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def max_memory_reserved(self, device: Any = None) -> int:
        return self.max_memory_allocated()

    def reset_max_memory_allocated(self, device: Any = None) -> None: ...

    def reset_max_memory_cached(self, device: Any = None) -> None: ...

    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    # --- streams ------------------------------------------------------------------------------------------------

    def Stream(self, device: Any = None, priority: int = 0, **kwargs: Any) -> HostStream:
        return HostStream()

    def Event(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> HostEvent:
        return HostEvent()

    def current_stream(self, device: Any = None) -> HostStream:
        return self._stream

    def default_stream(self, device: Any = None) -> HostStream:
        return self._stream

    def set_stream(self, stream_: HostStream) -> None: ...

    def stream(self, stream_: HostStream | None) -> AbstractContextManager[None]:
        return nullcontext()

    # --- mixed precision ----------------------------------------------------------------------------------------

    def autocast(
        self, enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True
    ) -> torch.autocast:
        return torch.autocast("cpu", dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)


def is_gpu_backend(group: dist.ProcessGroup | None) -> bool:
    """Return whether `group` (None: the default group) moves GPU tensors."""
    return dist.get_backend(group) in ("nccl", "hccl")


def install_host_accelerator() -> None:
    """Make the CPU ColossalAI's device for this process. Call it before any plugin is built; repeating it is fine.

    Mends with it colossalai/pipeline/p2p.py:159, `torch.distributed.is_hccl_available()`: an attribute that only
    Huawei's torch has. It is reached wherever the pipeline runs without NCCL: on a torch built without NCCL, and
    (through `c10d.Backend.HCCL`, line 160) with gloo groups on a torch that has it.

    Raises:
        RuntimeError: another ColossalAI than the one these mends are written for.
    """
    require_mended_version("colossalai.pipeline.p2p._check_for_nccl_hccl_backend")
    if not isinstance(get_accelerator(), HostAccelerator):
        set_accelerator(HostAccelerator())
    p2p._check_for_nccl_hccl_backend = is_gpu_backend
