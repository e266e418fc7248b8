"""Adam without a compiler: the update itself, its place in ColossalAI, and what upstream's does wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import colossal_ext  # noqa: F401  # before ColossalAI, which it imports the lean way

# isort: split
import pytest
import torch
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader
from colossalai.nn.optimizer import CPUAdam, HybridAdam
from colossalai.zero.gemini import gemini_optimizer
from torch import Tensor, nn

from colossal_ext import adam_kernels as kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(FP32, FP32), (FP32, BF16), (FP32, FP16), (BF16, BF16), (FP16, FP32)]
# One rounding of the stored parameter, relative.
TOLERANCE = {FP32: 2e-6, BF16: 2**-7, FP16: 2**-10}
# An epsilon of some weight, without which Adam's steps hardly depend on the gradients' scale.
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 0.1}
SHAPES = [(1,), (7,), (33, 5), (1 << 10,), (300, 1001)]


@pytest.fixture(autouse=True)
def registered_kernels() -> Iterator[None]:
    """Put the loaders back as they were."""
    saved = {loader: list(loader.REGISTRY) for loader in (CPUAdamLoader, FusedOptimizerLoader)}
    kernels.register_adam_kernels()
    yield
    for loader, registry in saved.items():
        loader.REGISTRY[:] = registry


def make_parameters(dtype: torch.dtype, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def make_gradients(step: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


def run_ours(
    param_dtype: torch.dtype, grad_dtype: torch.dtype, div_scale: float, device: str = "cpu", **options: Any
) -> list[nn.Parameter]:
    """Take three steps with CompileFreeAdam; `.grad`, which autograd would not let differ in dtype, is set as data."""
    parameters = make_parameters(param_dtype, device)
    optimizer = kernels.CompileFreeAdam(parameters, **OPTIONS, **options)
    for step in range(3):
        for parameter, grad in zip(parameters, make_gradients(step, grad_dtype, device), strict=True):
            set_gradient(parameter, grad)
        optimizer.step(div_scale=div_scale)
    return parameters


def set_gradient(parameter: nn.Parameter, grad: Tensor) -> None:
    """Give a parameter a gradient of another dtype, the way Gemini does."""
    data = parameter.data
    parameter.data = grad
    parameter.grad = grad
    parameter.data = data


def run_reference(
    param_dtype: torch.dtype, grad_dtype: torch.dtype, div_scale: float, *, adamw_mode: bool = True
) -> list[nn.Parameter]:
    """Take the same steps with torch's optimizer in fp32, parameters and states rounded after each."""
    parameters = make_parameters(param_dtype)
    masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    optimizer_class = torch.optim.AdamW if adamw_mode else torch.optim.Adam
    optimizer = optimizer_class(masters, **OPTIONS, foreach=False)
    for step in range(3):
        for master, grad in zip(masters, make_gradients(step, grad_dtype), strict=True):
            master.grad = grad.float() / (div_scale if div_scale > 0 else 1)
        optimizer.step()
        for master in masters:
            state = optimizer.state[master]
            for tensor in (master.data, state["exp_avg"], state["exp_avg_sq"]):
                tensor.copy_(tensor.to(param_dtype))
    return masters


def assert_close(found: list[nn.Parameter], wanted: list[nn.Parameter]) -> None:
    for parameter, reference in zip(found, wanted, strict=True):
        tolerance = TOLERANCE[parameter.dtype]
        torch.testing.assert_close(parameter.detach().cpu().float(), reference.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("div_scale", [-1.0, 4.0])
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), DTYPES)
def test_updates_equal_torch_adamw_for_every_mix_of_dtypes(
    param_dtype: torch.dtype, grad_dtype: torch.dtype, div_scale: float
) -> None:
    assert_close(run_ours(param_dtype, grad_dtype, div_scale), run_reference(param_dtype, grad_dtype, div_scale))


@pytest.mark.parametrize("grad_dtype", [FP32, BF16])
def test_adamw_mode_off_adds_an_l2_term_to_the_gradient(grad_dtype: torch.dtype) -> None:
    wanted = run_reference(FP32, grad_dtype, -1.0, adamw_mode=False)
    assert_close(run_ours(FP32, grad_dtype, -1.0, adamw_mode=False), wanted)


@pytest.mark.parametrize("grad_dtype", [FP32, BF16])
def test_first_step_without_bias_correction_is_its_formula(grad_dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = kernels.CompileFreeAdam([parameter], lr=0.1, bias_correction=False, eps=0.0)
    set_gradient(parameter, torch.tensor([2.0], dtype=grad_dtype))
    optimizer.step()
    # first moment 0.1 x 2, second moment 0.001 x 4
    assert parameter.item() == pytest.approx(1 - 0.1 * 0.2 / 0.004**0.5, rel=1e-5)


@pytest.mark.parametrize("grad_dtype", [FP32, BF16])
def test_gradients_are_left_as_they_were(grad_dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(5))
    grad = torch.full((5,), 2.0, dtype=grad_dtype)
    set_gradient(parameter, grad)
    kernels.CompileFreeAdam([parameter]).step(div_scale=4.0)
    assert torch.equal(grad, torch.full((5,), 2.0, dtype=grad_dtype))


def test_rows_that_torch_can_take_are_parted_from_the_others() -> None:
    plain = tuple(torch.zeros(2) for _ in range(4))
    mixed, gaps = (torch.zeros(2, dtype=BF16), *plain[1:]), (torch.zeros(4)[::2], *plain[1:])
    settings = kernels.AdamSettings(step=1, lr=1.0, beta1=0.9, beta2=0.9, eps=1.0, weight_decay=0.0)
    direct, rest = kernels.AdamTensors.of([plain, mixed, gaps]).for_torch(settings)
    assert [list(map(id, row)) for row in direct.rows()] == [list(map(id, plain))]
    assert [list(map(id, row)) for row in rest.rows()] == [list(map(id, row)) for row in (mixed, gaps)]
    divided, copied = replace(settings, div_scale=2.0), [(*plain, torch.zeros(2))]
    assert not kernels.AdamTensors.of([plain]).for_torch(divided)[0].params
    assert not kernels.AdamTensors.of(copied).for_torch(settings)[0].params


def test_a_parameter_longer_than_a_block_is_updated_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_NUMEL_PER_THREAD", 1000)
    assert_close(run_ours(FP32, BF16, -1.0), run_reference(FP32, BF16, -1.0))


def test_a_parameter_with_gaps_is_refused_rather_than_left_unchanged() -> None:
    parameter = nn.Parameter(torch.ones(4, 4)[:, :2])
    parameter.grad = torch.ones(4, 2)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.CompileFreeAdam([parameter]).step()


def test_parameters_without_a_gradient_keep_no_state() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = kernels.CompileFreeAdam([used, unused])
    used.grad = torch.ones(2)
    optimizer.step()
    assert list(optimizer.state) == [used]


def test_kernels_load_without_compiler_warning_or_stock_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda **options: pytest.fail("built an extension"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CPUAdamLoader().load().CPUAdamOptimizer is kernels.CPUAdamOptimizer
        assert FusedOptimizerLoader().load().multi_tensor_adam is kernels.multi_tensor_adam


def test_registering_twice_changes_nothing() -> None:
    kernels.register_adam_kernels()
    assert [kernels.TorchCpuAdamExtension] == CPUAdamLoader.REGISTRY


@pytest.mark.parametrize("optimizer_class", [CPUAdam, HybridAdam])
def test_colossalai_own_optimizers_run_on_our_kernel(optimizer_class: type[CPUAdam]) -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer_class([parameter], lr=0.1).step()
    assert parameter.tolist() == pytest.approx([0.9] * 3)


def test_gemini_accepts_the_class_after_registration() -> None:
    assert kernels.CompileFreeAdam in gemini_optimizer._AVAIL_OPTIM_LIST


def test_state_dict_moves_to_hybrid_adam_and_back() -> None:
    parameters = run_ours(FP32, FP32, -1.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    ours, stock = kernels.CompileFreeAdam(parameters), HybridAdam(copies)
    ours.step()
    stock.load_state_dict(ours.state_dict())
    back = kernels.CompileFreeAdam(parameters)
    back.load_state_dict(stock.state_dict())
    assert back.state_dict()["param_groups"] == ours.state_dict()["param_groups"]
    assert back.state[parameters[0]]["step"] == 1


def test_upstream_hybrid_adam_still_ignores_div_scale_for_bf16_on_the_host() -> None:
    found = []
    for div_scale in (-1.0, 1e6):
        parameter = nn.Parameter(torch.ones(1))
        optimizer = HybridAdam([parameter], lr=0.1, eps=1e-3)
        set_gradient(parameter, torch.ones(1, dtype=BF16))
        optimizer.step(div_scale=div_scale)
        found.append(parameter.item())
    assert found[0] == found[1], "fixed upstream: CompileFreeAdam.step may go"


# --- on a GPU ---------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("div_scale", [-1.0, 4.0])
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), DTYPES)
def test_gpu_updates_equal_torch_adamw_for_every_mix_of_dtypes(
    param_dtype: torch.dtype, grad_dtype: torch.dtype, div_scale: float
) -> None:
    found = run_ours(param_dtype, grad_dtype, div_scale, device="cuda")
    assert_close(found, run_reference(param_dtype, grad_dtype, div_scale))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("grad_dtype", [FP32, BF16])
def test_gpu_adamw_mode_off_adds_an_l2_term_to_the_gradient(grad_dtype: torch.dtype) -> None:
    wanted = run_reference(FP32, grad_dtype, -1.0, adamw_mode=False)
    assert_close(run_ours(FP32, grad_dtype, -1.0, device="cuda", adamw_mode=False), wanted)


@pytest.mark.gpu
@needs_gpu
def test_gpu_kernel_updates_slices_that_begin_anywhere() -> None:
    whole, grads = torch.ones(200_003, device="cuda"), torch.ones(200_003, device="cuda", dtype=BF16)
    parameter = nn.Parameter(whole[3:-5])
    optimizer = kernels.CompileFreeAdam([parameter], lr=0.1)
    set_gradient(parameter, grads[3:-5])
    optimizer.step()
    assert torch.equal(whole[:3], torch.ones(3, device="cuda")) and torch.equal(whole[-5:], whole[:5] * 0 + 1)
    torch.testing.assert_close(whole[3:-5], torch.full_like(whole[3:-5], 0.9))


@pytest.mark.gpu
@needs_gpu
def test_gpu_step_of_many_parameters_takes_few_launches() -> None:
    parameters = [nn.Parameter(torch.ones(1024, device="cuda")) for _ in range(500)]
    optimizer = kernels.CompileFreeAdam(parameters)
    for parameter in parameters:
        set_gradient(parameter, torch.ones(1024, device="cuda", dtype=BF16))
    optimizer.step()  # compiles, and allocates the states
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages() if "adam" in event.key) == 1


@pytest.mark.gpu
@needs_gpu
def test_gpu_launches_are_kept_until_a_tensor_moves_or_its_dtype_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from colossal_ext import triton_adam

    launches_of = Mock(side_effect=triton_adam.launches_of)
    monkeypatch.setattr(triton_adam, "launches_of", launches_of)
    first, second = (torch.full((3000,), value, device="cuda", dtype=BF16) for value in (1.0, -2.0))
    gradients = [(first, 1), (first, 1), (second, 2), (second.view(FP16), 3), (first, 4)]
    found, wanted = (nn.Parameter(torch.ones(3000, device=device)) for device in ("cuda", "cpu"))
    optimizers = [kernels.CompileFreeAdam([parameter], **OPTIONS) for parameter in (found, wanted)]
    for grad, num_made in gradients:
        set_gradient(found, grad)
        set_gradient(wanted, grad.cpu())
        for optimizer in optimizers:
            optimizer.step()
        assert launches_of.call_count == num_made
    assert_close([found], [wanted])


@pytest.mark.gpu
@needs_gpu
def test_gpu_kernel_runs_near_memory_speed() -> None:
    numel, num_repeats = 1 << 28, 10
    parameter = nn.Parameter(torch.ones(numel, device="cuda"))
    optimizer = kernels.CompileFreeAdam([parameter])
    set_gradient(parameter, torch.ones(numel, device="cuda", dtype=BF16))
    optimizer.step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(num_repeats):
        optimizer.step()
    end.record()
    torch.cuda.synchronize()
    bytes_per_second = numel * 26 * num_repeats / (start.elapsed_time(end) / 1000)
    copy_speed = measure_copy_speed(numel)
    assert bytes_per_second > 0.6 * copy_speed, f"{bytes_per_second / 1e9:.0f} of {copy_speed / 1e9:.0f} GB/s"


def measure_copy_speed(numel: int) -> float:
    """Return bytes read and written a second by a device copy of fp32 elements."""
    source, target = torch.empty(numel, device="cuda"), torch.empty(numel, device="cuda")
    target.copy_(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 10 * 8 * numel / (start.elapsed_time(end) / 1000)
