"""The tables and ratios of benchmarks/side_by_side.py, the flags it hands out, and one real comparison on the CPU."""

from __future__ import annotations

import importlib
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch

from args import parse_args
from benchmarks import side_by_side
from benchmarks.peers import harness, hf_trainer, plain
from benchmarks.peers.harness import Job
from benchmarks.side_by_side import CASES, Outcome, by_setting, command_of, make_rows, parse, ratio, run_group, typical
from runtime import EXIT_NAN

PEER_FLAGS = "--model_name_or_path tiny --per_device_train_batch_size 2 --block_size 32 --max_train_steps 7".split()


def outcome(name, tokens_per_s, *, round_=1, is_ours=False, status="ok"):
    return Outcome("tiny", name, is_ours, round_, status, "", 1.0, tokens_per_s=tokens_per_s)


def job(*flags):
    return Job("peer", harness.parser(None).parse_args([*PEER_FLAGS, *flags]))


def test_a_run_that_is_cut_off_leaves_no_process_not_even_in_a_session_of_its_own(tmp_path):
    told = tmp_path / "pid"
    rank = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    with (tmp_path / "log").open("w") as log:
        assert run_group([sys.executable, "-c", launcher], log, dict(os.environ), limit_s=3) is None
    assert not psutil.pid_exists(int(told.read_text()))


def test_ratios_are_taken_to_the_baseline_and_to_the_fastest_peer():
    rows = make_rows([outcome("plain", 100.0), outcome("better", 160.0), outcome("ddp", 200.0, is_ours=True)], "plain")
    assert [row.to_baseline for row in rows] == [1.0, 1.6, 2.0]
    assert [row.to_best_peer for row in rows] == [0.625, 1.0, 1.25]


def test_ours_is_never_the_best_peer_and_a_failed_baseline_gives_no_ratio():
    rows = make_rows([outcome("plain", None, status="oom"), outcome("ddp", 9.0, is_ours=True)], "plain")
    assert [(row.to_baseline, row.to_best_peer) for row in rows] == [(None, None), (None, None)]


def test_a_ratio_pairs_the_runs_of_a_round_so_that_a_slow_minute_hits_both():
    loop = [outcome("plain", speed, round_=number) for number, speed in enumerate((100.0, 10.0, 50.0), start=1)]
    ddp = [outcome("ddp", speed, round_=number) for number, speed in enumerate((120.0, 12.0, 90.0), start=1)]
    assert ratio(ddp, loop) == pytest.approx(1.2)
    assert typical(ddp).tokens_per_s == 90.0
    assert ratio([*ddp[:1], replace(ddp[1], status="timeout")], loop[1:]) is None


def test_the_table_has_a_line_a_contestant_and_a_dash_for_what_was_not_measured():
    tables = by_setting([outcome("plain", 1234.5), outcome("ddp", None, is_ours=True, status="oom")], "plain")
    lines = side_by_side.markdown(tables, "plain", head="today").splitlines()
    assert lines[0] == "today" and "tiny" in lines[2] and "baseline: plain" in lines[2]
    assert lines[-2].startswith("| plain | ok | 1,234 | 1.00 | 1.00 | - |")
    assert lines[-1].startswith("| **ddp** | oom | - | - | - | - |")
    assert len({line.count("|") for line in lines[4:]}) == 1


@pytest.mark.parametrize("name", CASES)
def test_every_command_of_a_case_is_one_that_its_script_takes(name, tmp_path, monkeypatch):
    case, options = CASES[name], parse(["--case", name])
    assert case.baseline in {each.name for each in case.entries[0].contestants}
    for entry in side_by_side.scaled(case, [1, 2]):
        for contestant in entry.contestants:
            line = command_of(contestant, entry.setting, case, options, tmp_path)
            arguments = shlex.split(line)
            if entry.setting.gpus > 1:
                launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
                assert arguments[1 : 1 + len(launcher)] == launcher
                del arguments[1 : 1 + len(launcher)]
            if contestant.peer is None:
                assert parse_args(arguments[2:]).max_train_steps == 20
                continue
            monkeypatch.setattr(sys, "argv", arguments[2:])
            jobs: list[Job] = []
            module = importlib.import_module(f"benchmarks.peers.{contestant.peer}")
            monkeypatch.setattr(module, "run", lambda job, *_, jobs=jobs, **__: jobs.append(job))
            module.main()
            assert jobs[0].args.mem_cap == entry.setting.mem_cap_gb and jobs[0].recompute == entry.setting.recompute
            assert jobs[0].peer == contestant.name


def test_a_case_that_scales_is_run_on_every_number_of_gpus_by_those_it_is_enough_for():
    one, two = side_by_side.scaled(CASES["ranks"], [1, 2])
    assert [each.name for each in one.contestants] == ["fsdp2", "torch_ddp", "low_level_zero", "gemini"]
    assert {each.name for each in two.contestants} - {each.name for each in one.contestants} == {
        "hybrid_tp2",
    }
    assert [str(entry.setting)[:12] for entry in (one, two)] == ["tiny, batch ", "tiny, 2 GPUs"]
    assert side_by_side.powers_of_two(6) == [1, 2, 4]


@pytest.mark.parametrize(("flags", "recompute"), [([], False), (["--recompute"], True), (["--no-recompute"], False)])
def test_recompute_is_the_cases_own_unless_it_is_told(flags, recompute, monkeypatch):
    monkeypatch.setattr(side_by_side, "gpu_memory_gb", lambda: 141.0)
    options = parse(["--case", "gpus", "--models", "13b", "30b", "--gpus", "4", *flags])
    large, largest = side_by_side.chosen_entries(CASES["gpus"], options)
    assert large.setting.recompute == recompute and largest.setting.recompute == (flags != ["--no-recompute"])
    names = ["hybrid_tp2", "hybrid_tp2_pp2", "hybrid_interleaved", "hybrid_pp4_interleaved", "hybrid_interleaved_4"]
    assert [each.name for each in large.contestants][-6:] == [*names, "hybrid_interleaved_10"]


def test_scaling_is_the_speed_over_that_of_as_many_single_gpus():
    alone = [outcome("ddp", 100.0), outcome("zero", 50.0)]
    both = [
        replace(outcome(name, speed), setting="two", gpus=2, alone="tiny")
        for name, speed in (("ddp", 190.0), ("tp", 9.0))
    ]
    tables = by_setting([*alone, *both], "ddp")
    assert [row.scaling for row in tables["tiny"]] == [None, None]
    assert [row.scaling for row in tables["two"]] == [0.95, None]
    assert "| 95.0% |" in side_by_side.markdown(tables, "ddp", head="")


@pytest.mark.parametrize(
    ("code", "told", "status"),
    [
        (0, "ok", "ok"),
        (0, None, "error"),
        (1, "oom", "oom"),
        (1, "ok", "error"),
        (3, None, "oom"),
        (None, "ok", "timeout"),
    ],
)
def test_under_torchrun_a_run_that_fails_says_itself_how(code, told, status):
    assert side_by_side.status_of(code, told) == status


@pytest.mark.slow
def test_a_peer_and_ours_on_two_ranks_have_equal_losses_and_one_result(tmp_path):
    flags = [
        "--case",
        "ranks",
        "--gpus",
        "2",
        "--only",
        "fsdp2",
        "torch_ddp",
        "--steps",
        "7",
        "--output",
        str(tmp_path),
    ]
    handler = signal.getsignal(signal.SIGTERM)
    assert side_by_side.main(flags) == 0
    signal.signal(signal.SIGTERM, handler)
    peer, ours = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert (peer["status"], ours["status"]) == ("ok", "ok"), (peer, ours)
    assert (peer["gpus"], ours["gpus"]) == (2, 2)
    assert (ours["first_loss"], ours["last_loss"]) == pytest.approx((peer["first_loss"], peer["last_loss"]), 1e-5)
    assert (tmp_path / "logs" / "tiny-2-fsdp2-1.txt").read_text().count('{"status"') == 1


def test_an_unknown_contestant_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        parse(["--case", "cpu", "--only", "plane"])
    assert "plane: not in this case; its contestants are hf_trainer" in capsys.readouterr().err


def test_a_run_over_its_time_is_ended_with_all_its_children(tmp_path):
    pid_file = tmp_path / "pid"
    log = tmp_path / "log.txt"
    command = shlex.join(["bash", "-c", f"sleep 60 & echo $! >{pid_file}; wait"])
    done = side_by_side.run(command, log, limit_s=1)
    assert done.status == "timeout" and done.seconds < 10
    child = int(pid_file.read_text())
    deadline = time.time() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.time() < deadline, "the child lives on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("script", "status", "notes"),
    [
        (
            'echo "{\\"status\\": \\"skipped\\", \\"notes\\": \\"x is not installed\\"}"',
            "skipped",
            "x is not installed",
        ),
        ("echo 'RuntimeError: no'; echo bye; exit 1", "error", "RuntimeError: no"),
        ("kill -KILL $$", "killed", ""),
        ("exit 3", "oom", ""),
    ],
)
def test_a_run_that_measures_nothing_says_how_it_ended(tmp_path, script, status, notes):
    done = side_by_side.run(shlex.join(["bash", "-c", script]), tmp_path / "log.txt", limit_s=20)
    assert (done.status, done.notes, done.tokens_per_s) == (status, notes, None)


def test_a_peer_is_skipped_in_one_line_where_it_is_not_installed(capsys):
    with pytest.raises(SystemExit, match="0"):
        harness.run(job(), lambda job: pytest.fail("it ran"), needs="no_such_package")
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"status": "skipped", "plugin": "peer", "notes": "no_such_package is not installed"}


def test_a_peer_whose_loss_is_not_finite_ends_with_the_code_of_ours(capsys):
    with pytest.raises(SystemExit, match=str(EXIT_NAN)):
        harness.run(job(), lambda job: job.train(lambda batch: torch.tensor(math.nan)))
    assert json.loads(capsys.readouterr().out)["status"] == "nan"


def test_the_trainer_sees_the_same_rows_and_weights_as_the_plain_loop():
    by_hand, by_trainer = job("--recompute"), job("--recompute")
    plain.train(by_hand, compiled=False)
    hf_trainer.train(by_trainer, compiled=False)
    assert [float(loss) for loss in by_trainer.losses] == pytest.approx([float(loss) for loss in by_hand.losses], 1e-5)
    assert by_trainer.result("ok")["throughput"]["measured_steps"] == 2


@pytest.mark.long
def test_ours_and_plain_pytorch_stand_in_one_table_with_equal_losses_and_are_not_run_twice(tmp_path, capsys):
    flags = ["--case", "cpu", "--only", "plain", "torch_ddp", "--steps", "7", "--output", str(tmp_path)]
    handler = signal.getsignal(signal.SIGTERM)
    assert side_by_side.main(flags) == 0
    first = capsys.readouterr()
    assert side_by_side.main(flags) == 0
    signal.signal(signal.SIGTERM, handler)
    peer, ours = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert (peer["status"], ours["status"]) == ("ok", "ok"), first.err
    assert (ours["first_loss"], ours["last_loss"]) == pytest.approx((peer["first_loss"], peer["last_loss"]), 1e-5)
    assert ours["to_baseline"] == pytest.approx(ours["tokens_per_s"] / peer["tokens_per_s"])
    assert 0 < ours["first_step_s"] < ours["ready_s"] < 120
    assert "torch_ddp" not in capsys.readouterr().err
