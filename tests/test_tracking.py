"""--report_to: TensorBoard's own reader finds the logged numbers; wandb, which wants an account, is played by a fake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tracking
from args import TrainArgs


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard reads, by name."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_run_gives_tensorboard_the_numbers_of_its_metrics_file(tmp_path, run_many):
    run = run_many(tmp_path, {"run": "--report_to tensorboard --max_grad_norm 1".split()}, world=2)["run"]
    assert run.code == 0, run.output
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    found = scalars(run.folder / "tensorboard")
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "step_ms", "eval_loss"} == set(found)
    for name, values in found.items():
        logged = [(line["step"], line[name]) for line in lines if name in line]
        assert [step for step, _ in values] == [step for step, _ in logged]
        assert [value for _, value in values] == pytest.approx([value for _, value in logged], rel=1e-6)


def test_wandb_gets_settings_numbers_and_an_end(tmp_path, monkeypatch):
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )

    def init(**settings: Any) -> Any:
        calls.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    tracker = tracking.open_tracker("wandb", tmp_path / "tiny-run", {"seed": 3})
    assert tracker is not None
    tracker.log(5, {"loss": 2.0})
    tracker.close()
    assert calls == [
        {"name": "tiny-run", "dir": str(tmp_path / "tiny-run"), "config": {"seed": 3}},
        (5, {"loss": 2.0}),
        "finished",
    ]


def test_a_package_that_is_missing_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tracking.problems(TrainArgs(report_to="wandb")) == [
        "--report_to wandb: wandb is not installed (pip install wandb)"
    ]
    assert tracking.problems(TrainArgs()) == [] and tracking.open_tracker("none", Path(), {}) is None
