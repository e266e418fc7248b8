"""One run of timeline.py: trains in this process, under torch.profiler for a few steps, and writes what it saw.

    python -m benchmarks.timeline_worker FOLDER WARM_UP FLAG...    # train_clm.py's flags; --peer NAME first: a peer's

Everything is wrapped from here: the training code knows nothing of it, and runs as it does without.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import report
import runtime
from args import parse_args
from benchmarks.timeline_trace import BACKWARD, FORWARD, HOST_ADAM, STEP, UPDATE, WAIT

# The picture shows the second: the first one starts from an idle device, the third ends the second.
NUM_RECORDED = 3
# Steps that build graphs, states and pinned blocks are no measure of those after.
NUM_FIRST = 3
HOST_THREAD_PREFIX = "host-adam"

Result = TypeVar("Result")


class Recording:
    """Profiles NUM_RECORDED steps after the warm-up, and writes the trace and the facts around it.

    Args:
        folder: gets trace.json.gz and run.json.
        warm_up: steps before; the later ones are timed without the profiler.
    """

    def __init__(self, folder: Path, warm_up: int, device: torch.device) -> None:
        self._folder, self._warm_up, self._on_gpu = folder, warm_up, device.type == "cuda"
        self._starts: list[float] = []
        self._profile: profile | None = None

    def step(self, body: Callable[[], Result]) -> Result:
        """Run one training step."""
        self._starts.append(time.perf_counter())
        if len(self._starts) == self._warm_up + 1:
            self._start()
        with record_function(STEP):
            result = body()
        if len(self._starts) == self._warm_up + NUM_RECORDED:
            self._stop()
        return result

    def _start(self) -> None:
        from torch._C._profiler import _ExperimentalConfig

        self._synchronize()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        # Without it no thread is seen that was there before the profiler, as Adam's on the host.
        everyone = _ExperimentalConfig(profile_all_threads=True)
        self._profile = profile(activities=activities, experimental_config=everyone)
        self._profile.start()

    def _stop(self) -> None:
        assert self._profile is not None
        self._synchronize()
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._folder / "trace.json.gz"))
        (self._folder / "run.json").write_text(json.dumps(self._facts()) + "\n")
        self._profile = None

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _facts(self) -> dict[str, Any]:
        starts = self._starts[NUM_FIRST : self._warm_up + 1]
        times = [end - start for start, end in pairwise(starts)]
        return {
            "device": torch.cuda.get_device_name() if self._on_gpu else "CPU",
            "date": time.strftime("%Y-%m-%d"),
            "versions": report.versions(),
            "plain_step_ms": median(times) * 1e3 if times else None,
            "main_thread": threading.main_thread().native_id,
            "host_threads": [
                thread.native_id for thread in threading.enumerate() if thread.name.startswith(HOST_THREAD_PREFIX)
            ],
        }


def marked(function: Callable[..., Result], name: str) -> Callable[..., Result]:
    """Return the function with its time marked in the trace."""

    @wraps(function)
    def within(*args: Any, **named: Any) -> Result:
        with record_function(name):
            return function(*args, **named)

    return within


@contextmanager
def marks(*places: tuple[Any, str, str]) -> Iterator[None]:
    """Mark methods, given as (class, method, name of the range), and where any thread waits for another."""
    with ExitStack() as stack:
        for owner, method, name in [*places, (threading.Condition, "wait", WAIT)]:
            stack.enter_context(patch.object(owner, method, marked(getattr(owner, method), name)))
        yield


def train(flags: list[str], folder: Path, warm_up: int) -> None:
    """Run train_clm.py to its exit code."""
    args = parse_args(flags)

    def body(process: runtime.Runtime) -> int:
        runtime.quiet_third_parties(process)
        import strategy
        import train_clm
        import trainer
        from colossal_ext.adam_kernels import HostAdam

        recording = Recording(folder, warm_up, process.device)
        train_step = trainer.Trainer.train_step
        stepped = patch.object(
            trainer.Trainer, "train_step", lambda self, rows: recording.step(lambda: train_step(self, rows))
        )
        phases = patch.object(strategy.Engine, "forward_backward", in_phases(strategy.Engine.forward_backward))
        with stepped, phases, marks((strategy.Engine, "step", UPDATE), (HostAdam, "update", HOST_ADAM)):
            return train_clm.run(args, process)

    runtime.run_to_exit(body)


def in_phases(forward_backward: Callable[..., None]) -> Callable[..., None]:
    """Return `Engine.forward_backward` with forward and backward marked; the loss, there between them, parts them.

    Under a pipeline both take turns and the loss comes last: neither is marked.
    """

    def within(self: Any, batch: Any, scale: Any, *, last: bool, at_loss: Callable[..., None]) -> None:
        if self.is_pipeline:
            return forward_backward(self, batch, scale, last=last, at_loss=at_loss)
        forward, backward = record_function(FORWARD), record_function(BACKWARD)

        def between(loss: Any) -> None:
            at_loss(loss)
            forward.__exit__(None, None, None)
            backward.__enter__()

        forward.__enter__()
        forward_backward(self, batch, scale, last=last, at_loss=between)
        backward.__exit__(None, None, None)
        return None

    return within


def train_peer(peer: str, flags: list[str], folder: Path, warm_up: int) -> None:
    """Run one of benchmarks/peers; of DeepSpeed the phases are marked as well."""
    from benchmarks.peers import harness

    train_all = harness.Job.train

    def train(self: harness.Job, train_step: Callable[[harness.Batch], Any]) -> None:
        recording = Recording(folder, warm_up, self.device)
        train_all(self, lambda batch: recording.step(lambda: train_step(batch)))

    places: list[tuple[Any, str, str]] = []
    if peer.startswith("deepspeed") and importlib.util.find_spec("deepspeed"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        from deepspeed.runtime.engine import DeepSpeedEngine

        methods = {"forward": FORWARD, "backward": BACKWARD, "step": UPDATE}
        places = [(DeepSpeedEngine, method, name) for method, name in methods.items()]
        places.append((DeepSpeedCPUAdam, "step", HOST_ADAM))
    sys.argv = [peer, *peer_flags(flags)]
    with patch.object(harness.Job, "train", train), marks(*places):
        runpy.run_module(f"benchmarks.peers.{peer}", run_name="__main__")


def peer_flags(flags: list[str]) -> list[str]:
    """Return train_clm.py's flags as a peer takes them, and the peer's own, which stand after `--own`, as they are."""
    from benchmarks.peers.harness import SHARED_FLAGS

    at = flags.index("--own") if "--own" in flags else len(flags)
    args = parse_args(flags[:at])
    shared = {name: getattr(args, name) for name in SHARED_FLAGS}
    result = [word for name, value in shared.items() if value is not None for word in (f"--{name}", str(value))]
    return result + ["--recompute"] * (args.gradient_checkpointing == "on") + flags[at + 1 :]


def main(argv: list[str]) -> None:
    """Run ours, or after `--peer NAME` a peer."""
    folder, warm_up, *flags = argv
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if flags[:1] == ["--peer"]:
        train_peer(flags[1], flags[2:], Path(folder), int(warm_up))
    else:
        train(flags, Path(folder), int(warm_up))


if __name__ == "__main__":
    main(sys.argv[1:])
