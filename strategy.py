"""The plugins: what each shards and allows, and one `Engine` that trains and evaluates under any of them."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from args import TrainArgs, model_chunks, pipeline_microbatches
from model import compile_layers, decoder_layers
from planner import Place, has_16_bit_gradients, layers_per_graph
from runtime import Runtime, quiet_colossalai

if TYPE_CHECKING:
    from colossalai.booster import Booster

    from colossal_ext.states import Layout

# fp16 skips steps until the scale fits: 16 of them from LowLevelZero's own start, 2^32, and in the equivalence matrix
# two from 2^16 on several ranks, whose own few rows have larger gradients than the whole batch, none on one.
INITIAL_LOSS_SCALE = 2**12

ROUNDING_PLUGINS = ("gemini", "hybrid_parallel")  # cast a model to 16 bits before they make fp32 master weights of it

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_compile(args: TrainArgs, *, on_cpu: bool) -> str:
    """Return `on` or `off`: auto compiles on a GPU where one graph serves all batches."""
    if args.compile != "auto":
        return args.compile
    # Rows of many lengths: torch 2.11 fails on a graph of dynamic shape, and one graph a length never ends.
    return "on" if args.packs_text and not on_cpu and _has_c_compiler() else "off"


def _has_c_compiler() -> bool:
    # Inductor's Triton kernels are launched by a stub that the host's C compiler builds.
    return any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang"))


@dataclass(frozen=True)
class Workload:
    """What a plugin must know of model and data before it is made.

    Args:
        parameter_numels: elements of each parameter in the model's order, tied ones once.
        parameter_shapes: full shape by name, tied ones under each of their names.
        varying_length: batches differ in length (padded rows).
    """

    parameter_numels: tuple[int, ...]
    parameter_shapes: Mapping[str, torch.Size]
    varying_length: bool


def workload(model: nn.Module, *, varying_length: bool) -> Workload:
    """Return the facts of a model that is not boosted yet."""
    numels = tuple(parameter.numel() for parameter in model.parameters())
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    return Workload(numels, shapes, varying_length)


class Engine:
    """A boosted model with its optimizer and schedule.

    Every loss it returns is a sum over real targets of this rank, in fp32, and 0 where another rank counts it
    (other pipeline stages, other tensor-parallel ranks), so that a sum over the world is the global sum.
    """

    def __init__(self, args: TrainArgs, runtime: Runtime, workload: Workload) -> None:
        """Create the plugin and its Booster; `args` holds no `auto` any more."""
        self.args, self.runtime, self.workload = args, runtime, workload
        quiet_colossalai()
        # One device's backward pass needs no thread beside this one, from which it would take Python's lock layer by layer:
        # 261 ms a step instead of 296 and 351, 1.3b under tp 2 x pp 2 in eight pieces on four H200.
        torch.autograd.set_multithreading_enabled(False)
        self.plugin, mixed_precision = _make_plugin(args, runtime, workload)
        self.booster = _make_booster(self.plugin, mixed_precision)
        self.is_pipeline = args.plugin == "hybrid_parallel" and args.pp > 1
        self.num_microbatches = pipeline_microbatches(args) if self.is_pipeline else 1
        self.model: Any = None
        self.optimizer: Any = None
        self.scheduler: Any = None

    def boost(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        scheduler: LRScheduler | None,
        *,
        resumes: bool = False,
        drawn_again: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Hand model, optimizer and schedule to the plugin, which shards them.

        Args:
            resumes: all weights come from a checkpoint, next.
            drawn_again: returns the fp32 tensor of a name, where the model's own were cast as they were drawn.
        """
        from colossal_ext.unrounded import fp32_weights, unrounded_frequencies

        groups = self._layer_groups(model)
        if self.args.compile == "on":
            compile_layers(
                model,
                groups,
                gradient_dtype=torch.bfloat16 if self._has_16_bit_gradients else None,
                cuda_graphs=self.args.cuda_graphs == "on",
            )
        weights: dict[str, Tensor] = {}  # that the plugin rounds before it makes master weights of them
        if self.args.plugin == "gemini":
            _hook_layers(model)
            weights = fp32_weights(model)
        with unrounded_frequencies(model):
            boosted = self.booster.boost(model, optimizer, lr_scheduler=scheduler)
        self.model, self.optimizer, _, _, self.scheduler = boosted
        if self.args.plugin == "gemini":
            _spare_the_host(self.model, self.optimizer, waits=self.runtime.on_cpu or _uses_host(self.args))
        elif self.args.plugin == "hybrid_parallel":
            weights = self.plugin.custom_policy.take_fp32_weights()
        rounds = self.args.plugin in ROUNDING_PLUGINS and self.args.precision != "fp32"
        read = weights.__getitem__ if weights else drawn_again
        if rounds and read and optimizer and not resumes:
            self.load_states(lambda name, kind: read(name), adam_step=0)
        if self.defers_updates:
            self.optimizer.defer_updates(model, groups)

    def _layer_groups(self, model: Any) -> list[tuple[Any, ...]]:
        """Return the decoder layers in the order of the forward pass, those that share a graph together."""
        from colossal_ext.layer_groups import in_groups

        # A layer that layerdrop leaves out would be computed by the first of its group. A stage has groups of its own.
        in_turn = model.config.model_type == "opt" and not model.config.layerdrop and not self.is_pipeline
        return list(in_groups(decoder_layers(model), _layers_per_graph(self.args, self.workload) if in_turn else 1))

    @property
    def _has_16_bit_gradients(self) -> bool:
        args = self.args
        return has_16_bit_gradients(
            args.plugin,
            args.precision,
            compiled=args.compile == "on",
            accumulates=args.gradient_accumulation_steps > 1,
        )

    @property
    def defers_updates(self) -> bool:
        """Whether `step` returns before every parameter has its new value on every rank."""
        return self.optimizer is not None and (self.steps_in_backward or self._gathers_in_forward)

    @property
    def _gathers_in_forward(self) -> bool:
        return self.args.plugin == "low_level_zero" and self.runtime.world_size > 1

    @property
    def steps_in_backward(self) -> bool:
        """Whether the backward pass of a step's last micro-batch updates weights."""
        return getattr(self.plugin, "updates_in_backward", False)

    @property
    def dp_rank(self) -> int:
        """This rank's place among the ranks that see different data."""
        return dist.get_rank(self._dp_group)

    @property
    def dp_size(self) -> int:
        return dist.get_world_size(self._dp_group)

    @property
    def _dp_group(self) -> Any:
        return self.plugin.dp_group if self.args.plugin == "hybrid_parallel" else None

    @property
    def counts(self) -> bool:
        """Whether this rank's losses and tokens enter the global sums: one rank a replica does."""
        if self.args.plugin != "hybrid_parallel":
            return True
        is_last_stage = self.plugin.stage_manager is None or self.plugin.stage_manager.is_last_stage(ignore_chunk=True)
        return is_last_stage and dist.get_rank(self.plugin.tp_group) == 0

    def forward_is_local(self, *, settled: bool) -> bool:
        """Return whether a rank computes its next loss without the others: no gathered parameters, no divided layers.

        Args:
            settled: wait first for LowLevelZero's weights, which otherwise come during the forward pass. A collective.
        """
        if self._gathers_in_forward:
            if settled:
                self.settle()
            return settled
        return self.args.plugin != "gemini" and self.args.replica_size == 1

    def seed_dropout(self, seed: int) -> None:
        """Draw different dropout masks on data-parallel ranks and pipeline stages, the same on tensor-parallel ranks."""
        torch.manual_seed(seed + 1 + self.dp_rank + self.dp_size * self.stage)

    def forward_backward(
        self, batch: dict[str, Tensor], scale: Tensor, *, last: bool, at_loss: Callable[[Tensor], None]
    ) -> None:
        """Add the gradients of one micro-batch.

        Args:
            batch: input_ids and labels, (B, T) int64.
            scale: scalar; the gradients are those of `scale` x the summed loss, averaged over data-parallel ranks.
            last: whether the step's gradients are complete, and may be exchanged, after this one.
            at_loss: gets the summed loss: before the backward pass, except under a pipeline.
        """
        with self._accumulation(last):
            if self.is_pipeline:
                at_loss(self._run_pipeline(batch, scale))
                return
            loss = self.model(**_to_device(batch, self.runtime.device)).loss
            at_loss(self._counted(loss.detach()))
            self.booster.backward(loss * scale, self.optimizer)

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the summed loss of one micro-batch in evaluation mode."""
        self.model.eval()
        try:
            if self.is_pipeline:
                # Outside no_sync the plugin sums gradients of tied weights that evaluation has not made.
                with self.model.no_sync():
                    return self._run_pipeline(batch, None)
            return self._counted(self.model(**_to_device(batch, self.runtime.device)).loss)
        finally:
            self.model.train()

    def step(self) -> Tensor | float | None:
        """Clip, update the weights and advance the schedule.

        Returns:
            The gradient norm before clipping, None where nothing computed it; a tensor has not been waited for.
        """
        from colossal_ext.grad_norm import grad_norm

        norm: Tensor | float | None = None
        if self.args.max_grad_norm and self.args.plugin.startswith("torch_ddp"):
            norm = self._clip_and_update()
        else:
            self.optimizer.step()
        self.scheduler.step()
        if self.args.max_grad_norm and norm is None:
            norm = grad_norm(self.optimizer)
        self.optimizer.zero_grad()
        return norm

    def _clip_and_update(self) -> Tensor | float:
        """Clip and step under TorchDDP, which leaves the first to the user, and return the norm before."""
        from colossal_ext.grad_norm import clipping_divisor, global_norm, number_if_there

        has_scaler = self.args.precision == "fp16"
        if has_scaler:
            self.optimizer.unscale_grad()
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = global_norm([parameter.grad for parameter in parameters])
        # In place 16-bit gradients would be rounded once more; fp32 ones a host's kernel takes as they are.
        if has_scaler or (self.runtime.on_cpu and not self._has_16_bit_gradients):
            nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
            self.optimizer.step()
        else:  # the kernel divides: neither a pass over the gradients nor a wait for the norm
            self.optimizer.unwrap().step(div_scale=clipping_divisor(norm, self.args.max_grad_norm))
        return number_if_there(norm)

    @property
    def learning_rate(self) -> float:
        return self.scheduler.get_last_lr()[0]

    def settle(self) -> None:
        """Wait for updates that go on after `step`; a forward pass waits by itself."""
        if self.defers_updates:
            self.optimizer.settle()

    # What a checkpoint holds of the engine.

    @property
    def stage(self) -> int:
        """This rank's pipeline stage, 0 without a pipeline."""
        return self.plugin.stage_manager.stage if self.is_pipeline else 0

    def full_states(self, kinds: tuple[str, ...]) -> Iterator[tuple[str, str, Tensor | None]]:
        """Yield (name, kind, full fp32 tensor or None) of this stage: `colossal_ext.states`. A collective."""
        from colossal_ext.states import full_states

        self.settle()
        return full_states(self.model, self.optimizer, self._layout, kinds=kinds)

    def load_states(self, read: Callable[[str, str], Tensor], *, adam_step: int) -> None:
        """Set weights and moments from full tensors: `colossal_ext.states`."""
        from colossal_ext.states import load_states

        self.settle()
        load_states(self.model, self.optimizer, self._layout, read, adam_step=adam_step)

    def weights_are_finite(self) -> bool:
        """Return whether no rank's weights hold an infinity or a NaN. A collective."""
        from colossal_ext.states import weights_are_finite

        self.settle()
        bad = torch.tensor(not weights_are_finite(self.model, self.optimizer), device=self.runtime.device).int()
        dist.all_reduce(bad)
        return bad.item() == 0

    @property
    def adam_step(self) -> int:
        """Updates made; fp16 steps that overflowed do not count."""
        from colossal_ext.states import adam_step_of

        return adam_step_of(self.optimizer)

    @property
    def counters(self) -> dict[str, Any]:
        """The state of schedule and loss scale, as plain numbers."""
        from colossal_ext.scaler_state import loss_scale_state

        schedule = {"last_epoch": self.scheduler.last_epoch, "last_lr": self.scheduler.get_last_lr()}
        return {"schedule": schedule, "loss_scale": loss_scale_state(self.optimizer)}

    def restore_counters(self, counters: Mapping[str, Any]) -> None:
        """Put schedule and loss scale where `counters` were read."""
        from colossal_ext.scaler_state import restore_loss_scale

        schedule = counters["schedule"]
        self.scheduler.last_epoch = schedule["last_epoch"]
        self.scheduler._last_lr = list(schedule["last_lr"])
        for group, rate in zip(self.scheduler.optimizer.param_groups, schedule["last_lr"], strict=True):
            group["lr"] = rate
        if counters["loss_scale"]:
            restore_loss_scale(self.optimizer, counters["loss_scale"])

    def random_states(self) -> dict[str, Tensor]:
        """Return the random states of all ranks, (world, bytes) uint8, on every rank. A collective."""
        device = self.runtime.device
        states = {"cpu": torch.get_rng_state()}
        if not self.runtime.on_cpu:
            states["cuda"] = torch.cuda.get_rng_state(device)
        gathered = {}
        for name, own in states.items():
            parts = [torch.empty_like(own, device=device) for _ in range(self.runtime.world_size)]
            dist.all_gather(parts, own.to(device))
            gathered[name] = torch.stack(parts).cpu()
        return gathered

    def set_random_states(self, states: Mapping[str, Tensor]) -> None:
        """Give this rank its own of `random_states`."""
        torch.set_rng_state(states["cpu"][self.runtime.rank].clone())
        if not self.runtime.on_cpu and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"][self.runtime.rank].clone(), self.runtime.device)

    @property
    def _layout(self) -> Layout:
        from colossal_ext.states import Layout

        tp_group = self.plugin.tp_group if self.args.tp > 1 else None
        return Layout(self._dp_group, tp_group, self.workload.parameter_shapes)

    def close(self) -> None:
        """Drop everything boosted, so that the plugin's process groups end before the default one."""
        if self.args.plugin == "low_level_zero" and self.optimizer is not None:
            self.optimizer.close()
        if self.args.plugin == "gemini":
            from colossal_ext.gemini_hook import forget_layouts

            forget_layouts()
        self.model = self.optimizer = self.scheduler = self.plugin = None
        del self.booster
        gc.collect()

    def _counted(self, loss: Tensor) -> Tensor:
        return loss.float() if self.counts else torch.zeros((), device=self.runtime.device)

    def _accumulation(self, last: bool) -> AbstractContextManager[None]:
        """Return the context that holds back the exchange of gradients until the last micro-batch."""
        shards_gradients = self.args.plugin == "gemini" or (self.args.zero_stage == 2 and self.dp_size > 1)
        if last or shards_gradients:
            return nullcontext()
        return self.booster.no_sync(self.model, self.optimizer)

    def _run_pipeline(self, batch: dict[str, Tensor], scale: Tensor | None) -> Tensor:
        total = torch.zeros((), device=self.runtime.device)

        def criterion(outputs: Any, inputs: Any) -> Tensor:
            total.add_(outputs.loss.detach())
            # The schedule divides by the number of micro-batches: a mean of means, undone here.
            return outputs.loss * self.num_microbatches * (1.0 if scale is None else scale)

        optimizer = None if scale is None else self.optimizer
        # Upstream copies each micro-batch to the device by itself, and the host would wait for every copy.
        rows = _to_device(batch, self.runtime.device)
        self.booster.execute_pipeline(_once(rows), self.model, criterion, optimizer, return_loss=True)
        return self._counted(total)


def _hook_layers(model: Any) -> None:
    from colossal_ext.gemini_layers import hook_layers, with_plain_tensors

    hook_layers(decoder_layers(model))
    model.loss_function = with_plain_tensors(model.loss_function)


def _spare_the_host(model: Any, optimizer: Any, *, waits: bool) -> None:
    """Let the host do less a step.

    Args:
        waits: the host has to wait for gradients and their norm: it updates some of the weights.
    """
    from colossal_ext.gemini_hook import use_layer_hook
    from colossal_ext.gemini_layers import drop_gradients_directly

    use_layer_hook(model)
    drop_gradients_directly(model)
    if waits:
        return
    from colossal_ext.gemini_device import StreamOrder, clip_on_device

    if model.enable_async_reduce:
        model.async_reduce_stream = StreamOrder(model.async_reduce_stream)
    if optimizer is not None:
        clip_on_device(optimizer)


def _once(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    yield batch


def _to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _make_booster(plugin: Any, mixed_precision: Any) -> Booster:
    from colossalai.booster import Booster

    return Booster(plugin=plugin, mixed_precision=mixed_precision)


def make_optimizer(groups: list[dict[str, Any]], args: TrainArgs, learning_rate: float) -> Optimizer:
    """Return Adam with decoupled weight decay, the same class for every plugin. Needs an `Engine` to be there."""
    from colossal_ext.adam_kernels import CompileFreeAdam

    return CompileFreeAdam(
        groups, lr=learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, adamw_mode=True
    )


def make_scheduler(optimizer: Optimizer, args: TrainArgs, num_steps: int) -> LRScheduler:
    """Return the learning-rate schedule over `num_steps` steps, warm-up included."""
    from transformers import get_scheduler

    num_warmup_steps = args.num_warmup_steps or round(args.warmup_ratio * num_steps)
    return get_scheduler(args.lr_scheduler_type, optimizer, num_warmup_steps, num_steps)


def placing(where: Place, args: TrainArgs, runtime: Runtime) -> Callable[[nn.Module], Any] | None:
    """Return what becomes of a module's weights as soon as they are drawn on a GPU: `planner.weights_place`."""
    if where == "device":
        return None
    if where == "host":
        return lambda module: module._apply(torch.Tensor.cpu, recurse=False)
    dtype = DTYPES[args.precision]
    if args.plugin in ROUNDING_PLUGINS:  # fp32 weights follow once the model is boosted
        return lambda module: module._apply(lambda each: each.to(dtype), recurse=False)
    from colossal_ext.sharded_zero import keep_share

    return partial(keep_share, rank=runtime.rank, num_ranks=runtime.world_size, dtype=dtype)


def _make_plugin(args: TrainArgs, runtime: Runtime, workload: Workload) -> tuple[Any, Any]:
    """Return ColossalAI's plugin, and a MixedPrecision object for the one that needs it."""
    from colossal_ext.mends import install_mends

    install_mends(on_cpu=runtime.on_cpu)
    return PLUGIN_TABLE[args.plugin].make(args, runtime, workload), _mixed_precision(args, runtime)


def _mixed_precision(args: TrainArgs, runtime: Runtime) -> Any:
    """Return what makes TorchDDP, the one plugin without a precision of its own, compute in 16 bits."""
    if not args.plugin.startswith("torch_ddp") or args.precision == "fp32":
        return None
    from colossal_ext.mixed_precision import AutocastPrecision

    return AutocastPrecision(runtime.device.type, DTYPES[args.precision], initial_scale=INITIAL_LOSS_SCALE)


def _torch_ddp(args: TrainArgs, runtime: Runtime, workload: Workload) -> Any:
    from colossal_ext.data_parallel import DataParallelPlugin

    return DataParallelPlugin()


def _low_level_zero(args: TrainArgs, runtime: Runtime, workload: Workload) -> Any:
    from colossal_ext.local_zero import LocalZeroPlugin
    from colossal_ext.sharded_zero import ShardedZeroPlugin

    plugin = LocalZeroPlugin if runtime.world_size == 1 else ShardedZeroPlugin
    return plugin(
        offload_frac=args.offload_optim_frac,
        updates_in_backward=args.step_in_backward == "on",
        stage=args.zero_stage,
        precision=args.precision,
        max_norm=args.max_grad_norm,
        initial_scale=INITIAL_LOSS_SCALE,
    )


def _gemini(args: TrainArgs, runtime: Runtime, workload: Workload) -> Any:
    from colossalai.booster.plugin import GeminiPlugin

    from colossal_ext.gemini_chunks import gemini_chunk_settings

    fractions = {"offload_optim_frac": args.offload_optim_frac, "offload_param_frac": args.offload_param_frac}
    if runtime.world_size == 1 and not args.offload_param_frac:
        fractions["shard_param_frac"] = 0.0  # a chunk given away between forward and backward would free nothing
    return GeminiPlugin(
        placement_policy=args.placement,
        precision=args.precision,
        max_norm=args.max_grad_norm,
        initial_scale=INITIAL_LOSS_SCALE,
        enable_gradient_accumulation=args.gradient_accumulation_steps > 1,
        # On one GPU without offload there is nothing to reduce and nowhere to move it.
        enable_async_reduce=not runtime.on_cpu and (runtime.world_size > 1 or _uses_host(args)),
        max_prefetch=int(args.max_prefetch),
        pin_memory=not runtime.on_cpu,
        **(fractions if args.placement == "static" else {}),
        **gemini_chunk_settings(workload.parameter_numels, runtime.world_size),
    )


def _uses_host(args: TrainArgs) -> bool:
    """Return whether Gemini may keep gradients or states on the host."""
    return args.placement == "auto" or args.offload_optim_frac > 0


def _hybrid_parallel(args: TrainArgs, runtime: Runtime, workload: Workload) -> Any:
    from colossalai.booster.plugin import HybridParallelPlugin

    from colossal_ext.opt_policy import OPTCausalLMPolicy

    return HybridParallelPlugin(
        tp_size=args.tp,
        pp_size=args.pp,
        precision=args.precision,
        zero_stage=args.zero_stage,
        max_norm=args.max_grad_norm,
        initial_scale=INITIAL_LOSS_SCALE,
        num_microbatches=pipeline_microbatches(args) if args.pp > 1 else None,
        pp_style=args.pp_schedule,
        num_model_chunks=model_chunks(args),
        enable_metadata_cache=not workload.varying_length,
        overlap_p2p=not runtime.on_cpu,  # hangs on gloo
        overlap_communication=not runtime.on_cpu,
        cpu_offload=False,
        make_vocab_size_divisible_by=1,  # a padded vocabulary breaks upstream's optimizer checkpoint
        custom_policy=OPTCausalLMPolicy(layers_per_graph=_layers_per_graph(args, workload)),
    )


def _layers_per_graph(args: TrainArgs, workload: Workload) -> int:
    """Return how many layers are compiled at a time: `planner.layers_per_graph`."""
    if args.compile != "on":
        return 1
    names = (name for name in workload.parameter_shapes if ".layers.0." in name)
    return layers_per_graph(
        args.plugin,
        args.pp,
        sum(workload.parameter_shapes[name].numel() for name in names) // args.tp,
        4 if args.precision == "fp32" else 2,
        args.train_batch_size * args.block_size,
        updates_between=args.step_in_backward == "on" or bool(args.offload_optim_frac),
    )


@dataclass(frozen=True)
class PluginRow:
    """One line of the table of plugins.

    Args:
        make: returns ColossalAI's plugin for the settings.
        divides: what is shared out among the GPUs, for the log.
    """

    make: Callable[[TrainArgs, Runtime, Workload], Any]
    divides: str


PLUGIN_TABLE = {
    "torch_ddp": PluginRow(_torch_ddp, "the data"),
    "torch_ddp_fp16": PluginRow(_torch_ddp, "the data"),
    "low_level_zero": PluginRow(
        _low_level_zero, "the data, the optimizer states and a step's gradients (stage 2: those that accumulate, too)"
    ),
    "gemini": PluginRow(_gemini, "the data, the parameters, gradients and optimizer states"),
    "hybrid_parallel": PluginRow(_hybrid_parallel, "the data, each layer by --tp, the depth by --pp"),
}
