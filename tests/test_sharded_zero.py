"""LowLevelZero on several ranks: our buckets, the host and the backward pass train like the plain loop."""

import copy
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import planner
import scaling
from colossal_ext import data_parallel, exchanges, local_zero, sharded_zero
from colossal_ext.sharded_zero import Bucket, ShardedZeroOptimizer, ShardedZeroPlugin, keep_share
from conftest import ROOT
from zero_runs import (
    CLIPPED,
    PLAIN,
    ZERO,
    assert_no_bit_differs_in_bf16,
    assert_resumed_runs_repeat_the_losses,
    assert_trains_like_the_plain_run,
)

BF16 = f"{ZERO} --precision bf16"
RUNS = {
    "plain": PLAIN,
    "plain clipped": f"{PLAIN} {CLIPPED}",
    "zero": ZERO,
    "zero clipped": f"{ZERO} {CLIPPED}",
    "stage 2 clipped": f"{ZERO} --zero_stage 2 {CLIPPED}",
    "some on the host": f"{ZERO} --offload_optim_frac 0.1 --step_in_backward off",
    "half on the host, clipped": f"{ZERO} --offload_optim_frac 0.5 {CLIPPED}",
    "bf16": BF16,
    "bf16 in the backward pass": f"{BF16} --step_in_backward on",
    "bf16 on the host": f"{BF16} --offload_optim_frac 1 --step_in_backward off",
    "bf16 on the host, in the backward pass": f"{BF16} --offload_optim_frac 1",
    "fp16": f"{ZERO} --precision fp16 --allow_cpu_fp16 {CLIPPED}",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_many):
    return run_many(tmp_path_factory.mktemp("runs"), {name: flags.split() for name, flags in RUNS.items()}, world=2)


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("plain")])
def test_losses_are_those_of_plain_training(runs, name):
    assert_trains_like_the_plain_run(runs, RUNS, name)


def test_updates_in_the_backward_pass_and_on_the_host_change_no_bit(runs):
    assert_no_bit_differs_in_bf16(runs, [name for name in RUNS if name.startswith("bf16")])


RESUMED = ("zero", "some on the host", "stage 2 clipped", "bf16 on the host, in the backward pass", "fp16")


def test_a_resumed_run_repeats_the_losses_bit_for_bit(tmp_path, runs, run_many):
    flags = {name: RUNS[name] for name in RESUMED}
    assert_resumed_runs_repeat_the_losses(tmp_path, runs, run_many, flags, world=2)


def parameters(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(size, dtype=torch.float32)) for size in sizes]


class Exchange:
    """Two ranks that hold the same: what torch.distributed would bring."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(sharded_zero.dist, "reduce_scatter_tensor", self.reduce_scatter)
        monkeypatch.setattr(sharded_zero.dist, "all_gather_into_tensor", self.all_gather)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, **_: Any) -> SimpleNamespace:
        self.calls.append("scatter")
        output.copy_(2 * input.chunk(2)[0])
        return SimpleNamespace(wait=lambda: None)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, **_: Any) -> SimpleNamespace:
        self.calls.append("gather")
        output.copy_(torch.cat([input, input + 100]))
        return SimpleNamespace(wait=lambda: None)


def bucket_of(made: list[nn.Parameter]) -> tuple[Bucket, dict[nn.Parameter, torch.Tensor]]:
    bucket = Bucket(made, on_host=False, rank=0, num_ranks=2)
    return bucket, bucket.take(torch.empty(bucket.numel), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("own_numel", "pieces"), [(5, 1), (4, 2), (1, 2)])
def test_a_bucket_cuts_each_parameter_into_equal_shares(monkeypatch, own_numel, pieces):
    exchange = Exchange(monkeypatch)
    monkeypatch.setattr(exchanges, "OWN_NUMEL", own_numel)
    made = parameters(4, 3)
    bucket, masters = bucket_of(made)
    assert [masters[each].tolist() for each in made] == [[0, 1], [0, 1]]
    for parameter, grad in zip(made, ([1.0, 2, 3, 4], [5.0, 6, 7]), strict=True):
        parameter.grad = torch.tensor(grad)
    bucket.scatter()
    assert all(parameter.grad is None for parameter in made)
    bucket.receive()
    assert bucket.shares is not None and bucket.shares.tolist() == [1, 2, 5, 6]
    bucket.send_for()
    bucket.arrive()
    assert [each.tolist() for each in made] == [[1, 2, 101, 102], [5, 6, 105]]
    assert exchange.calls == ["scatter"] * pieces + ["gather"] * pieces


def test_a_large_parameter_is_exchanged_in_its_own_memory(monkeypatch):
    Exchange(monkeypatch)
    monkeypatch.setattr(exchanges, "OWN_NUMEL", 4)
    made = parameters(4, 2, 2)
    bucket, _ = bucket_of(made)
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    large = made[0].grad
    assert large is not None
    sent = [bucket._to_send(together) for together, _ in bucket._pieces]
    assert [each.shape for each in sent] == [(2, 2), (2, 2)] and sent[0].data_ptr() == large.data_ptr()
    bucket.shares = torch.zeros(4)
    bucket.send_for()
    assert made[0].tolist() == [0, 0, 100, 100]


def test_weights_cast_as_they_are_drawn_give_the_same_share_and_parameter():
    made = nn.Linear(3, 3)
    kept = copy.deepcopy(made)
    keep_share(kept, rank=1, num_ranks=2, dtype=torch.bfloat16)
    assert kept.weight.dtype == torch.bfloat16
    buckets = [Bucket(list(each.parameters()), on_host=False, rank=1, num_ranks=2) for each in (made, kept)]
    for bucket in buckets:
        bucket.take(torch.empty(bucket.numel), torch.device("cpu"), torch.bfloat16)
    assert torch.equal(buckets[0].masters, buckets[1].masters) and buckets[0].masters.dtype == torch.float32
    assert torch.equal(made.weight, kept.weight) and torch.equal(made.bias, kept.bias)


def test_shares_of_several_micro_batches_add_up_and_a_missing_gradient_is_known(monkeypatch):
    Exchange(monkeypatch)
    made = parameters(2, 2)
    bucket, _ = bucket_of(made)
    for _ in range(2):
        made[1].grad = torch.ones(2)
        bucket.scatter()
        bucket.receive()
    assert bucket.shares is not None and bucket.shares.tolist() == [0, 2] and bucket.present == {made[1]}


def test_a_layer_waits_for_its_own_bucket_and_the_next_ones_are_on_their_way(monkeypatch):
    exchange = Exchange(monkeypatch)
    buckets = [bucket_of(parameters(2))[0] for _ in range(5)]
    for bucket in buckets:
        bucket.shares = torch.zeros(1)
    optimizer = SimpleNamespace(
        _gathers=sharded_zero.deque(buckets), _stale={each.parameters[0] for each in buckets}, _host=None
    )
    optimizer._gather_next = lambda: ShardedZeroOptimizer._gather_next(optimizer)
    ShardedZeroOptimizer.wait_for(optimizer, buckets[0].parameters)
    assert len(exchange.calls) == 3 and [each.is_sent_for for each in buckets] == [False, True, True, False, False]
    ShardedZeroOptimizer.wait_for(optimizer, buckets[0].parameters)
    assert len(exchange.calls) == 3
    ShardedZeroOptimizer.wait_for(optimizer, buckets[2].parameters)
    assert len(exchange.calls) == 5 and list(optimizer._gathers) == buckets[3:]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """What two ranks found in tests/sharded_zero_cases.py: the largest difference of each case to one process."""
    answer = tmp_path_factory.mktemp("toy") / "answer.json"
    command = [sys.executable, "-m", "tests.sharded_zero_cases", str(answer)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(answer.read_text())


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "three layers in one call",
        "a layer without gradients",
        "a layer without gradients, in a bucket",
        "gradients dropped between backward passes",
        "accumulated, then a layer without gradients",
        "stage 2, accumulated",
        "on the host, slowly",
        "an overflow, then steps",
        "one rank evaluates more",
    ],
)
def test_two_ranks_do_what_one_process_does(toy, name):
    assert toy[name] < 1e-6


def test_a_bucket_that_was_not_read_since_its_update_is_not_exchanged_again(toy):
    assert "once a step" in toy["two backward passes with updates"]


def test_an_option_of_buckets_that_are_not_there_is_refused():
    with pytest.raises(ValueError, match="overlap_allgather: has no effect"):
        ShardedZeroPlugin(stage=1, precision="bf16", overlap_allgather=True)


def test_the_planner_counts_the_buckets_that_there_are():
    assert planner.FLUSH_ELEMENTS == local_zero.FLUSH_NUMEL
    assert planner.EXCHANGE_ELEMENTS == sharded_zero.BUCKET_NUMEL
    assert planner.BUCKETS == sharded_zero.BUCKETS and planner.EXCHANGES == sharded_zero.MAX_IN_FLIGHT + 1
    assert scaling.OWN_BUCKET_BYTES == 2 * sharded_zero.BUCKET_NUMEL == data_parallel.BUCKET_BYTES
