"""ZeRO on one data-parallel rank: nothing to exchange, so nothing is bucketed, copied or gathered.

ColossalAI 0.5.0 runs its whole machinery on a single rank too: gradients are copied into buckets and back, cast to
fp32, scaled and normed one by one, and updated parameters are cast, bucketed and copied again. Here one launch reads
the 16-bit gradients and writes states and 16-bit parameters. Any share of the states can live on the host, and the
update can start while the backward pass goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any
from weakref import proxy

import torch
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.mixed_precision_mixin.base import MixedPrecisionMixin
from colossalai.amp.naive_amp.mixed_precision_mixin.fp16 import FP16MixedPrecisionMixin
from colossalai.booster.plugin import LowLevelZeroPlugin
from colossalai.booster.plugin.low_level_zero_plugin import LowLevelZeroModel
from colossalai.zero.low_level import LowLevelZeroOptimizer
from torch import Tensor, nn

from .adam_kernels import AdamTensors, CompileFreeAdam, Row, flat
from .grad_norm import clipping_divisor, global_norm
from .host_updates import HostUpdate, HostUpdates
from .pinned import pinned_empty
from .upstream import require_mended_version

# Gradients of device-resident parameters are collected to this many elements before an update in the backward pass. After
# it all go together: a launch took the host half a millisecond, and of 1.3b there were 38 (a profile, 2026-11-28).
FLUSH_NUMEL = 2**25
# LowLevelZeroPlugin's options of the loss scale.
SCALING_OPTIONS = (
    "initial_scale", "min_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis", "max_scale",
)  # fmt: skip
OPTIONS = {"stage", "precision", "max_norm", "cast_inputs", "verbose", *SCALING_OPTIONS}


class LocalZeroPlugin(LowLevelZeroPlugin):
    """LowLevelZeroPlugin for one rank.

    Args:
        offload_frac: share of the fp32 weights and moments on the host, whole matrices from the last layer on, whose
            gradients come first; vectors stay on the device.
        updates_in_backward: update each parameter as soon as its gradient is there. Needs bf16 or fp32 and no
            clipping, and the caller has to look at the loss before the backward pass.
        kwargs: LowLevelZeroPlugin's `OPTIONS`; the others belong to buckets that are not there.
    """

    def __init__(self, *, offload_frac: float = 0.0, updates_in_backward: bool = False, **kwargs: Any) -> None:
        require_mended_version("colossalai.zero.low_level.LowLevelZeroOptimizer")
        if unknown := kwargs.keys() - OPTIONS:
            raise ValueError(f"{', '.join(sorted(unknown))}: has no effect here")
        super().__init__(**kwargs)
        if updates_in_backward and (self.precision == "fp16" or self.zero_optim_kwargs["clip_grad_norm"]):
            raise ValueError("updates_in_backward: not with fp16 or clipping, which need all gradients first")
        self.offload_frac, self.updates_in_backward = offload_frac, updates_in_backward

    @property
    def optimizer_class(self) -> type[LocalZeroOptimizer]:
        return LocalZeroOptimizer

    def _master_weights(
        self, model: nn.Module, optimizer: CompileFreeAdam, device: torch.device, dtype: torch.dtype
    ) -> MasterWeights:
        return MasterWeights(model, self.offload_frac, device, dtype)

    def support_no_sync(self) -> bool:
        """Return True in stage 2 as well: there is no gradient elsewhere."""
        return True

    def configure(
        self, model: nn.Module, optimizer: CompileFreeAdam | None = None, *rest: Any, **named: Any
    ) -> tuple[Any, ...]:
        """Return the wrapped model and optimizer; master weights are the model's own, before they are cast."""
        if optimizer is None:
            return super().configure(model, optimizer, *rest, **named)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]
        masters = self._master_weights(model, optimizer, get_accelerator().get_current_device(), dtype)
        wrapped = LowLevelZeroModel(model, self.precision)
        zero = self.optimizer_class(
            optimizer, masters, updates_in_backward=self.updates_in_backward, **self.zero_optim_kwargs
        )
        wrapped.update_master_params = MethodType(zero.update_master_params, wrapped)
        _, _, *others = super().configure(wrapped, zero, *rest, **named)
        return wrapped, zero, *others


class MasterWeights(dict[nn.Parameter, Tensor]):
    """Flat fp32 weights by parameter, on the device or on the host, pinned there where the device is a GPU.

    The parameters themselves are then in `dtype` on the device: one at a time, so that neither side holds two models.

    Attributes:
        on_host: the parameters whose states live on the host.
    """

    def __init__(self, model: nn.Module, offload_frac: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.on_host = set(offloaded(parameters, offload_frac))
        # One block for all on the host: the device reads it directly, and no size is rounded up.
        pinned = pinned_empty(sum(parameter.numel() for parameter in self.on_host)) if device.type == "cuda" else None
        begin = 0
        for parameter in parameters:
            place = torch.device("cpu") if parameter in self.on_host else device
            master = parameter.detach().to(place, torch.float32).contiguous().view(-1)
            if parameter in self.on_host and pinned is not None:
                end = begin + parameter.numel()
                begin, master = end, pinned[begin:end].copy_(master)
            self[parameter] = master
            parameter.data = parameter.data.to(device).to(dtype)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Return the parameter's own memory, flat, with the padding that shares of equal size need."""
        return parameter.data.view(-1)


def groups_of(optimizer: CompileFreeAdam) -> dict[nn.Parameter, int]:
    """Return the number of each parameter's group."""
    return {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}


def offloaded(parameters: Iterable[nn.Parameter], offload_frac: float) -> Iterator[nn.Parameter]:
    """Yield the matrices whose states live on the host: from the last until the share of all elements is reached."""
    parameters = list(parameters)
    left = offload_frac * sum(parameter.numel() for parameter in parameters)
    for parameter in reversed(parameters):
        if left > 0 and parameter.ndim >= 2:
            left -= parameter.numel()
            yield parameter


class LocalZeroOptimizer(LowLevelZeroOptimizer):
    """LowLevelZeroOptimizer whose only rank holds everything. Its state dict is upstream's."""

    def __init__(
        self, optimizer: CompileFreeAdam, masters: MasterWeights, *, updates_in_backward: bool, **options: Any
    ) -> None:
        self._masters = masters
        self._group_of = groups_of(optimizer)
        # Upstream's hooks would fill its buckets.
        super().__init__(optimizer, **{**options, "overlap_communication": False, "partition_grad": False})
        self.mixed_precision_mixin: MixedPrecisionMixin | None
        if isinstance(self.mixed_precision_mixin, FP16MixedPrecisionMixin):
            own = proxy(self)
            scaling = {name: options[name] for name in SCALING_OPTIONS}
            self.mixed_precision_mixin = LocalFP16Mixin(lambda: own.grads(), **scaling)
        self._host: HostUpdates | None = None
        self._updates_in_backward = updates_in_backward
        self._outside_layers: set[nn.Parameter] = set()
        self._defers = False
        if masters.on_host:
            largest = max(masters[parameter].numel() for parameter in masters.on_host)
            self._host = HostUpdates(get_accelerator().get_current_device(), largest_numel=largest)
        self._pending: dict[tuple[int, int], list[Row]] = defaultdict(list)
        self._pending_numel = 0
        self._attach_hooks()

    def _create_master_param_current_rank(self, param_list: list[nn.Parameter]) -> list[Tensor]:
        for parameter in param_list:
            whole = self._masters.whole(parameter)
            self.record_param_padding_size(parameter, whole.numel() - parameter.numel())
            self._working_param_to_padded_working_param[parameter] = whole
            self.link_master_and_working_param(self._masters[parameter], parameter)
        return [self._masters[parameter] for parameter in param_list]

    def _attach_hooks(self) -> None:
        if not self._updates_in_backward:
            return
        optimizer = proxy(self)

        def update(parameter: Tensor) -> None:
            if optimizer.require_grad_sync:
                optimizer._update(parameter, 1.0)

        for parameter in self._group_of:
            self.grad_handles.append(parameter.register_post_accumulate_grad_hook(update))

    def defer_updates(self, model: nn.Module, groups: Iterable[Sequence[Any]]) -> None:
        """Let `step` return before every update is made, and layers wait for their own parameters before they run.

        Whoever reads weights or states otherwise has to call `settle` first.

        Args:
            model: transformers' own; waits for what belongs to none of the layers, at the start of its forward pass.
            groups: layers in the order of the forward pass; the first of each waits for all of them. To be compiled
                before, not after.
        """
        optimizer, rest = proxy(self), set(self._late_parameters())

        def wait_for(parameters: Iterable[nn.Parameter], *_: Any) -> None:
            optimizer.wait_for(parameters)

        for group in groups:
            own = [parameter for layer in group for parameter in layer.parameters() if parameter in rest]
            rest.difference_update(own)
            _call_before(group[0], partial(wait_for, own))
        model.register_forward_pre_hook(partial(wait_for, rest))
        self._outside_layers, self._defers = rest, True

    def _late_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters whose new values may come after `step`."""
        return self._masters.on_host

    def wait_for(self, parameters: Iterable[nn.Parameter]) -> None:
        """Wait for the new values of parameters that may come after `step`."""
        if self._host:
            self._host.wait(self._masters[parameter] for parameter in parameters)

    def settle(self) -> None:
        """Wait for every update."""
        if self._host:
            self._host.finish()

    def _reduce_grad(self, partition_grad: bool) -> None:
        """Do nothing: the gradients are where they are needed."""

    def step(self, closure: None = None) -> None:
        """Update what the backward pass has not updated yet. Waits for the device only where the host needs a norm."""
        assert closure is None, "closure is not supported by step()"
        if not self.require_grad_sync:
            return
        mixin = self.mixed_precision_mixin
        if mixin is not None and mixin.should_skip_step():
            self.zero_grad()
            return
        self._update_rest()
        if not self._defers:
            self.settle()

    def _update_rest(self) -> None:
        div_scale = self._div_scale(self.grads())
        for parameter in self._group_of:
            if parameter.grad is not None:
                self._update(parameter, div_scale)
        self._flush(div_scale)

    def grads(self) -> list[Tensor]:
        """Return what this rank holds of the gradients."""
        return [parameter.grad for parameter in self._group_of if parameter.grad is not None]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return upstream's, of a finished step."""
        self.settle()
        return super().state_dict(*args, **kwargs)

    def state_dict_shard(self, *args: Any, **kwargs: Any) -> Iterator[tuple[dict[str, Any], int]]:
        """Return upstream's, of a finished step."""
        self.settle()
        return super().state_dict_shard(*args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Finish the step, then do what upstream does."""
        self.settle()
        super().load_state_dict(state_dict)

    def update_master_params(self, model: nn.Module) -> None:
        """Finish the step, then do what upstream does."""
        self.settle()
        super().update_master_params(model)

    def close(self) -> None:
        """Finish the step and end the host's thread."""
        try:
            self.settle()
        finally:
            if self._host:
                self._host.close()

    def _div_scale(self, grads: list[Tensor]) -> float | Tensor:
        """Return what the gradients are to be divided by, loss scale x clipping, and remember their norm."""
        scale = self.mixed_precision_mixin.get_grad_div_scale() if self.mixed_precision_mixin is not None else 1.0
        if not self._clip_grad_norm or not grads:
            return scale
        self._current_grad_norm = norm = self._norm(grads)
        div_scale = clipping_divisor(norm / scale, self._clip_grad_norm) * scale
        return div_scale.item() if self._host or norm.device.type == "cpu" else div_scale

    def _norm(self, grads: list[Tensor]) -> Tensor:
        return global_norm(grads)

    def _update(self, parameter: nn.Parameter, div_scale: float | Tensor) -> None:
        """Hand one parameter and its gradient to the host, or to the next launch on the device."""
        assert parameter.grad is not None, "only parameters with a gradient are updated"
        grad, parameter.grad = flat(parameter.grad.contiguous()), None
        master, working = self._masters[parameter], flat(parameter.data)
        state = self.optim.advanced_state(master)
        states = master, state["exp_avg"], state["exp_avg_sq"]
        on_host = parameter in self._masters.on_host
        self._submit((self._group_of[parameter], state["step"]), grad, states, working, div_scale, on_host=on_host)

    def _submit(
        self,
        key: tuple[int, int],
        grad: Tensor,
        states: tuple[Tensor, Tensor, Tensor],
        working: Tensor,
        div_scale: float | Tensor,
        *,
        on_host: bool,
    ) -> None:
        """Hand flat tensors of equal length to the host, or to the next launch on the device.

        Args:
            key: number of the parameter group, and of the update.
            states: fp32 weights and both moments.
            working: gets the new weights in its own type.
        """
        number, step = key
        if on_host:
            assert self._host, "made where something is on the host"
            settings = self.optim.settings(self.optim.param_groups[number], step, div_scale)
            self._host.submit(grad, HostUpdate(working, *states, settings))
            return
        is_own_master = states[0].data_ptr() == working.data_ptr()  # in fp32
        self._pending[key].append((grad, *states) if is_own_master else (grad, *states, working))
        self._pending_numel += grad.numel()
        if self._updates_in_backward and self._pending_numel >= FLUSH_NUMEL:
            self._flush(div_scale)

    def _flush(self, div_scale: float | Tensor) -> None:
        """Update the collected parameters."""
        for (number, step), rows in self._pending.items():
            settings = self.optim.settings(self.optim.param_groups[number], step, div_scale)
            self.optim.update(rows[0][1].is_cpu, AdamTensors.of(rows), settings)
        self._pending.clear()
        self._pending_numel = 0


def _call_before(layer: nn.Module, function: Callable[[], None]) -> None:
    """Call `function` before each call of the layer, compiled or not, outside of its graph."""
    compute: Callable[..., Any] = layer._compiled_call_impl or layer._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        function()
        return compute(*args, **kwargs)

    layer._compiled_call_impl = call  # what nn.Module.__call__ calls in place of `_call_impl`


class LocalFP16Mixin(FP16MixedPrecisionMixin):
    """Loss scaling that looks for overflows where the gradients are."""

    def __init__(self, grads_of: Callable[[], list[Tensor]], **scaling: float) -> None:
        super().__init__(**scaling)
        self._grads_of = grads_of

    def check_local_overflow(self) -> bool:
        grads = self._grads_of()
        return bool(grads) and not bool(global_norm(grads).isfinite())
