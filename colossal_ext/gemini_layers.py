"""Gemini's hooks once a decoder layer instead of once an operator, so that the layer can be a compiled graph.

Upstream runs them in ColoParameter.__torch_function__ (colo_parameter.py:55 of 0.5.0), which no graph can hold: 8 times
a layer of OPT in each direction. Here a layer calls them itself, once, and computes with plain tensors that share the
chunks' storage. A chunk's storage is resized to 0 when it is released and filled again when it is gathered, and is
never another object (chunk.py:49-56): whatever a graph saves for its backward pass, parameters or views of them, holds
the weights again once `pre_backward` has brought the chunks back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from colossalai.tensor.colo_tensor import ColoTensor
from colossalai.tensor.param_op_hook import ColoParamOpHookManager
from colossalai.zero.gemini.chunk import TensorState
from colossalai.zero.gemini.gemini_ddp import GeminiDDP
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from .gemini_hook import LayerHook
from .upstream import require_mended_version


def hook_layers(layers: Iterable[Any]) -> None:
    """Make each layer call Gemini's hooks for all of its parameters at once. Call it after `layer.compile()`.

    With `gemini_hook.use_layer_hook`, after the model is boosted, its gradients are copied at once, too.

    Args:
        layers: transformers' GradientCheckpointingLayers. Those that recompute still do, but no longer by themselves:
            some releases do it around a layer's call and 5.23 inside of it, where the hooks would not run again.

    Raises:
        RuntimeError: another ColossalAI than 0.5.0 is installed.
    """
    require_mended_version("colossalai.tensor.colo_parameter.ColoParameter")
    for layer in layers:
        compute = layer._compiled_call_impl or layer._call_impl
        slots = [
            (part._parameters, name) for part in layer.modules() for name, _ in part.named_parameters(recurse=False)
        ]
        # What nn.Module.compile sets: nn.Module.__call__ calls it in place of `_call_impl`.
        layer._compiled_call_impl = _HookedCall(layer, compute, slots, recomputes=layer.gradient_checkpointing)
        layer.gradient_checkpointing = False


def with_plain_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` called with the tensors that it is given, none of them of ColossalAI's class.

    The class sticks to whatever is computed with a parameter (`_convert_output`, colo_tensor.py:33), such as logits,
    and torch.compile cannot trace it.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _plain((args, kwargs))
        return function(*args, **kwargs)

    return call


def drop_gradients_directly(model: GeminiDDP) -> None:
    """Spare each parameter's `.grad` a trip through ColoParameter.__torch_function__ where GeminiDDP drops them all.

    That is Python for each read and write, three times a step: a tenth of its forward and backward calls.
    """
    parameters = list(model.module.parameters())

    def drop(**_: Any) -> None:
        with torch._C.DisableTorchFunction():
            for parameter in parameters:
                parameter.grad = None

    model._setup_grads_ptr = model.module.zero_grad = drop


def _plain(arguments: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return tree_map_only(ColoTensor, lambda tensor: tensor.as_subclass(Tensor), arguments)


@dataclass(frozen=True)
class _HookedCall:
    """What a layer does when it is called.

    Args:
        compute: the layer's own call, compiled or not.
        slots: where its parameters are kept: a module's dictionary and the name there.
        recomputes: whether the backward pass calls all of it again.
    """

    layer: nn.Module
    compute: Callable[..., Any]
    slots: list[tuple[dict[str, Any], str]]
    recomputes: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recomputes and self.layer.training:
            return checkpoint(self.run, *args, use_reentrant=False, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output, between the hooks that ColoParameter.__torch_function__ calls for an operator."""
        parameters = [owner[name] for owner, name in self.slots]
        args, kwargs = _plain((args, kwargs))
        with torch._C.DisableTorchFunction():
            ColoParamOpHookManager._trigger_pre_forward(parameters)
            closing = _closing(parameters)
            weights = _PlainWeights.apply(parameters, closing, *(parameters[number] for number in closing))
        with self.holding(parameters, weights):
            output = self.compute(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return ColoParamOpHookManager.post_op(parameters, output)  # and pre_backward, in the backward pass

    @contextmanager
    def holding(self, parameters: list[nn.Parameter], weights: tuple[Tensor, ...]) -> Iterator[None]:
        """Put `weights` where the layer looks for its parameters, and the parameters back."""
        try:
            for (owner, name), weight in zip(self.slots, weights, strict=True):
                owner[name] = weight
            yield
        finally:  # also where a recomputation has all it needs, which an exception tells
            for (owner, name), parameter in zip(self.slots, parameters, strict=True):
                owner[name] = parameter


class _PlainWeights(torch.autograd.Function):
    """Parameters as plain tensors, as PreFwdPostBwd (param_op_hook.py:114) returns them, but without being views.

    In the backward pass it comes after the layer and before the parameters: `post_backward` puts these in the state in
    which GeminiDDP.grad_handle (gemini_ddp.py:374) takes their gradients. That copies each for itself, 16 of a layer;
    here all are copied at once, but those of `closing`, which `grad_handle` still gets, and reduces the chunk with them.
    """

    @staticmethod
    def forward(ctx: Any, parameters: list[nn.Parameter], closing: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return all of `parameters`; `tensors` are those numbered in `closing`."""
        ctx.parameters, ctx.closing = parameters, closing
        return tuple(parameter.data for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ColoParamOpHookManager._trigger_post_backward(ctx.parameters)
        if len(ctx.closing) < len(gradients):
            with torch._C.DisableTorchFunction():
                _copy_into_chunks(ctx.parameters, gradients)
        return (None, None, *(gradients[number] for number in ctx.closing))


def _closing(parameters: list[nn.Parameter]) -> list[int]:
    """Return the numbers of the parameters whose gradients GeminiDDP.grad_handle has to see: the last of each chunk.

    All of them with accumulation, where gradients have chunks of their own, and without a LayerHook.
    """
    hook = _layer_hook()
    if hook is None or not hook.overwrites_weights:
        return list(range(len(parameters)))
    return [residents.numbers[-1] for residents in hook.residents(parameters)]


def _copy_into_chunks(parameters: list[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Do what GeminiDDP.grad_handle does, for all of these parameters but the last of each chunk."""
    slices, flat = list[Tensor](), list[Tensor]()
    for residents in (each.without_last for each in _layer_hook().residents(parameters)):
        residents.change_to(TensorState.READY_FOR_REDUCE)
        for number, info in zip(residents.numbers, residents.infos, strict=True):
            slices.append(residents.chunk.cuda_global_chunk[info.offset : info.end])
            flat.append(gradients[number].flatten())
            parameters[number]._gemini_reduced = True  # its error message looks at it
    if slices:
        torch._foreach_copy_(slices, flat)


def _layer_hook() -> Any:
    """Return the LayerHook of the model that runs, None where it has another or its hooks are off (in evaluation)."""
    return next((hook for hook in ColoParamOpHookManager.hooks if isinstance(hook, LayerHook)), None)
