"""Autocast, loss scaling, gradient norms, the host accelerator and the version guard."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import colossal_ext  # noqa: F401  # before ColossalAI, which it imports the lean way

# isort: split
import pytest
import torch
from colossalai.accelerator import api as accelerator_api
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.mixed_precision_mixin.fp16 import FP16MixedPrecisionMixin
from colossalai.interface import OptimizerWrapper
from colossalai.pipeline import p2p
from torch import nn

from colossal_ext import loss_scale, upstream
from colossal_ext import mixed_precision as precision
from colossal_ext.grad_norm import grad_norm
from colossal_ext.host_accelerator import HostAccelerator, install_host_accelerator

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def boosted(dtype: torch.dtype, initial_scale: float = 2.0**10) -> tuple[Any, Any]:
    """Return a linear layer and its optimizer, SGD with a rate of one, as TorchDDP would get them."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = OptimizerWrapper(torch.optim.SGD(model.parameters(), lr=1.0))
    mixed_precision = precision.AutocastPrecision("cpu", dtype, initial_scale=initial_scale)
    return mixed_precision.configure(model, optimizer)[:2]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("training", [True, False])
def test_forward_runs_in_the_asked_dtype_over_fp32_weights(dtype: torch.dtype, training: bool) -> None:
    model, _ = boosted(dtype)
    model.train(training)
    assert model(torch.ones(2, 3)).dtype is dtype
    assert model.weight.dtype is FP32


def test_fp32_casts_nothing() -> None:
    model, _ = boosted(FP32)
    assert model(torch.ones(2, 3)).dtype is FP32


@pytest.mark.parametrize("compile_first", [True, False])
def test_compiled_models_autocast(compile_first: bool) -> None:
    model = nn.Linear(3, 1)
    steps = [lambda: model.compile(backend="eager"), lambda: precision.autocast_forward(model, "cpu", BF16)]
    for step in steps if compile_first else reversed(steps):
        step()
    assert model(torch.ones(2, 3)).dtype is BF16


def test_the_signature_of_forward_stays() -> None:
    model, _ = boosted(BF16)
    assert list(inspect.signature(model.forward).parameters) == ["input"]


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        precision.AutocastPrecision("cpu", torch.float64)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_clipping_returns_and_keeps_the_unscaled_norm(dtype: torch.dtype) -> None:
    model, optimizer = boosted(dtype)
    optimizer.backward(model(torch.tensor([[1.0, 2.0, 2.0]])).float().sum())
    assert optimizer.clip_grad_by_norm(1.5).item() == pytest.approx(3.0)
    optimizer.step()
    assert grad_norm(optimizer) == pytest.approx(3.0)
    assert model.weight.tolist()[0] == pytest.approx([0.5, 0.0, 0.0], abs=1e-5)  # 1 - gradient / 2


def test_a_step_without_clipping_is_unscaled() -> None:
    model, optimizer = boosted(FP16)
    optimizer.backward(model(torch.tensor([[0.5, 0.25, 0.0]])).float().sum())
    optimizer.step()
    assert model.weight.tolist()[0] == pytest.approx([0.5, 0.75, 1.0])


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    model, optimizer = boosted(FP16, initial_scale=2.0**20)
    optimizer.backward(model(torch.ones(1, 3)).sum())  # fp16 ends at 65504
    norm = optimizer.clip_grad_by_norm(1.0)
    optimizer.step()
    assert not math.isfinite(norm)
    assert model.weight.tolist() == [[1.0, 1.0, 1.0]]
    assert optimizer.loss_scale == 2.0**19


def test_unscaling_twice_divides_once() -> None:
    model, optimizer = boosted(FP16)
    optimizer.backward(model(torch.ones(1, 3)).float().sum())
    optimizer.unscale_grad()
    optimizer.unscale_grad()
    assert model.weight.grad.tolist()[0] == pytest.approx([1.0, 1.0, 1.0])


def test_grad_norm_is_none_where_nothing_computes_one() -> None:
    assert grad_norm(OptimizerWrapper(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0))) is None
    assert grad_norm(boosted(FP32)[1]) is None


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostAccelerator:
    """The installed accelerator; ColossalAI's own comes back after the test."""
    monkeypatch.setattr(accelerator_api, "_ACCELERATOR", None)
    monkeypatch.setattr(p2p, "_check_for_nccl_hccl_backend", p2p._check_for_nccl_hccl_backend)
    install_host_accelerator()
    return get_accelerator()


# --- ColossalAI's own loss scale --------------------------------------------------------------------------------------


class Mixin(FP16MixedPrecisionMixin):
    """A mixin without overflows, whose scale doubles on every step."""

    def __init__(self) -> None:
        super().__init__(initial_scale=8.0, growth_interval=1)

    def check_local_overflow(self) -> bool:
        return False


@pytest.fixture
def restored_mixin(host: HostAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's methods, put back after the test."""
    for name in ("pre_backward", "pre_backward_by_grad", "get_grad_div_scale"):
        method = getattr(FP16MixedPrecisionMixin, name)
        monkeypatch.setattr(FP16MixedPrecisionMixin, name, getattr(method, "__wrapped__", method))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, op: None)


def ratio_of_scales(mixin: Mixin) -> float:
    """Return the loss's factor over the gradients' divisor in one step."""
    factor = mixin.pre_backward(torch.ones(())).item()
    mixin.should_skip_step()
    return factor / mixin.get_grad_div_scale()


def test_gradients_are_divided_by_the_scale_of_their_loss(restored_mixin: None) -> None:
    loss_scale.install_loss_scale_mend()
    mixin = Mixin()
    assert [ratio_of_scales(mixin) for _ in range(3)] == [1.0, 1.0, 1.0]


def test_installing_the_loss_scale_mend_twice_wraps_once(restored_mixin: None) -> None:
    loss_scale.install_loss_scale_mend()
    method = FP16MixedPrecisionMixin.get_grad_div_scale
    loss_scale.install_loss_scale_mend()
    assert FP16MixedPrecisionMixin.get_grad_div_scale is method


def test_upstream_still_divides_by_the_next_steps_scale(restored_mixin: None) -> None:
    assert ratio_of_scales(Mixin()) == 0.5, "fixed upstream: colossal_ext/loss_scale.py may go"


def test_grad_norm_divides_by_the_scale_of_the_gradients(restored_mixin: None) -> None:
    loss_scale.install_loss_scale_mend()
    mixin = Mixin()
    ratio_of_scales(mixin)
    optimizer = SimpleNamespace(mixed_precision=mixin, get_grad_norm=lambda: 24.0)
    assert grad_norm(optimizer) == 3.0


def test_grad_norm_is_infinite_after_an_overflow(restored_mixin: None) -> None:
    mixin = Mixin()
    mixin.found_overflow.fill_(1.0)
    assert grad_norm(SimpleNamespace(mix_precision_mixin=mixin, get_grad_norm=lambda: 24.0)) == math.inf


# --- the accelerator and the guard ------------------------------------------------------------------------------------


def test_the_installed_accelerator_puts_tensors_on_the_cpu(host: HostAccelerator) -> None:
    assert isinstance(host, HostAccelerator)
    assert host.get_current_device() == torch.device("cpu")
    assert host.communication_backend == "gloo"


def test_installing_again_keeps_the_accelerator(host: HostAccelerator) -> None:
    install_host_accelerator()
    assert get_accelerator() is host


def test_no_method_of_the_accelerator_says_unsupported(host: HostAccelerator) -> None:
    state = host.get_rng_state()
    for call in (
        host.current_device, host.device_count, host.empty_cache, host.synchronize, host.memory_stats,
        host.memory_summary, host.memory_snapshot, host.reset_peak_memory_stats, host.reset_max_memory_allocated,
        host.reset_max_memory_cached, host.get_device_name, host.get_device_capability, host.utilization,
        host.get_rng_state_all, host.initial_seed, host.seed, host.seed_all, host.Stream, host.Event,
        host.current_stream, host.default_stream,
    ):  # fmt: skip
        call()
    host.set_rng_state_all([state])


def test_the_accelerators_streams_are_always_done(host: HostAccelerator) -> None:
    with host.stream(None):
        event = host.current_stream().record_event()
        host.Stream().wait_event(event)
    assert event.query() and host.Stream().query()


def test_the_accelerators_seed_is_torchs(host: HostAccelerator) -> None:
    host.manual_seed(7)
    first = torch.rand(3)
    host.manual_seed_all(7)
    assert torch.equal(first, torch.rand(3))


def test_memory_figures_are_bytes_of_this_process(host: HostAccelerator) -> None:
    assert 2**24 < host.memory_allocated() <= host.max_memory_allocated() * 1.01
    assert host.max_memory_allocated() < host.get_device_properties(0).total_memory


def test_autocast_of_the_accelerator_is_a_context(host: HostAccelerator) -> None:
    with host.autocast(dtype=BF16):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype is BF16


def test_mends_are_refused_on_another_colossalai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.6.0")
    with pytest.raises(RuntimeError, match=r"colossalai 0\.6\.0.*written for colossalai==0\.5\.0"):
        upstream.require_mended_version("colossalai.pipeline.p2p")
