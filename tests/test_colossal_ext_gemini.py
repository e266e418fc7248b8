"""Gemini's chunk sizes, placement and layers, without processes; training is in test_colossal_ext_training.py."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import colossal_ext  # noqa: F401  # before ColossalAI, which it imports the lean way

# isort: split
import pytest
import torch
import torch.distributed as dist
from colossalai.tensor.colo_tensor import ColoTensor
from colossalai.tensor.param_op_hook import ColoParamOpHook, ColoParamOpHookManager
from colossalai.zero.gemini import gemini_hook, placement_policy
from colossalai.zero.gemini.chunk import TensorState
from colossalai.zero.gemini.chunk.chunk import Chunk, TensorInfo
from colossalai.zero.gemini.chunk.search_utils import search_chunk_configuration
from colossalai.zero.gemini.gemini_hook import GeminiZeROHook
from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer
from transformers import OPTConfig, OPTForCausalLM

from colossal_ext import gemini_chunks as chunks
from colossal_ext import gemini_host, gemini_layers
from colossal_ext.gemini_device import DeviceChunk, combined_scale
from colossal_ext.gemini_hook import LayerHook, Residents
from colossal_ext.gemini_placement import ExactStaticPlacementPolicy, install_exact_placement
from opt_sizes import OPT_SHAPES

SIZES = list(OPT_SHAPES)


def meta_model(size: str) -> OPTForCausalLM:
    """Return a published shape without memory."""
    shape = OPT_SHAPES[size]
    config = OPTConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        ffn_dim=4 * shape.hidden_size,
        word_embed_proj_dim=shape.word_embed_proj_dim or shape.hidden_size,
        do_layer_norm_before=shape.pre_norm,
    )
    with torch.device("meta"):
        return OPTForCausalLM(config)


def numels_of(size: str) -> list[int]:
    return [parameter.numel() for parameter in meta_model(size).parameters()]


@pytest.mark.parametrize("world_size", [1, 2, 8, 24])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_cut_into_chunks_with_little_padding(size: str, world_size: int) -> None:
    plan = chunks.plan_chunks(numels_of(size), world_size)
    assert len(plan.chunk_numels) >= 3
    assert plan.padding_share < 0.025
    assert all(numel % world_size == 0 for numel in plan.chunk_numels)


@pytest.mark.parametrize("world_size", [2, 24])
@pytest.mark.parametrize("size", ["tiny", "125m", "350m", "6.7b", "175b"])
def test_colossalai_search_arrives_at_the_planned_chunk(
    size: str, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = meta_model(size)
    numels = [parameter.numel() for parameter in model.parameters()]
    settings = chunks.gemini_chunk_settings(numels, world_size)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: world_size)
    found, *_ = search_chunk_configuration(
        model, settings["search_range_m"], settings["hidden_dim"], settings["min_chunk_size_m"]
    )
    planned = chunks.plan_chunks(numels, world_size).chunk_numel
    assert found == {world_size: {"chunk_size": planned, "keep_gathered": False}}


def test_layout_closes_a_chunk_that_the_next_parameter_does_not_fit() -> None:
    plan = chunks.lay_out([6, 5, 30, 4, 4, 3], chunk_numel=9, world_size=4)
    assert plan.chunk_numels == (12, 32, 12)  # 9 and 30 rounded up to ranks; 6 + 5, 30, 4 + 4 + 3
    assert plan.padding_numel == 56 - 52


def test_a_large_parameter_gets_a_chunk_of_its_own_size() -> None:
    assert chunks.lay_out([100, 5], chunk_numel=10, world_size=1).chunk_numels == (100, 10)


@pytest.mark.parametrize("numels", [[5], [1, 1], [7, 100_000], [3] * 1000])
def test_any_model_gets_settings_that_do_not_replicate_it(numels: list[int]) -> None:
    settings = chunks.gemini_chunk_settings(numels, world_size=2)
    assert settings["min_chunk_size_m"] * 2**20 <= sum(numels)


# --- placement --------------------------------------------------------------------------------------------------------


def place(policy_class: Any, monkeypatch: pytest.MonkeyPatch, **fractions: float) -> tuple[Any, int]:
    """Return the policy and how many of ten chunks of twelve parameters it puts on the host."""
    sharded = [FakeChunk(number) for number in range(10)]
    owner = {tensor: chunk for chunk in sharded for tensor in chunk.get_tensors()}
    manager = SimpleNamespace(
        get_chunk=owner.get, get_chunks=lambda tensors: tuple(dict.fromkeys(map(owner.get, tensors)))
    )
    gpu = SimpleNamespace(get_current_device=lambda: torch.device("cuda", 0))
    monkeypatch.setattr(placement_policy, "get_accelerator", lambda: gpu)
    monkeypatch.setattr("colossal_ext.gemini_placement.get_accelerator", lambda: gpu)
    policy = policy_class(manager, **fractions)
    devices: dict[str, torch.device] = {}
    policy.setup_grads_device(list(owner), devices)
    return policy, sum(device.type == "cpu" for device in devices.values()) // 12


class FakeChunk:
    keep_gathered, chunk_mem, offloaded = False, 100, False

    def __init__(self, number: int) -> None:
        self.tensors = [f"chunk {number} tensor {index}" for index in range(12)]

    def get_tensors(self) -> list[str]:
        return self.tensors


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_a_fraction_of_the_chunks_is_offloaded(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    _, num_offloaded = place(ExactStaticPlacementPolicy, monkeypatch, offload_optim_frac=fraction)
    assert num_offloaded == math.ceil(10 * fraction)


def test_memory_limits_count_each_chunk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = place(ExactStaticPlacementPolicy, monkeypatch, shard_param_frac=0.75)
    assert policy.keep_gathered_chunk_mem == 250
    assert policy.keep_cuda_chunk_mem == 1000


def test_upstream_placement_still_offloads_everything_for_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    _, num_offloaded = place(placement_policy.StaticPlacementPolicy, monkeypatch, offload_optim_frac=0.1)
    assert num_offloaded == 10, "fixed upstream: colossal_ext/gemini_placement.py may go"


def test_installing_replaces_the_static_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(placement_policy.PlacementPolicyFactory.policies, "static", None)
    install_exact_placement()
    assert placement_policy.PlacementPolicyFactory.create("static") is ExactStaticPlacementPolicy


def test_host_chunks_are_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(get_current_device=lambda: torch.device("cuda", 0))
    monkeypatch.setattr(gemini_host, "get_accelerator", lambda: gpu)
    with pytest.raises(RuntimeError, match="CPU rehearsals only"):
        gemini_host.install_gemini_host_chunks()


# --- chunks on a GPU --------------------------------------------------------------------------------------------------


def test_upstream_chunks_still_pin_a_copy_and_free_what_a_stream_reads() -> None:
    source = inspect.getsource(Chunk)
    assert "if self.pin_memory or self.shard_device.type" in source, "fixed upstream: DeviceChunk need not close chunks"
    assert "record_stream" not in source, "fixed upstream: DeviceChunk.reduce may go"


@pytest.fixture
def one_nccl_rank() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_chunk_takes_pinned_memory_when_it_leaves_the_gpu_and_comes_back_unchanged(
    one_nccl_rank: None, dtype: torch.dtype
) -> None:
    weights = torch.randn(1000, device="cuda").to(dtype)
    chunk = DeviceChunk(1001, dist.group.WORLD, dtype, pin_memory=True)
    chunk.append_tensor(weights.clone())
    chunk.close_chunk()
    assert chunk.memory_usage["cpu"] == 0
    chunk.shard_move(torch.device("cpu"))
    assert chunk.payload.is_pinned()
    assert chunk.payload.untyped_storage().nbytes() == 1001 * dtype.itemsize
    assert torch.equal(chunk.payload[:1000], weights.cpu())
    chunk.shard_move(torch.device("cuda", torch.cuda.current_device()))
    assert chunk.device_type == "cuda"
    assert torch.equal(chunk.payload[:1000], weights)


def gathered_ones(numel: int) -> DeviceChunk:
    chunk = DeviceChunk(numel, dist.group.WORLD, torch.float32)
    chunk.append_tensor(torch.ones(numel, device="cuda"))
    chunk.close_chunk()
    chunk.access_chunk()
    torch.cuda.synchronize()
    return chunk


@pytest.mark.gpu
def test_gradients_are_not_overwritten_while_another_stream_reduces_them(one_nccl_rank: None) -> None:
    stream, numel = torch.cuda.Stream(), 2**24
    chunk = gathered_ones(numel)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # a reduction that is late: the next tensor of this size is made before it reads
        chunk.reduce()
    torch.empty(numel, device="cuda").zero_()
    torch.cuda.current_stream().synchronize()
    assert not stream.query(), "one stream waited for the other, so that nothing was tested"
    stream.synchronize()
    assert chunk.payload.sum().item() == numel


@pytest.mark.gpu
@pytest.mark.parametrize("async_access", [False, True])
def test_a_shard_is_not_overwritten_while_another_stream_gathers_it(one_nccl_rank: None, async_access: bool) -> None:
    stream, numel = torch.cuda.Stream(), 2**24
    chunk = gathered_ones(numel)
    with torch.cuda.stream(stream):
        chunk.reduce()  # makes the shard
    torch.cuda.synchronize()
    torch.cuda._sleep(10**8)
    if work := chunk.access_chunk(async_access):
        work.wait()
    with torch.cuda.stream(stream):
        torch.empty(numel, device="cuda").zero_()
    stream.synchronize()
    assert not torch.cuda.current_stream().query(), "one stream waited for the other, so that nothing was tested"
    assert chunk.payload.sum().item() == numel


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_the_divisor_on_the_device_is_upstreams(max_norm: float) -> None:
    def optimizer(squares: list[Any]) -> Any:
        numbered = enumerate(squares)
        chunks = [SimpleNamespace(is_gathered=True, l2_norm=square, count_id=number) for number, square in numbered]
        made = object.__new__(GeminiOptimizer)
        manager = SimpleNamespace(reuse_fp16_chunk=True)
        made.module, made.chunk16_set = SimpleNamespace(chunk_manager=manager), chunks
        made.mix_precision_mixin = SimpleNamespace(get_grad_div_scale=lambda: 8.0)
        made.clipping_flag, made.max_norm = True, max_norm
        return made

    ours = optimizer([torch.tensor(9.0), torch.tensor(55.0)])
    upstream = optimizer([9.0, 55.0])
    assert combined_scale(ours).item() == pytest.approx(upstream._get_combined_scale())
    assert ours._current_grad_norm.item() == upstream._current_grad_norm == 8.0
    assert all(chunk.l2_norm is None for chunk in ours.chunk16_set)


def test_the_divisor_does_not_depend_on_the_order_of_a_set() -> None:
    torch.manual_seed(0)
    squares, found = (10 ** (6 * torch.rand(40))).tolist(), set()
    for _ in range(100):
        chunks = [
            SimpleNamespace(is_gathered=True, l2_norm=torch.tensor(square), count_id=number)
            for number, square in enumerate(squares)
        ]
        manager = SimpleNamespace(chunk_manager=SimpleNamespace(reuse_fp16_chunk=True))
        mixin = SimpleNamespace(get_grad_div_scale=lambda: 1.0)
        order = torch.randperm(len(chunks)).tolist()
        optimizer = SimpleNamespace(
            module=manager,
            chunk16_set=[chunks[number] for number in order],
            mix_precision_mixin=mixin,
            clipping_flag=True,
            max_norm=1.0,
        )
        found.add(combined_scale(optimizer).item())
    assert len(found) == 1


# --- layers -----------------------------------------------------------------------------------------------------------


class ReleasingHook(ColoParamOpHook):
    """Frees the storage of parameters where Gemini may, fills it again where it must, and notes both."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.storages: dict[torch.Tensor, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def gather(self, name: str, params: list[torch.Tensor]) -> None:
        self.calls.append(f"{name} {len(params)}")
        for storage, content in (self.storages[param] for param in params if param in self.storages):
            storage.resize_(content.nbytes())
            storage.copy_(content)

    def release(self, name: str, params: list[torch.Tensor]) -> None:
        self.calls.append(name)
        for param in params:
            storage = param.untyped_storage()
            self.storages.setdefault(param, (storage, storage.clone()))
            storage.resize_(0)

    def pre_forward(self, params: list[torch.Tensor]) -> None:
        self.gather("pre_forward", params)

    def post_forward(self, params: list[torch.Tensor]) -> None:
        self.release("post_forward", params)

    def pre_backward(self, params: list[torch.Tensor]) -> None:
        self.gather("pre_backward", params)

    def post_backward(self, params: list[torch.Tensor]) -> None:
        self.calls.append("post_backward")


def small_layer(*, recomputes: bool = False) -> Any:
    """Return one decoder layer, the same for everyone."""
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, dropout=0)
    model: Any = OPTForCausalLM(config).train()
    if recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.model.decoder.layers[0]


def gradients(layer: Any, *hooks: ColoParamOpHook) -> list[torch.Tensor | None]:
    """Return those of the input and the parameters."""
    hidden = torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16).requires_grad_()
    with ColoParamOpHookManager.use_hooks(*hooks):
        layer(hidden).square().sum().backward()
    return [hidden.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_a_layer_calls_the_hooks_once_and_uses_no_parameter_that_they_release(
    backend: str | None, recomputes: bool
) -> None:
    layer, hook = small_layer(recomputes=recomputes), ReleasingHook()
    if backend:
        layer.compile(backend=backend)
    gemini_layers.hook_layers([layer])
    assert not layer.gradient_checkpointing  # it would recompute twice
    for parameter in layer.parameters():
        parameter.register_hook(lambda gradient: hook.calls.append("gradient"))
    torch.testing.assert_close(gradients(layer, hook), gradients(small_layer()))
    again = ["pre_forward 16"] if recomputes else []
    first, last = ["pre_forward 16", "post_forward", "pre_backward 16"], ["post_backward", *["gradient"] * 16]
    assert hook.calls == [*first, *again, *last]


class RecordingHook(LayerHook):
    """Ours, over two chunks that are always there, and that share out a layer's parameters."""

    def __init__(self, layer: Any, *, reuse_fp16_chunk: bool) -> None:
        parameters = list(layer.parameters())
        self.chunks = [FilledChunk(parameters[:10]), FilledChunk(parameters[10:])]
        manager = SimpleNamespace(
            reuse_fp16_chunk=reuse_fp16_chunk,
            get_chunk=lambda parameter: next(chunk for chunk in self.chunks if parameter in chunk.tensors_info),
        )
        super().__init__(SimpleNamespace(chunk_manager=manager))

    def pre_op(self, params: Any) -> None: ...


class FilledChunk:
    def __init__(self, parameters: list[torch.Tensor]) -> None:
        ends = list(itertools.accumulate(parameter.numel() for parameter in parameters))
        self.tensors_info = {
            parameter: TensorInfo(TensorState.COMPUTE, end - parameter.numel(), end)
            for parameter, end in zip(parameters, ends, strict=True)
        }
        self.tensor_state_cnter = dict.fromkeys(TensorState, 0) | {TensorState.COMPUTE: len(parameters)}
        self.cuda_global_chunk = torch.zeros(ends[-1])

    def states(self) -> list[TensorState]:
        return [info.state for info in self.tensors_info.values()]


@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_a_layers_gradients_are_copied_at_once_and_gemini_sees_the_last_of_each_chunk(backend: str | None) -> None:
    layer = small_layer()
    if backend:
        layer.compile(backend=backend)
    hook = RecordingHook(layer, reuse_fp16_chunk=True)
    gemini_layers.hook_layers([layer])
    with hook.switch_to_backward():
        seen = gradients(layer, hook)[1:]
    expected = [gradient for gradient in gradients(small_layer())[1:] if gradient is not None]
    assert [number for number, gradient in enumerate(seen) if gradient is not None] == [9, 15]
    for chunk, numbers in zip(hook.chunks, (range(9), range(10, 15)), strict=True):
        flat = torch.cat([expected[number].flatten() for number in numbers])
        torch.testing.assert_close(chunk.cuda_global_chunk[: flat.numel()], flat)
        assert not chunk.cuda_global_chunk[flat.numel() :].any()  # the last one's, which grad_handle copies
        assert chunk.states() == [TensorState.READY_FOR_REDUCE] * len(numbers) + [TensorState.HOLD_AFTER_BWD]


def test_with_accumulation_gemini_sees_every_gradient() -> None:
    layer = small_layer()
    hook = RecordingHook(layer, reuse_fp16_chunk=False)
    gemini_layers.hook_layers([layer])
    with hook.switch_to_backward():
        found = gradients(layer, hook)
    torch.testing.assert_close(found, gradients(small_layer()))
    assert not any(TensorState.READY_FOR_REDUCE in chunk.states() for chunk in hook.chunks)


def one_chunk(states: Iterable[TensorState]) -> FilledChunk:
    chunk = FilledChunk([torch.zeros(2) for _ in states])
    for info, state in zip(chunk.tensors_info.values(), states, strict=True):
        info.state = state
    chunk.tensor_state_cnter = {state: chunk.states().count(state) for state in TensorState}
    return chunk


@pytest.mark.parametrize("state", TensorState)
def test_parameters_change_state_together_as_upstream_changes_each(state: TensorState) -> None:
    together, one_by_one = one_chunk([*TensorState] * 2), one_chunk([*TensorState] * 2)
    Residents(cast(Any, together), (), tuple(together.tensors_info.values())).change_to(state)
    # Upstream's own, which calls `self._Chunk__update_one_tensor_info`.
    update = functools.partial(Chunk._Chunk__update_one_tensor_info, one_by_one)
    one_by_one._Chunk__update_one_tensor_info = update  # type: ignore[attr-defined]
    for tensor in one_by_one.tensors_info:
        Chunk.tensor_trans_state(cast(Any, one_by_one), tensor, state)
    assert together.states() == one_by_one.states()
    assert together.tensor_state_cnter == one_by_one.tensor_state_cnter


def test_a_set_of_parameters_is_looked_up_once_and_ignored_ones_are_left_out() -> None:
    layer = small_layer()
    hook, parameters = RecordingHook(layer, reuse_fp16_chunk=True), list(layer.parameters())
    parameters[3]._ddp_to_ignore = True
    asked = [*parameters[2:12], parameters[2]]  # the first once more
    found = hook.residents(asked)
    assert [each.numbers for each in found] == [(0, 2, 3, 4, 5, 6, 7), (8, 9)]
    assert [each.chunk for each in found] == hook.chunks
    assert hook.residents(list(asked)) is found


class NamedChunk:
    def __init__(self, name: str) -> None:
        self.name, self.tensor_state_cnter = name, dict.fromkeys(TensorState, 0)


class NotingManager:
    """A GeminiManager of six operators with a chunk each, after its warm-up; notes what is fetched, and what ahead."""

    def __init__(self, max_prefetch: int) -> None:
        self.chunks = [NamedChunk(f"{number}") for number in range(6)]
        self.compute_list, self.compute_idx = [(chunk,) for chunk in self.chunks], -1
        self.async_works: dict[NamedChunk, str] = {}
        self.noted: list[str] = []
        self.recorded = 0
        self.chunk_manager: Any = SimpleNamespace(
            accessed_chunks=set(),
            access_chunk=self.access_chunk,
            get_chunks=tuple,
            trans_tensor_state=lambda tensor, state: None,
            _prefetch_stream=None,
        )
        self.placement_policy = ExactStaticPlacementPolicy(self.chunk_manager, max_prefetch=max_prefetch)

    def access_chunk(self, chunk: NamedChunk, async_access: bool = False) -> str | None:
        self.chunk_manager.accessed_chunks.add(chunk)
        self.noted.append(f"{chunk.name} ahead" if async_access else chunk.name)
        return "work" if async_access else None

    def add_work(self, chunk: NamedChunk, work: str) -> None:
        self.async_works[chunk] = work

    def wait_chunks(self, chunks: Iterable[NamedChunk]) -> list[NamedChunk]:
        return [chunk for chunk in chunks if not self.async_works.pop(chunk, None)]

    def adjust_layout(self, chunks: Iterable[NamedChunk], record_anyway: bool) -> None:
        self.compute_idx += 1
        self.recorded += record_anyway

    def is_warmup(self) -> bool:
        return False

    def sample_overall_data(self) -> None: ...

    def record_model_data_volume(self) -> None: ...

    def run(self, hook: LayerHook) -> list[str]:
        """Return what is fetched for three of the operators."""
        for chunk in self.chunks[:3]:
            hook._bring([Residents(cast(Any, chunk), (), ())])
        return self.noted


def test_chunks_are_fetched_ahead_in_the_order_of_the_operators() -> None:
    expected = ["0", "1 ahead", "2 ahead", "3 ahead", "4 ahead"]
    manager = NotingManager(max_prefetch=2)
    assert manager.run(LayerHook(manager)) == expected
    assert manager.recorded == 3  # so that a later step knows what is next
    manager = NotingManager(max_prefetch=2)
    hook = LayerHook(manager)
    with hook.switch_to_backward(), torch.no_grad():  # as autograd calls a function's backward
        assert manager.run(hook) == expected
    assert [chunk.name for chunk in manager.async_works] == ["3", "4"]


def test_nothing_is_fetched_ahead_or_recorded_in_evaluation_or_without_being_asked() -> None:
    manager = NotingManager(max_prefetch=2)
    with torch.no_grad():
        assert manager.run(LayerHook(manager)) == ["0", "1", "2"]
    assert manager.recorded == 0
    manager = NotingManager(max_prefetch=0)
    assert manager.run(LayerHook(manager)) == ["0", "1", "2"]
    assert manager.recorded == 0


def test_upstream_still_fetches_ahead_and_records_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemini_hook, "get_accelerator", lambda: SimpleNamespace(stream=contextlib.nullcontext))
    manager = NotingManager(max_prefetch=2)
    hook = GeminiZeROHook(cast(Any, manager))
    with torch.no_grad():
        hook.pre_op(cast(Any, manager.chunks[:1]))
    assert manager.noted == ["0", "1 ahead", "2 ahead"] and manager.recorded == 1, "fixed upstream: see LayerHook"


def test_a_layer_that_fails_keeps_its_parameters() -> None:
    layer = small_layer()
    gemini_layers.hook_layers([layer])
    before = list(layer.parameters())
    with pytest.raises(RuntimeError, match="shape"):
        layer(torch.zeros(2, 5, 7))
    assert all(new is old for new, old in zip(layer.parameters(), before, strict=True))


def test_a_function_gets_plain_tensors_and_their_gradients_return() -> None:
    leaf = torch.ones(2, requires_grad=True)
    logits = leaf * 3
    logits.__class__ = ColoTensor

    @gemini_layers.with_plain_tensors
    def function(factor: float, *, logits: torch.Tensor) -> torch.Tensor:
        assert type(logits) is torch.Tensor
        return (factor * logits).sum()

    function(5.0, logits=logits).backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [15.0, 15.0]
