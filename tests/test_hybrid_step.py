"""HybridParallel's own step beside upstream's, on one rank; on several it is in the equivalence matrix (test_equivalence)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import colossal_ext  # noqa: F401  # before ColossalAI, which it imports the lean way

# isort: split
import pytest
import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
from colossalai.booster.plugin.hybrid_parallel_plugin import (
    HybridParallelAMPOptimizer,
    HybridParallelModule,
    HybridParallelPlugin,
)
from colossalai.nn.optimizer import HybridAdam
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import OPTConfig, OPTForCausalLM

from colossal_ext import hybrid_gradients, hybrid_step, pipeline_barrier, upstream
from colossal_ext.adam_kernels import CompileFreeAdam
from colossal_ext.data_parallel import DataParallelModel
from colossal_ext.hybrid_step import install_hybrid_step_mend
from colossal_ext.mends import install_mends
from colossal_ext.opt_policy import OPTCausalLMPolicy

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    install_mends(on_cpu=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(
    precision: str = "bf16", *, device: str = "cpu", optimizer: type[Any] = CompileFreeAdam, **options: Any
) -> tuple[nn.Module, Any]:
    """Return a 16-bit model and what HybridParallel makes of its optimizer on one rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).to(device, DTYPES[precision])
    boosted = SimpleNamespace(stage_manager=None, shared_params=[])
    adam = optimizer(model.parameters(), lr=1e-2, weight_decay=0.1)
    return model, HybridParallelAMPOptimizer(
        adam, boosted, use_pipeline=False, param_info={}, precision=precision, initial_scale=8.0, **options
    )


def train(model: nn.Module, optimizer: Any, step: Any, steps: int = 3) -> list[Tensor]:
    """Return fp32 weights and the model's own after some steps of the same gradients."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        scale = optimizer.mixed_precision.pre_backward(torch.ones(()))
        for parameter in model.parameters():
            parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter)
        step(optimizer)
        optimizer.zero_grad()
    return [*optimizer.master_to_working_map, *model.parameters()]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_is_upstreams(device: str, max_norm: float, precision: str) -> None:
    ours, theirs = (make(precision, device=device, max_norm=max_norm) for _ in range(2))
    pairs = zip(
        train(*ours, HybridParallelAMPOptimizer.step), train(*theirs, MixedPrecisionOptimizer.step), strict=True
    )
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-5 if mine.dtype is torch.float32 else 1e-2, atol=1e-6)
    if max_norm:
        assert float(ours[1].get_grad_norm()) == pytest.approx(float(theirs[1].get_grad_norm()), rel=1e-6)


def test_no_gradient_is_copied_to_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make(max_norm=0.5)
    seen: list[Any] = []
    monkeypatch.setattr(
        optimizer.optim,
        "update",
        lambda on_host, tensors, settings: seen.extend(
            (grad.dtype, copy.data_ptr()) for grad, *_, copy in tensors.rows()
        ),
    )
    train(model, optimizer, HybridParallelAMPOptimizer.step, steps=1)
    assert seen == [(torch.bfloat16, parameter.data_ptr()) for parameter in model.parameters()]
    assert all(master.grad is None for master in optimizer.master_to_working_map)


def test_an_overflow_is_skipped() -> None:
    model, optimizer = make("fp16")
    before = [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def boost(model: nn.Module) -> tuple[Any, Any]:
    plugin = HybridParallelPlugin(tp_size=1, pp_size=1, precision="bf16", custom_policy=OPTCausalLMPolicy())
    adam = CompileFreeAdam(model.parameters(), lr=1e-2)
    return plugin.configure(model, adam)[:2]


def small_opt() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "max_position_embeddings": 8, "hidden_size": 8, "ffn_dim": 16}
    return OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))


def test_one_rank_has_no_ddp_whose_buckets_would_keep_the_gradients() -> None:
    module = small_opt()
    model, optimizer = boost(module)
    assert isinstance(model.module, DataParallelModel) and model.unwrap() is module
    assert not any(isinstance(each, DistributedDataParallel) for each in model.modules())
    rows = torch.arange(8)[None]
    optimizer.backward(model(input_ids=rows, labels=rows).loss)
    assert all(parameter.grad is not None for parameter in module.parameters())
    optimizer.step()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_fp32_weights_are_made_of_16_bit_ones_so_that_a_large_model_may_be_cast_before() -> None:
    (_, whole), (_, cast) = boost(small_opt()), boost(small_opt().bfloat16())
    pairs = list(zip(whole.master_to_working_map, cast.master_to_working_map, strict=True))
    assert pairs and all(one.dtype is torch.float32 and torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", ["find_unused_parameters", "static_graph"])
def test_an_option_of_ddp_that_would_have_no_effect_is_refused(name: str) -> None:
    plugin = HybridParallelPlugin(
        tp_size=1, pp_size=1, precision="bf16", custom_policy=OPTCausalLMPolicy(), **{name: True}
    )
    with pytest.raises(ValueError, match=f"{name}: has no effect"):
        plugin.configure(small_opt())


def test_another_optimizer_gets_upstreams_step(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(MixedPrecisionOptimizer, "step", lambda self: called.append(self))
    _, optimizer = make(optimizer=HybridAdam)
    optimizer.step()
    assert called == [optimizer]


class FakeDistributed:
    """Two stages of two tensor-parallel ranks, whose sums are taken as twice the own."""

    def __init__(self) -> None:
        self.groups: list[Any] = []

    def all_reduce(self, tensor: Tensor, group: Any) -> None:
        self.groups.append(group)
        tensor.mul_(2.0)


def test_gradients_that_several_ranks_hold_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A divided weight counts whole, a whole one half, an embedding of both stages half as well."""
    fake = FakeDistributed()
    monkeypatch.setattr(hybrid_step, "dist", fake)
    divided, whole, tied = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    monkeypatch.setattr(hybrid_step, "is_distributed_tensor", lambda parameter: parameter is not whole)
    for parameter, value in ((divided, 3.0), (whole, 2.0), (tied, 4.0)):
        parameter.grad = torch.tensor([value])
    optimizer: Any = SimpleNamespace(
        working_to_master_map=dict.fromkeys((divided, whole, tied)),
        tp_pg="tp",
        tp_size=2,
        pp_pg="pp",
        pp_size=2,
        shared_params=[{0: tied, 1: nn.Parameter(torch.zeros(1))}],
        stage_manager=SimpleNamespace(stage=0),
    )
    norm = hybrid_step._grad_norm(optimizer)
    assert norm.item() == pytest.approx((4 * (9 + 4 / 2 + 16 / 2)) ** 0.5)
    assert fake.groups == ["tp", "pp"]


def test_a_rank_without_gradients_adds_nothing_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid_step, "dist", fake := FakeDistributed())
    optimizer: Any = SimpleNamespace(
        working_to_master_map={nn.Parameter(torch.zeros(1)): None}, tp_pg=None, tp_size=1, pp_pg="pp", pp_size=2
    )
    assert hybrid_step._grad_norm(optimizer).item() == 0.0 and fake.groups == ["pp"]


def test_tied_gradients_are_added_up_without_a_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDistributed()
    monkeypatch.setattr(pipeline_barrier, "dist", fake)
    tied, other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    tied.grad = torch.ones(1)
    model: Any = SimpleNamespace(
        shared_params=[{0: tied, 3: other}, {1: other, 3: other}],
        shared_param_process_groups=["first and last", "others"],
        stage_manager=SimpleNamespace(stage=0),
    )
    HybridParallelModule.sync_shared_params(model)
    assert fake.groups == ["first and last"] and tied.grad.item() == 2.0


@pytest.mark.parametrize(
    "install",
    [
        hybrid_gradients.install_hybrid_gradients_mend,
        install_hybrid_step_mend,
        pipeline_barrier.install_pipeline_barrier_mend,
    ],
)
def test_the_mends_are_for_one_release(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream.importlib.metadata, "version", lambda name: "0.6.0")
    with pytest.raises(RuntimeError, match=r"colossalai 0\.6\.0"):
        install()


def test_upstream_still_copies_gradients_exchanges_them_one_by_one_and_waits_at_a_barrier() -> None:
    assert "p.grad = working_param.grad.data.float()" in inspect.getsource(MixedPrecisionOptimizer), (
        "fixed upstream: hybrid_step.py may go"
    )
    module = inspect.getsource(HybridParallelModule)
    assert "dist.barrier()" in module, "fixed upstream: pipeline_barrier.py may go"
    for costly in ("DDP(module, process_group=dp_group, **ddp_config)", "dist.all_reduce(p.grad, group=self.dp_group)"):
        assert costly in module, "fixed upstream: hybrid_gradients.py may go"
