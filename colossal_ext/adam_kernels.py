"""Adam without a compiler: torch's fused kernels and one Triton kernel in place of ColossalAI's nvcc and g++ builds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from colossalai.kernel.extensions.base_extension import _Extension
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader, KernelLoader
from colossalai.nn.optimizer import HybridAdam
from colossalai.zero.gemini import gemini_optimizer

if TYPE_CHECKING:
    from .triton_adam import TritonAdam

# Elements that a thread upcasts at a time: 256 KiB of fp32, which stay in its second-level cache.
BLOCK_NUMEL_PER_THREAD = 1 << 16
# Returns a parameter's gradient, and where the updated parameter goes as well.
GradAndCopies = Callable[[torch.Tensor], tuple[torch.Tensor | None, Sequence[torch.Tensor]]]
# A parameter's gradient, the parameter, its moments and where there is one the copy.
Row = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class AdamSettings:
    """One Adam update, without its tensors.

    Attributes:
        step: the number of this update, from 1.
        decoupled: AdamW's weight decay if true, an L2 term in the gradient if false.
        div_scale: gradients are divided by it (loss scale x clipping) where it is positive; ColossalAI's -1 is "off".
            An fp32 scalar tensor is read by the kernel, so that a norm on the device is not waited for.
    """

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool = True
    bias_correction: bool = True
    div_scale: float | torch.Tensor = -1.0

    @property
    def scales_gradients(self) -> bool:
        # NaN is to be seen in the weights.
        return isinstance(self.div_scale, torch.Tensor) or not (self.div_scale <= 0 or self.div_scale == 1)

    def divisor(self, device: torch.device) -> torch.Tensor:
        """Return `div_scale` as an fp32 scalar on the device."""
        if isinstance(self.div_scale, torch.Tensor):
            return self.div_scale.to(device, torch.float32)
        return torch.full((), self.div_scale, device=device)


@dataclass
class AdamTensors:
    """Parallel lists: entry i of each belongs to parameter i, all of one shape and device.

    Attributes:
        copies: where the updated parameters go as well, in these tensors' dtype; empty: nowhere.
    """

    grads: list[torch.Tensor]
    params: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    copies: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[Row]) -> AdamTensors:
        """Return the columns of rows, all of four tensors or all of five."""
        return cls(*map(list, zip(*rows, strict=True))) if rows else cls([], [], [], [])

    @property
    def columns(self) -> tuple[list[torch.Tensor], ...]:
        states = self.grads, self.params, self.exp_avgs, self.exp_avg_sqs
        return (*states, self.copies) if self.copies else states

    def rows(self) -> Iterator[Row]:
        return zip(*self.columns, strict=True)

    def for_torch(self, settings: AdamSettings) -> tuple[AdamTensors, AdamTensors]:
        """Return the rows that torch's kernel can take as they are, and the others.

        It reads memory in order, whatever the strides, and writes divided gradients back.
        """
        if self.copies or settings.scales_gradients:
            return AdamTensors.of(()), self
        if _are_plain(tensor for column in self.columns for tensor in column):
            return self, AdamTensors.of(())
        plain, others = list[Row](), list[Row]()
        for row in self.rows():
            (plain if _are_plain(row) else others).append(row)
        return AdamTensors.of(plain), AdamTensors.of(others)


def _are_plain(tensors: Iterable[torch.Tensor]) -> bool:
    return all(tensor.dtype is torch.float32 and tensor.is_contiguous() for tensor in tensors)


def torch_fused_adam(tensors: AdamTensors, settings: AdamSettings, grad_scale: torch.Tensor | None = None) -> None:
    """Update fp32 parameters in place with torch's fused multi-tensor kernel: a few launches for any number of them.

    With `grad_scale` the kernel writes the divided gradients back into `tensors.grads`.
    """
    if not tensors.params:
        return
    update = torch._fused_adamw_ if settings.decoupled else torch._fused_adam_
    # beta ** inf is 0: the kernel's own bias correction becomes a division by one.
    step = float(settings.step) if settings.bias_correction else math.inf
    device = tensors.params[0].device
    update(
        tensors.params,
        tensors.grads,
        tensors.exp_avgs,
        tensors.exp_avg_sqs,
        [],
        [torch.full((), step, device=device)] * len(tensors.params),
        lr=settings.lr,
        beta1=settings.beta1,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
    )


class HostAdam:
    """Adam for tensors on the host, in any mix of fp32, bf16 and fp16.

    All-fp32 rows go to torch's kernel as they are; the others in blocks, upcast into buffers that are allocated once.
    Gradients are never modified.
    """

    def __init__(self) -> None:
        self._block_numel = BLOCK_NUMEL_PER_THREAD * torch.get_num_threads()
        self._buffers: list[torch.Tensor] = []

    def update(self, tensors: AdamTensors, settings: AdamSettings) -> None:
        """Update parameters and states in place."""
        direct, rest = tensors.for_torch(settings)
        torch_fused_adam(direct, settings)
        scale = settings.divisor(torch.device("cpu")) if settings.scales_gradients else None
        for row in rest.rows():
            for block in zip(*(flat(tensor).split(self._block_numel) for tensor in row), strict=True):
                self._update_block(block, settings, scale)

    def _update_block(
        self, block: tuple[torch.Tensor, ...], settings: AdamSettings, scale: torch.Tensor | None
    ) -> None:
        work = [self._upcast(column, tensor, scale is not None) for column, tensor in enumerate(block[:4])]
        torch_fused_adam(AdamTensors(*([tensor] for tensor in work)), settings, scale)
        for original, updated in zip(block[1:4], work[1:], strict=True):
            if updated is not original:
                original.copy_(updated)
        for copy in block[4:]:  # may be the gradient's own memory
            copy.copy_(work[1])

    def _upcast(self, column: int, tensor: torch.Tensor, gradient_is_written: bool) -> torch.Tensor:
        if tensor.dtype is torch.float32 and not (column == 0 and gradient_is_written):
            return tensor
        if not self._buffers:
            self._buffers = [torch.empty(self._block_numel) for _ in range(4)]
        return self._buffers[column][: tensor.numel()].copy_(tensor)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return a 1-D view, or the tensor itself.

    Raises:
        ValueError: the tensor is not contiguous, so that a copy would be updated instead.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"Adam needs contiguous tensors, got shape {tuple(tensor.shape)} strides {tensor.stride()}")
    return tensor if tensor.ndim == 1 else tensor.view(-1)


class CPUAdamOptimizer:
    """The class that ColossalAI's CPUAdam and HybridAdam expect of a CPU kernel, on `HostAdam`."""

    def __init__(
        self, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, adamw_mode: bool
    ) -> None:
        self._decoupled = adamw_mode
        self._adam = HostAdam()

    def step(
        self,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        div_scale: float = -1.0,
    ) -> None:
        """Update one parameter and its states in place."""
        settings = AdamSettings(
            step, lr, beta1, beta2, eps, weight_decay, self._decoupled, bool(bias_correction), div_scale
        )
        self.update(AdamTensors([grad], [param], [exp_avg], [exp_avg_sq]), settings)

    def update(self, tensors: AdamTensors, settings: AdamSettings) -> None:
        """Update many parameters at once."""
        self._adam.update(tensors, settings)


def multi_tensor_adam(
    chunk_size: int,
    overflow_buf: torch.Tensor,
    tensor_lists: Sequence[list[torch.Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    div_scale: float = -1.0,
) -> None:
    """Update CUDA parameters in place: the function that HybridAdam and FusedAdam expect of a CUDA kernel.

    Args:
        chunk_size, overflow_buf: unused, as in ColossalAI's own kernel.
        tensor_lists: gradients, parameters, first moments, second moments; fp32, bf16 or fp16 each.
        mode: 1 for AdamW, 0 for Adam with an L2 term.
        div_scale: divisor of the gradients; not positive: none.
    """
    settings = AdamSettings(
        step, lr, beta1, beta2, eps, weight_decay, mode == 1, bool(bias_correction), float(div_scale)
    )
    DeviceAdam().update(AdamTensors(*tensor_lists), settings)


class DeviceAdam:
    """Adam for CUDA tensors, in any mix of fp32, bf16 and fp16: a few launches for any number of them.

    Gradients are not modified, and nothing waits for the device. What a launch needs of its tensors is kept and used
    again while they stay where they are, as they do from step to step.
    """

    def __init__(self) -> None:
        self._triton: TritonAdam | None = None

    def update(self, tensors: AdamTensors, settings: AdamSettings) -> None:
        """Update parameters and states in place."""
        direct, rest = tensors.for_torch(settings)
        torch_fused_adam(direct, settings)
        if rest.params:
            if self._triton is None:
                from .triton_adam import TritonAdam  # CPU-only torch has no Triton

                self._triton = TritonAdam()
            self._triton.update(rest, settings)


class _CompileFreeExtension(_Extension):
    """A kernel that needs no building."""

    def __init__(self) -> None:
        super().__init__(type(self).__name__, support_aot=False, support_jit=False, priority=10)

    def is_available(self) -> bool:
        return True

    def assert_compatible(self) -> None: ...

    def build_aot(self) -> None:
        raise NotImplementedError("nothing to build")

    def build_jit(self) -> None:
        raise NotImplementedError("nothing to build")


class TorchCpuAdamExtension(_CompileFreeExtension):
    """`CPUAdamLoader`'s kernel."""

    def load(self) -> SimpleNamespace:
        return SimpleNamespace(CPUAdamOptimizer=CPUAdamOptimizer)


class TritonFusedAdamExtension(_CompileFreeExtension):
    """`FusedOptimizerLoader`'s kernel, Adam only."""

    def load(self) -> SimpleNamespace:
        return SimpleNamespace(multi_tensor_adam=multi_tensor_adam)


def register_adam_kernels() -> None:
    """Make ColossalAI's Adam optimizers use our kernels, and Gemini accept `CompileFreeAdam`. Repeating it is fine.

    The stock extensions leave the registry: beside ours each would be asked whether it fits this machine's nvcc, and
    every load would warn of more than one kernel.
    """
    _register(CPUAdamLoader, TorchCpuAdamExtension)
    _register(FusedOptimizerLoader, TritonFusedAdamExtension)
    gemini_optimizer._AVAIL_OPTIM_LIST.add(CompileFreeAdam)


def _register(loader: type[KernelLoader], extension: type[_Extension]) -> None:
    loader.REGISTRY.clear()
    loader.register_extension(extension)


class CompileFreeAdam(HybridAdam):
    """HybridAdam on our kernels: parameters on the GPU or the host, gradients in fp32, bf16 or fp16.

    Beside the missing build it differs from HybridAdam in its bf16 branch for the host (hybrid_adam.py:121-138 of
    0.5.0), which is five passes of torch operations, ignores `div_scale`, so that Gemini does not clip there, and
    ignores `bias_correction=False`. The state dict is HybridAdam's.
    """

    def __init__(self, model_params: Any, *args: Any, **kwargs: Any) -> None:
        register_adam_kernels()
        super().__init__(model_params, *args, **kwargs)
        self._device_adam = DeviceAdam()
        if self.offloader is not None:
            raise ValueError("nvme_offload_fraction: CompileFreeAdam keeps its states in memory")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, div_scale: float | torch.Tensor = -1.0) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes and returns the loss.
            div_scale: gradients are divided by it where it is positive; a scalar tensor is not waited for.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update_group(group, lambda param: (param.grad, ()), div_scale)
        return loss

    def update_group(
        self,
        group: dict[str, Any],
        grad_and_copies: GradAndCopies,
        div_scale: float | torch.Tensor = -1.0,
    ) -> None:
        """Update every parameter of a group that has a gradient."""
        for (on_host, step), tensors in self._batches(group, grad_and_copies).items():
            self.update(on_host, tensors, self.settings(group, step, div_scale))

    def update(self, on_host: bool, tensors: AdamTensors, settings: AdamSettings) -> None:
        """Update parameters and states in place, all on the host or all on the device."""
        (self.cpu_adam_op if on_host else self._device_adam).update(tensors, settings)

    def _batches(self, group: dict[str, Any], grad_and_copies: GradAndCopies) -> dict[tuple[bool, int], AdamTensors]:
        """Return the group's tensors by (on the host?, step number)."""
        rows: dict[tuple[bool, int], list[Row]] = defaultdict(list)
        for param in group["params"]:
            grad, copies = grad_and_copies(param)
            if grad is None:
                continue
            state = self.advanced_state(param)
            row = (grad.data, param.data, state["exp_avg"], state["exp_avg_sq"], *copies)
            rows[param.is_cpu, int(state["step"])].append(row)
        return {key: AdamTensors.of(batch) for key, batch in rows.items()}

    def advanced_state(self, param: torch.Tensor) -> dict[str, Any]:
        """Return the parameter's moments, made where there are none yet, after counting an update."""
        state = self.state[param]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))
        state["step"] += 1
        return state

    def settings(self, group: dict[str, Any], step: int, div_scale: float | torch.Tensor = -1.0) -> AdamSettings:
        """Return what the group says of its update number `step`."""
        beta1, beta2 = group["betas"]
        return AdamSettings(
            step,
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            decoupled=self.adamw_mode,
            bias_correction=group["bias_correction"],
            div_scale=div_scale,
        )
