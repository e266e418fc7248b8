"""The lanes and numbers of benchmarks/timeline.py from a trace written by hand, the picture, and a real run on the CPU."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -r requirements.txt")

from matplotlib.image import imread

from args import parse_args
from benchmarks import timeline, timeline_plot, timeline_worker
from benchmarks.timeline_trace import Timeline, Trace, intersect, joined, layered, measure, subtract, union

MAIN, AUTOGRAD, HOST = 1, 2, 3
COMPUTE, DOWN, UP = 7, 20, 24
FACTS: dict[str, Any] = {
    "name": "after",
    "command": "",
    "device": "a GPU",
    "date": "2026-11-25",
    "versions": {"torch": "2"},
    "plain_step_ms": 99.0,
}


class Events(list):
    """A chrome trace in the making; times in ms, as a GPU step has them."""

    def add(self, category, name, start, end, place, correlation=None, **args):
        event = {"ph": "X", "cat": category, "name": name, "ts": 5e12 + start * 1e3, "dur": (end - start) * 1e3}
        args |= {} if correlation is None else {"correlation": correlation}
        self.append({**event, "tid": place, "args": args})

    def launch(self, name, launched, start, end, thread, stream=COMPUTE, category="kernel"):
        number = len(self)
        self.add("cuda_runtime", "cudaLaunchKernel", launched, launched + 0.01, thread, number)
        self.add(category, name, start, end, f"stream {stream}", number, stream=stream)

    def trace(self, host_threads=(HOST,)):
        return Trace({"traceEvents": self}, MAIN, host_threads)


def step(events, at):
    """Add a step of 100 ms: its launches run ahead of the GPU, Adam starts in the backward pass, the loop waits last."""
    events.add("user_annotation", "timeline.step", at, at + 95, MAIN)
    events.add("user_annotation", "timeline.forward", at + 1, at + 8, MAIN)
    events.add("user_annotation", "timeline.backward", at + 10, at + 50, MAIN)
    events.add("user_annotation", "timeline.update", at + 60, at + 92, MAIN)
    events.launch("gemm", at + 2, at + 5, at + 20, MAIN)
    events.launch("gemm", at + 12, at + 20, at + 50, AUTOGRAD)
    events.launch("adam_kernel", at + 14, at + 50, at + 55, AUTOGRAD)
    events.launch("cast", at + 13, at + 30, at + 32, AUTOGRAD, stream=DOWN)
    for name, start, end, stream in (
        ("Memcpy DtoH (Device -> Pinned)", 32, 42, DOWN),
        ("Memcpy HtoD (Pinned -> Device)", 70, 80, UP),
        ("Memcpy HtoD (Pageable -> Device)", 80, 84, UP),
    ):
        events.launch(name, at + start - 1, at + start, at + end, HOST, stream=stream, category="gpu_memcpy")
    events.add("cpu_op", "aten::_fused_adamw_", at + 43, at + 63, HOST)
    events.add("cpu_op", "aten::copy_", at + 63, at + 68, HOST)
    events.add("cuda_runtime", "cudaEventSynchronize", at + 42, at + 43, HOST)
    events.add("cuda_runtime", "cudaEventSynchronize", at + 51, at + 59, MAIN)
    events.add("user_annotation", "timeline.wait", at + 61, at + 71, MAIN)


@pytest.fixture
def three_steps():
    events = Events()
    for at in (0, 100, 200):
        step(events, at)
    return events


def measured(events, **facts):
    return measure(events.trace(), **FACTS | facts)


def kinds(found, lane):
    return {kind: pytest.approx(spent) for kind, spent in found.lanes[lane].kinds_ms.items()}


def test_a_step_lasts_from_its_first_kernel_to_that_of_the_next(three_steps):
    found = measured(three_steps)
    assert found.step_ms == pytest.approx(100)
    assert found.lanes["GPU compute"].intervals[0] == (0, 15, "forward")


def test_kernels_take_the_phase_of_their_launch_and_adam_is_the_optimizer_in_the_backward_pass_too(three_steps):
    assert kinds(measured(three_steps), "GPU compute") == {"forward": 15, "backward": 30, "optimizer": 5}


def test_kernels_beside_the_compute_stream_and_copies_each_way_have_lanes_of_their_own(three_steps):
    found = measured(three_steps)
    assert kinds(found, "GPU other streams") == {"side kernels": 2}
    assert kinds(found, "GPU to host") == {"pinned copy": 10}
    assert kinds(found, "host to GPU") == {"pinned copy": 10, "pageable copy": 4}


def test_adam_of_the_host_thread_is_told_from_its_copies_and_from_its_waits(three_steps):
    found = measured(three_steps)
    assert kinds(found, "Adam on the host") == {"Adam": 20, "cast, copy": 5}
    assert kinds(found, "launcher waits") == {"for the GPU": 8, "for the host": 10}


def test_overlap_and_idle_time_are_shares_of_what_was_busy_at_the_same_time(three_steps):
    found = measured(three_steps)
    assert found.idle_ms == pytest.approx(50)
    assert found.lanes["GPU to host"].overlap == pytest.approx(1)
    assert found.lanes["Adam on the host"].overlap == pytest.approx(12 / 25)  # from 43 to 55
    assert found.lanes["Adam on the host"].idle_gpu_ms == pytest.approx(13)
    assert found.lanes["GPU compute"].overlap is None


def test_fused_adam_in_the_loops_own_thread_is_on_the_host_only_if_it_launches_nothing(three_steps):
    three_steps.add("cpu_op", "aten::_fused_adamw_", 185, 189, MAIN)
    three_steps.add("cpu_op", "aten::_fused_adamw_", 190, 195, MAIN)
    three_steps.launch("adam_kernel", 191, 192, 194, MAIN)
    assert kinds(measured(three_steps), "Adam on the host") == {"Adam": 24, "cast, copy": 5}


def test_without_phases_the_kernels_are_one_kind(three_steps):
    named = ("timeline.forward", "timeline.backward", "timeline.update")
    plain = Events(event for event in three_steps if event["name"] not in named)
    assert kinds(measured(plain), "GPU compute") == {"other": 45, "optimizer": 5}


def test_a_trace_of_one_step_is_refused():
    events = Events()
    step(events, 0)
    with pytest.raises(ValueError, match="holds 1 steps"):
        measured(events)


def test_top_kernels_count_the_step_alone(three_steps):
    top = measured(three_steps).kernels
    assert [(kernel.name, kernel.count) for kernel in top] == [("gemm", 2), ("adam_kernel", 1), ("cast", 1)]
    assert top[0].total_ms == pytest.approx(45)


def test_on_a_cpu_operators_make_the_lanes_and_count_without_those_they_call():
    events = Events()
    for at in (0, 100, 200):
        events.add("user_annotation", "timeline.step", at, at + 90, MAIN)
        events.add("user_annotation", "timeline.backward", at + 10, at + 90, MAIN)
        events.add("cpu_op", "MmBackward0", at + 10, at + 50, MAIN)
        events.add("cpu_op", "aten::mm", at + 10, at + 40, MAIN)
        events.add("cpu_op", "aten::_fused_adamw_", at + 42, at + 44, MAIN)
        events.add("cpu_op", "aten::_fused_adamw_", at + 30, at + 60, HOST)
    found = measured(events)
    assert found.idle_ms is None
    assert kinds(found, "CPU compute") == {"optimizer": 2, "backward": 38}
    assert kinds(found, "Adam on the host") == {"Adam": 30}
    assert found.lanes["Adam on the host"].overlap == pytest.approx(20 / 30)
    assert {kernel.name: kernel.total_ms for kernel in found.kernels} == pytest.approx(
        {"aten::mm": 30, "MmBackward0": 8, "aten::_fused_adamw_": 32}
    )


def test_intervals_are_joined_cut_and_layered():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4), (9, 9)]) == [(0, 4), (5, 6)]
    assert subtract([(0, 10), (20, 30)], [(2, 3), (5, 22), (29, 40)]) == [(0, 2), (3, 5), (22, 29)]
    assert subtract([(0, 10), (11, 12)], [(-1, 20)]) == []
    assert intersect([(0, 10)], [(2, 3), (8, 12)]) == [(2, 3), (8, 10)]
    assert layered({"inner": [(2, 4)], "outer": [(0, 6)]}) == {"inner": [(2, 4)], "outer": [(0, 2), (4, 6)]}


def test_many_intervals_are_joined_until_they_are_few_but_never_over_a_long_gap():
    dense = [(at * 0.01, at * 0.01 + 0.009, "forward") for at in range(9000)]
    few = joined([*dense, (95.0, 99.0, "forward"), (99.0, 100.0, "backward")], 100.0, 100)
    assert few == [(0, 89.999, "forward"), (95, 99, "forward"), (99, 100, "backward")]


def test_a_trace_of_a_gpu_run_without_kernels_is_no_picture(tmp_path):
    facts = {"main_thread": MAIN, "host_threads": [], "device": "a GPU"}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": []}, file)
    with pytest.raises(ValueError, match="no kernel"):
        timeline.read_run(tmp_path, "after", "")


def test_the_picture_is_drawn_from_the_json_alone_and_shows_every_kind(tmp_path, three_steps, capsys):
    runs = [measured(three_steps, name="before"), measured(three_steps)]
    content = json.dumps({"runs": [asdict(run) for run in runs]})
    (tmp_path / "timeline.json").write_text(content)
    assert timeline.main(["--draw", str(tmp_path)]) == 0
    assert imread(tmp_path / "timeline.png").shape[1] == 1760  # twice README width
    assert (tmp_path / "timeline.svg").read_text().startswith("<?xml")
    shown = {kind for lane in runs[0].lanes.values() for kind in lane.kinds_ms}
    assert shown <= set(timeline_plot.kinds_of(runs))
    words = capsys.readouterr().out
    assert "after: one step 100.0 ms, 99.0 ms without the profiler" in words
    assert "GPU idle                50.0      50%" in words
    assert [asdict(Timeline.from_json(asdict(run))) for run in runs] == [asdict(run) for run in runs]


def test_kinds_differ_in_grey_or_hatch():
    looks = list(timeline_plot.LOOKS.values())
    assert len(set(looks)) == len(looks)


def test_a_runs_own_flags_win_and_a_peer_gets_those_that_it_knows(tmp_path):
    options = timeline.parse(["--output", str(tmp_path), "--", "--block_size", "64", "--gradient_checkpointing", "on"])
    ours = parse_args(timeline.worker_flags(["--block_size", "32"], options, tmp_path))
    assert (ours.block_size, ours.gradient_checkpointing, ours.max_train_steps) == (32, "on", 10)
    peers = timeline.worker_flags(["--peer", "deepspeed_zero", "--stage", "2"], options, tmp_path)
    assert peers[:2] == ["--peer", "deepspeed_zero"]
    words = timeline_worker.peer_flags(peers[2:])
    assert words[words.index("--block_size") + 1] == "64" and words[-3:] == ["--recompute", "--stage", "2"]


@pytest.mark.parametrize("runs", [["--plugin gemini"], ["a: --tp 1", "a: --tp 2"]])
def test_runs_without_a_name_of_their_own_are_refused(runs, capsys):
    with pytest.raises(SystemExit):
        timeline.parse(["--output", "x", *(word for run in runs for word in ("--run", run))])
    assert "a name of its own" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_on_the_cpu_shows_host_adam_beside_the_backward_pass_and_a_failed_one_its_log(tmp_path, capsys):
    common = "--model_name_or_path tiny --plugin low_level_zero --per_device_train_batch_size 2 --block_size 32".split()
    own = "--offload_optim_frac 1 --step_in_backward on"
    code = timeline.main(
        ["--output", str(tmp_path), "--warm_up", "5", "--run", f"good: {own}", "--run", "bad: --tp 7", "--", *common]
    )
    assert code == 1 and "bad: exit code 2" in capsys.readouterr().err
    (run,) = timeline.read(tmp_path)
    # Whether the loop ever waits for Adam depends on the machine.
    assert list(run.lanes)[:2] == ["CPU compute", "Adam on the host"]
    assert {"forward", "backward"} <= set(run.lanes["CPU compute"].kinds_ms)
    assert run.lanes["Adam on the host"].kinds_ms["Adam"] > 0
    assert 0 < run.lanes["CPU compute"].busy_ms <= run.step_ms and run.plain_step_ms
    assert (tmp_path / "timeline.png").exists() and not list(tmp_path.rglob("*.gz"))
