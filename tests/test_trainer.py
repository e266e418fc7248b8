import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest

from args import TrainArgs
from checkpoint import Progress
from data import batches
from trainer import FIRST_STEPS, Hooks, Schedule, StepResult, Trainer, plan_schedule


def test_epochs_decide_the_length_unless_steps_are_given():
    args = TrainArgs(gradient_accumulation_steps=4, num_train_epochs=2)
    assert plan_schedule(10, args).num_steps == 6
    schedule = plan_schedule(10, TrainArgs(gradient_accumulation_steps=4, max_train_steps=7))
    assert (schedule.num_epochs, schedule.num_steps) == (3, 7)


def test_the_last_group_of_an_epoch_may_be_shorter():
    assert list(batches(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]


class Batches(list):
    """One epoch's batches."""

    sampler = SimpleNamespace(set_epoch=lambda epoch, start: None)


@pytest.fixture
def loop_of(monkeypatch):
    """Return a loop whose steps do nothing."""

    def make(hooks, progress=None, interrupted_at=0, **flags):
        engine = SimpleNamespace(
            args=TrainArgs(**flags),
            runtime=SimpleNamespace(on_cpu=True, is_main=False),
            weights_are_finite=lambda: True,
        )
        loop = Trainer(engine, SimpleNamespace(number=0), hooks, progress or Progress())

        def train_step(rows):
            loop.progress = replace(loop.progress, step=loop.progress.step + 1)
            loop.interrupted = loop.progress.step == interrupted_at
            return StepResult(loop.progress.step, 1.0, None, 1e-3, 1, 1, 1.0)

        monkeypatch.setattr(loop, "train_step", train_step)
        return loop

    return make


def test_the_collector_leaves_alone_what_is_there_after_the_first_steps_until_the_end(loop_of):
    frozen = []
    hooks = Hooks(on_step=lambda result: frozen.append(gc.get_freeze_count()))
    loop = loop_of(hooks, save_strategy="no")
    gc.unfreeze()
    with loop._spared_collector:
        loop._train_epoch(Batches(range(4)), Schedule(1, 4), SimpleNamespace(disable=True))
    assert FIRST_STEPS == 2 and frozen[:2] == [0, 0] and min(frozen[2:]) > 10_000
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({}, ["epoch 1", "save 3", "epoch 2", "save 6", "epoch 3", "save 8"]),
        ({"eval_strategy": "no", "eval_steps": 2}, ["save 3", "save 6", "save 8"]),
        ({"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no"}, ["step 3", "step 6", "step 8"]),
        ({"eval_strategy": "steps", "eval_steps": 8, "save_strategy": "no"}, ["step 8"]),
        ({"eval_strategy": "steps", "save_strategy": "no"}, ["step 8"]),
        (
            {"eval_steps": 2, "save_strategy": "steps", "save_steps": 4},
            ["step 2", "epoch 1", "step 4", "save 4", "step 6", "step 8", "save 8"],
        ),
    ],
)
def test_evaluations_come_before_the_checkpoint_of_their_step_and_none_twice(loop_of, flags, what):
    seen: list[str] = []
    hooks = Hooks(
        evaluate=lambda step, ended: seen.append(ended), save=lambda progress: seen.append(f"save {progress.step}")
    )
    loop_of(hooks, **flags).train(Batches(range(3)), Schedule(3, 8))
    assert seen == what


def test_a_run_that_a_signal_ended_in_its_last_step_is_evaluated_when_it_is_resumed(loop_of):
    seen = []
    hooks = Hooks(evaluate=lambda step, ended: seen.append((step, ended)), save=lambda progress: seen.append(progress))
    loop = loop_of(hooks, interrupted_at=3, eval_steps=3)
    loop.train(Batches(range(3)), Schedule(1, 3))
    assert seen == [loop.progress]
    loop_of(hooks, loop.progress).train(Batches(range(3)), Schedule(1, 3))
    assert seen[1:] == [(3, "step 3")]


def test_what_a_resumed_run_evaluates_before_its_first_step_is_of_the_step_before(loop_of):
    seen = []
    hooks = Hooks(evaluate=lambda step, ended: seen.append((step, ended)))
    loop = loop_of(hooks, Progress(step=3, rows=3), save_strategy="no")
    loop._train_epoch(Batches(), Schedule(2, 4), SimpleNamespace(disable=True))
    assert seen == [(3, "epoch 1")]
