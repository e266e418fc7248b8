"""Which checkpoint a run goes on from when torchrun or a scheduler starts it again."""

from __future__ import annotations

import os

import pytest

import runtime
import train_clm
from args import TrainArgs


@pytest.fixture
def folder(tmp_path):
    """The folder of a run that ended before its first checkpoint."""
    (tmp_path / "metrics.jsonl").touch()
    return tmp_path


def settled(folder, **flags):
    local = {"model_name_or_path": "tiny", "from_scratch": True, "dataset": "synthetic"}  # asks no hub
    args = train_clm.settle_resume(TrainArgs(output_dir=str(folder), **local, **flags))
    return args.resume_from_checkpoint, args.overwrite_output_dir


def save(folder, *, age_s=0.0):
    path = folder / "checkpoints" / "step-00000004"
    path.mkdir(parents=True)
    then = path.stat().st_mtime - age_s
    os.utime(path, (then, then))


def test_auto_takes_the_last_checkpoint_where_there_is_one_and_else_starts_anew(folder):
    assert settled(folder, resume_from_checkpoint="auto") == (None, True)
    save(folder)
    assert settled(folder, resume_from_checkpoint="auto") == ("last", False)
    assert settled(folder) == (None, False)


def test_a_restart_goes_on_from_the_last_checkpoint_or_from_where_the_run_began(folder, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert settled(folder) == (None, True)
    assert settled(folder, resume_from_checkpoint="other/step-00000100") == ("other/step-00000100", False)
    save(folder)
    assert settled(folder, resume_from_checkpoint="other/step-00000100") == ("last", False)


def test_a_restart_never_goes_on_from_the_run_that_was_to_be_written_over(folder, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    save(folder, age_s=1e9)
    assert settled(folder, overwrite_output_dir=True) == (None, True)
    monkeypatch.setattr(runtime, "start_of_torchrun", lambda: 0.0)
    assert settled(folder, overwrite_output_dir=True) == ("last", True)


def test_auto_and_restarts_need_a_folder(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    found = train_clm.output_problems(TrainArgs(resume_from_checkpoint="auto"))
    assert [problem.split(":")[0] for problem in found] == ["--resume_from_checkpoint auto", "MAX_RESTARTS"]


def test_ranks_that_were_healthy_when_another_machine_failed_know_that_they_start_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CLM_EXIT_CODE_FILE", str(tmp_path / "code"))
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert [runtime.started_again() for _ in range(2)] == [False, False]
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert runtime.started_again()


def test_a_restart_forgets_how_the_ranks_before_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("CLM_EXIT_CODE_FILE", str(tmp_path / "code"))
    (tmp_path / "code").write_text("1")
    runtime._forget_exit_code()
    assert not runtime._is_explained()
