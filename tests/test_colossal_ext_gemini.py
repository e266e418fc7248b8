"""Gemini's chunk sizes and placement, without processes; training with them is in test_colossal_ext_training.py."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import colossal_ext  # noqa: F401  # before ColossalAI, which it imports the lean way

# isort: split
import pytest
import torch
import torch.distributed as dist
from colossalai.zero.gemini import placement_policy
from colossalai.zero.gemini.chunk.chunk import Chunk
from colossalai.zero.gemini.chunk.search_utils import search_chunk_configuration
from transformers import OPTConfig, OPTForCausalLM

from colossal_ext import gemini_chunks as chunks
from colossal_ext import gemini_host
from colossal_ext.gemini_device import DeviceChunk
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


@pytest.mark.gpu
def test_gradients_are_not_overwritten_while_another_stream_reduces_them(one_nccl_rank: None) -> None:
    stream, numel = torch.cuda.Stream(), 2**24
    chunk = DeviceChunk(numel, dist.group.WORLD, torch.float32)
    chunk.append_tensor(torch.ones(numel, device="cuda"))
    chunk.close_chunk()
    chunk.access_chunk()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # a reduction that is late: the next tensor of this size is made before it reads
        chunk.reduce()
    torch.empty(numel, device="cuda").zero_()
    torch.cuda.synchronize()
    assert chunk.payload.sum().item() == numel
