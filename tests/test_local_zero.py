"""LowLevelZero on one rank: its own optimizer, on the host and in the backward pass, trains like the plain loop."""

import gc
import math
import subprocess
import sys
import threading
import weakref
from collections import defaultdict
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from colossal_ext.adam_kernels import AdamSettings, AdamTensors, HostAdam
from colossal_ext.grad_norm import clipping_divisor
from colossal_ext.host_updates import HostUpdate, HostUpdates, Slot, _Piece
from colossal_ext.local_zero import LocalZeroOptimizer, _call_before, offloaded
from colossal_ext.pinned import pinned_empty
from conftest import ROOT
from zero_runs import (
    CLIPPED,
    PLAIN,
    ZERO,
    assert_no_bit_differs_in_bf16,
    assert_resumed_runs_repeat_the_losses,
    assert_trains_like_the_plain_run,
)

SETTINGS = AdamSettings(step=1, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
RUNS = {
    "plain": PLAIN,
    "plain clipped": f"{PLAIN} {CLIPPED}",
    "zero": ZERO,
    "zero clipped": f"{ZERO} {CLIPPED}",
    "stage 2 accumulated": f"{ZERO} --zero_stage 2 {CLIPPED}",
    "half on the host": f"{ZERO} --offload_optim_frac 0.5",
    "all on the host, clipped": f"{ZERO} --offload_optim_frac 1 {CLIPPED}",
    "bf16": f"{ZERO} --precision bf16",
    "bf16 on the host": f"{ZERO} --precision bf16 --offload_optim_frac 0.5 --step_in_backward off",
    "bf16 on the host, in the backward pass": f"{ZERO} --precision bf16 --offload_optim_frac 0.5",
    "bf16 in the backward pass": f"{ZERO} --precision bf16 --step_in_backward on",
    "fp16": f"{ZERO} --precision fp16 --allow_cpu_fp16 {CLIPPED}",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_many):
    return run_many(tmp_path_factory.mktemp("runs"), {name: flags.split() for name, flags in RUNS.items()}, world=1)


@pytest.mark.parametrize("name", [name for name in RUNS if "zero" in name or "host" in name])
def test_losses_are_those_of_plain_training(runs, name):
    assert_trains_like_the_plain_run(runs, RUNS, name)


def test_stage_and_loss_scaling_do_not_change_the_model(runs):
    assert runs["stage 2 accumulated"].losses == runs["zero clipped"].losses
    assert runs["fp16"].losses == pytest.approx(runs["plain clipped"].losses, rel=2e-3)


def test_updates_in_the_backward_pass_and_on_the_host_change_no_bit(runs):
    names = ("bf16 on the host", "bf16 on the host, in the backward pass", "bf16 in the backward pass")
    assert_no_bit_differs_in_bf16(runs, names)


RESUMED = ("zero", "half on the host", "bf16 on the host, in the backward pass", "bf16 in the backward pass", "fp16")


def test_a_resumed_run_repeats_the_losses_bit_for_bit(tmp_path, runs, run_many):
    flags = {name: RUNS[name] for name in RESUMED}
    assert_resumed_runs_repeat_the_losses(tmp_path, runs, run_many, flags, world=1)


def test_the_last_matrices_go_to_the_host_until_the_share_is_reached():
    matrices = [torch.nn.Parameter(torch.zeros(4, 5)) for _ in range(3)]
    vector = torch.nn.Parameter(torch.zeros(4))
    parameters = [matrices[0], vector, *matrices[1:]]
    assert list(offloaded(parameters, 0.0)) == []
    assert [id(each) for each in offloaded(parameters, 0.3)] == [id(matrices[2])]
    assert [id(each) for each in offloaded(parameters, 1.0)] == [id(each) for each in reversed(matrices)]


@pytest.mark.parametrize(("in_backward", "launches"), [(False, [3]), (True, [2, 1])])
def test_gradients_are_collected_for_a_launch(monkeypatch, in_backward, launches):
    monkeypatch.setattr("colossal_ext.local_zero.FLUSH_NUMEL", 8)
    sizes, optimizer = [], cast(Any, object.__new__(LocalZeroOptimizer))
    adam = SimpleNamespace(param_groups=[None], settings=lambda *_: SETTINGS)
    adam.update = lambda on_host, tensors, settings: sizes.append(len(tensors.params))
    optimizer.__dict__.update(optim=adam, grad_handles=[], _updates_in_backward=in_backward, _pending_numel=0)
    optimizer._pending = defaultdict(list)
    for _ in range(3):
        states = torch.zeros(4), torch.zeros(4), torch.zeros(4)
        optimizer._submit((0, 1), torch.ones(4), states, torch.zeros(4), 1.0, on_host=False)
    optimizer._flush(1.0)
    assert sizes == launches


def test_a_parameter_larger_than_a_buffer_is_updated_piece_by_piece(monkeypatch):
    monkeypatch.setattr("colossal_ext.host_updates.SLOT_NUMEL", 8)
    assert_updated_as_by_the_kernel(torch.device("cpu"), torch.empty)


@pytest.mark.gpu
def test_gradients_and_parameters_cross_to_a_gpu_and_back_unchanged(monkeypatch):
    monkeypatch.setattr("colossal_ext.host_updates.SLOT_NUMEL", 64)
    assert_updated_as_by_the_kernel(torch.device("cuda", 0), pinned_empty)


@pytest.mark.gpu
def test_pinned_memory_is_pinned_while_a_view_of_it_lives():
    tensor = pinned_empty(3_000_001)
    view = tensor[1:]
    del tensor
    assert view.is_pinned()


def assert_updated_as_by_the_kernel(device, make_master):
    torch.manual_seed(0)
    settings = AdamSettings(step=1, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    start, grad = torch.randn(8 * 20 + 3), torch.randn(8 * 20 + 3).bfloat16()
    expected = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
    HostAdam().update(AdamTensors([grad], *([each] for each in expected)), settings)
    master = make_master(len(start)).copy_(start)
    states = [master, torch.zeros_like(master), torch.zeros_like(master)]
    working = torch.zeros(len(master), dtype=torch.bfloat16, device=device)
    updates = HostUpdates(device, largest_numel=len(master))
    updates.submit(grad.to(device), HostUpdate(working, states[0], states[1], states[2], settings))
    updates.finish()
    updates.close()
    torch.testing.assert_close(states, expected)
    assert torch.equal(working.cpu(), states[0].bfloat16())


class Arrival:
    """An event that has happened or not."""

    def __init__(self, has_happened):
        self.query = lambda: has_happened

    def synchronize(self):
        pass


def test_of_the_gradients_that_are_there_the_newest_goes_first():
    updates = HostUpdates(torch.device("cpu"), largest_numel=4)
    updates.close()
    pieces = [_Piece(Slot(None, Arrival(there)), None, None) for there in (False, True, True, False)]
    updates._pieces = list(pieces)
    assert [updates._next() for _ in range(4)] == [pieces[2], pieces[1], pieces[0], pieces[3]]


def test_a_layer_waits_for_its_own_parameters_and_no_others(monkeypatch):
    goes_on = threading.Event()
    update = HostUpdates._update

    def slow_update(self, adam, slot, of, part):
        assert of.master is fast or goes_on.wait(60)
        update(self, adam, slot, of, part)

    monkeypatch.setattr(HostUpdates, "_update", slow_update)
    updates = HostUpdates(torch.device("cpu"), largest_numel=4)
    fast, slow = (torch.zeros(4) for _ in range(2))
    for master in (fast, slow):
        working, exp_avg, exp_avg_sq = (torch.zeros(4) for _ in range(3))
        updates.submit(torch.ones(4), HostUpdate(working, master, exp_avg, exp_avg_sq, SETTINGS))
        updates.wait([fast])
    assert fast.lt(0).all() and slow.eq(0).all()
    goes_on.set()
    updates.wait([slow])
    assert torch.equal(fast, slow)
    updates.close()


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Linear(2, 2)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))

    def forward(self, values):
        return self.layers[1](self.layers[0](self.embedding(values)))


@pytest.mark.parametrize(("sizes", "of_layers"), [([1, 1], [[], ["layers.1.weight"]]), ([2], [["layers.1.weight"]])])
def test_layers_wait_for_what_the_host_updates_of_them_and_the_model_for_the_rest(monkeypatch, sizes, of_layers):
    model, waited = TwoLayers(), []
    names = {parameter: name for name, parameter in model.named_parameters()}
    monkeypatch.setattr(LocalZeroOptimizer, "wait_for", lambda self, own: waited.append([names[each] for each in own]))
    optimizer: Any = object.__new__(LocalZeroOptimizer)
    optimizer.grad_handles = []
    on_host = {model.embedding.weight, model.layers[1].weight}  # vectors stay on the device, and so do first layers
    optimizer._masters = SimpleNamespace(on_host=on_host)
    layers = iter(model.layers)
    optimizer.defer_updates(model, [list(islice(layers, size)) for size in sizes])
    model(torch.ones(1, 2))
    assert waited == [["embedding.weight"], *of_layers]


def test_a_compiled_layer_waits_before_it_runs():
    calls = []
    layer = torch.nn.Linear(2, 2)
    layer.compile(backend="eager")
    _call_before(layer, lambda: calls.append("waited"))
    layer.register_forward_hook(lambda *_: calls.append("ran"))
    layer(torch.ones(1, 2))
    assert calls == ["waited", "ran"]


def submitted(settings: AdamSettings | None, master: torch.Tensor | None = None) -> HostUpdates:
    updates = HostUpdates(torch.device("cpu"), largest_numel=4)
    master = torch.zeros(4) if master is None else master
    updates.submit(torch.ones(4), HostUpdate(torch.zeros(4), master, torch.zeros(4), torch.zeros(4), settings))
    return updates


def test_a_failed_update_is_raised_where_it_is_waited_for():
    updates = submitted(None)
    with pytest.raises(RuntimeError, match="Adam on the host failed"):
        updates.finish()
    updates.close()


def test_a_thread_that_cannot_start_is_not_waited_for(monkeypatch):
    def fail(_):
        raise ValueError("no such device")

    monkeypatch.setattr("colossal_ext.host_updates.torch.set_num_threads", fail)
    updates = submitted(SETTINGS)
    with pytest.raises(RuntimeError, match="Adam on the host failed"):
        updates.finish()
    updates.close()


def test_a_gpu_that_is_full_is_not_taken_for_another_failure(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HostUpdates, "_update", fail)
    updates = submitted(SETTINGS)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        updates.finish()
    updates.close()


def test_a_gpu_that_has_failed_ends_the_wait(monkeypatch):
    class FailedEvent:
        def query(self):
            raise RuntimeError("an illegal memory access was encountered")

        synchronize = query

    updates = HostUpdates(torch.device("cpu"), largest_numel=4)
    zeros = torch.zeros(4)
    piece = _Piece(Slot(zeros, FailedEvent()), HostUpdate(zeros, zeros, zeros, zeros, SETTINGS), slice(0, 4))
    with updates._changed:
        updates._pieces.append(piece)
        updates._unfinished[id(zeros)] += 1
        updates._changed.notify_all()
    with pytest.raises(RuntimeError, match="Adam on the host failed"):
        updates.finish()
    updates.close()


def test_what_was_updated_is_given_back_when_the_thread_has_ended():
    block = torch.zeros(100)
    updates = submitted(SETTINGS, block[:4])
    updates.finish()
    updates.close()
    gone = [weakref.ref(block), weakref.ref(updates)]
    del block, updates
    gc.collect()
    assert [each() for each in gone] == [None, None]


LEAVES = """
import sys, torch
import colossal_ext
from colossal_ext.adam_kernels import AdamSettings
from colossal_ext.grad_norm import clipping_divisor
from colossal_ext.host_updates import HostUpdate, HostUpdates
numel = 2**22
updates = HostUpdates(torch.device("cpu"), largest_numel=numel)
settings = AdamSettings(step=1, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
for _ in range(12):
    updates.submit(torch.ones(numel), HostUpdate(*(torch.zeros(numel) for _ in range(4)), settings))
sys.exit(2)
"""


def test_a_process_that_ends_in_the_middle_of_an_update_keeps_its_exit_code():
    done = subprocess.run([sys.executable, "-c", LEAVES], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr


def test_a_norm_that_is_not_finite_shows_in_the_weights():
    norms = torch.tensor([0.5, 2.0, torch.inf, torch.nan])
    expected = torch.tensor([1.0, 2.0 + 1e-6, torch.nan, torch.nan])
    torch.testing.assert_close(clipping_divisor(norms, 1.0), expected, equal_nan=True)
    for div_scale in (math.nan, torch.tensor(math.nan)):
        tensors = [torch.ones(4) for _ in range(4)]
        HostAdam().update(AdamTensors(*([each] for each in tensors)), replace(SETTINGS, div_scale=div_scale))
        assert tensors[1].isnan().all()
