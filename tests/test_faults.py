"""One real fault of each kind that the other tests leave out; `python -m benchmarks.faults` tries them all, and often.

Elsewhere: damaged shards and a failing write (test_checkpoint.py), a folder in use, a rank that raises and a loss that
is not finite (test_train_clm.py).
"""

import contextlib
import math
import os
import random
import signal
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import recorder
import trainer
from args import TrainArgs
from benchmarks import faults
from benchmarks.faults import SAVE_STEPS, Bench, NotPossible, Run

RESUME = ("--resume_from_checkpoint", "last")


def losses(folder):
    """Return the losses logged for each step, by all runs into the folder."""
    logged = defaultdict(list)
    for step, loss in faults.logged_losses(folder):
        logged[step].append(loss)
    return logged


def kill_in_training(run):
    run.wait_for_step(SAVE_STEPS + 2)
    faults.kill(run, 1, 0.01)


def kill_in_a_save(run):
    run.wait_for_save(3 * SAVE_STEPS)
    faults.kill(run, 0, 0.0)


def sigterm_to_torchrun(run):
    run.wait_for_step(3 * SAVE_STEPS + 1)
    os.kill(run.torchrun(), signal.SIGTERM)


@contextlib.contextmanager
def mounted(folder, size_mib):
    try:
        with faults.tmpfs(folder, size_mib=size_mib) as disk:
            yield disk
    except NotPossible as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A run killed in training, resumed and killed in a save, resumed and told to end: (newest, last step) of each."""
    folder = tmp_path_factory.mktemp("chain") / "run"
    stands: list[tuple[int, int]] = []
    for fault, code in ((kill_in_training, 1), (kill_in_a_save, 1), (sigterm_to_torchrun, 143)):
        run = Run(folder, *(RESUME if stands else ()))
        fault(run)
        assert list(faults.end_problems(run.finish(), [code])) == []
        stands.append((faults.checkpoints(folder)[-1], faults.last_step(folder)))
    return folder, stands


def test_a_killed_rank_costs_at_most_the_steps_since_the_last_checkpoint_and_sigterm_none(chain):
    folder, (killed_in_training, killed_in_a_save, told_to_end) = chain
    assert killed_in_training[0] == SAVE_STEPS and killed_in_training[1] > SAVE_STEPS
    assert killed_in_a_save[0] >= 2 * SAVE_STEPS and killed_in_a_save[1] == 3 * SAVE_STEPS
    assert told_to_end[0] == told_to_end[1] > 3 * SAVE_STEPS
    assert faults.result(folder)["resumed_from"] == killed_in_a_save[0]


def test_the_steps_that_a_resumed_run_repeats_have_the_same_losses_bit_for_bit(chain):
    folder, stands = chain
    logged = losses(folder)
    assert list(logged) == list(range(1, stands[-1][1] + 1))
    assert all(len(set(each)) == 1 for each in logged.values())
    assert sum(map(len, logged.values())) - len(logged) == sum(done - newest for newest, done in stands)


def test_what_a_kill_leaves_of_a_save_is_removed_by_the_next(chain):
    folder, _ = chain
    assert not list((folder / "checkpoints").glob(".*"))


def test_ctrl_c_twice_ends_every_process(tmp_path):
    run = Run(tmp_path / "run")
    run.wait_for_step(1)
    for _ in range(2):
        run.process.send_signal(signal.SIGINT)
    assert list(faults.end_problems(run.finish(), [130])) == []


def test_a_really_full_disk_is_one_message_and_leaves_the_checkpoint_before(tmp_path):
    with mounted(tmp_path / "disk", 3 * faults.CHECKPOINT_MIB // 2) as disk:
        run = Run(disk / "run")
        run.wait_for_save(2 * SAVE_STEPS)
        ended = run.finish()
        assert list(faults.end_problems(ended, [1])) == []
        assert ended.output.count("could not be written: ") == 1 and "[rank 1]" not in ended.output
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == [f"step-{SAVE_STEPS:08d}"]


def test_an_output_folder_that_nobody_may_write_to_is_refused_before_training(tmp_path):
    try:
        trial = faults.read_only_folder(Bench(tmp_path, random.Random(0)), 0)
    except NotPossible as reason:
        pytest.skip(str(reason))
    assert trial.code == 2 and trial.problems == ()


def test_a_gradient_that_is_not_finite_ends_the_run_before_a_checkpoint(monkeypatch):
    monkeypatch.setattr(trainer.dist, "all_reduce", lambda *arguments, **options: None)
    engine = SimpleNamespace(
        args=TrainArgs(precision="bf16"),
        runtime=SimpleNamespace(device="cpu", on_cpu=True, rank=0, world_size=1, is_main=True),
        forward_is_local=lambda settled: True,
        dp_size=1,
        counts=False,
        learning_rate=1e-3,
        steps_in_backward=False,
        forward_backward=lambda batch, scale, last, at_loss: at_loss(torch.tensor(1.0)),
        step=lambda: math.nan,
    )
    loop = trainer.Trainer(engine, SimpleNamespace(number=0), trainer.Hooks(), checkpoint.Progress())
    with pytest.raises(trainer.NonFiniteLoss, match="gradient norm of step 1 is nan"):
        loop.train_step([{}])
    assert loop.progress.step == 0


def test_the_checkpoint_just_written_is_kept_beside_those_of_higher_steps(tmp_path):
    for step in (12, 18, 20):
        (tmp_path / f"step-{step:08d}").mkdir()
    checkpoint._prune(tmp_path, 2, newest=tmp_path / "step-00000012")
    assert [path.name[-2:] for path in checkpoint.step_folders(tmp_path)] == ["20", "12"]


def test_a_run_that_overwrites_another_leaves_no_checkpoint_that_last_could_take(tmp_path):
    (tmp_path / "checkpoints" / "step-00000100").mkdir(parents=True)
    for name in ("final", "tensorboard"):
        (tmp_path / name).mkdir()
    (tmp_path / "metrics.jsonl").touch()
    recorder._remove_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.long
def test_after_a_killed_rank_max_restarts_lets_the_run_go_on_to_the_losses_of_an_undisturbed_one(tmp_path):
    trial = faults.sigkill_with_restart(Bench(tmp_path, random.Random(0)), 0)
    assert trial.code == 0 and trial.problems == (), "\n".join(trial.problems)
