"""watchdog.py: two real ranks of which one hangs, and the sentences about loops that stand still."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import watchdog
from benchmarks import faults
from conftest import torchrun
from hanging_ranks import HARM_STEP, TIMEOUT_S
from watchdog import Beat, Pulse

HERE = Path(__file__).resolve().parent


def beat(rank: int, phase: str, step: int, idle_s: float = 9.0) -> Beat:
    return Beat(rank, "node", 100 + rank, rank, 1, phase, step, idle_s, 3)


def name(beat: Beat) -> str:
    return f"rank {beat.rank}"


def run_ranks(harm: str, folder: Path) -> tuple[int, str, float]:
    """Return exit code, output and seconds of two ranks."""
    started = time.monotonic()
    code, output = torchrun(HERE / "hanging_ranks.py", 2, harm, CLM_EXIT_CODE_FILE=str(folder / "code"))
    return code, output, time.monotonic() - started


def test_a_stopped_rank_is_named_with_its_state_and_stack_and_no_process_outlives_the_run(tmp_path):
    code, output, _ = run_ranks("stop", tmp_path)
    assert code == 1 and (tmp_path / "code").read_text() == "1"
    told = re.search(
        r"error: rank 1 of 2 \(host \S+, pid (\d+)\) has not answered for (\d+) s; last seen (.*); the", output
    )
    assert told and int(told[2]) >= TIMEOUT_S and told[3] == f"at step {HARM_STEP} in forward"
    assert f"process {told[1]} is in state T (stopped):" in output and "in come_to" in output
    assert "[rank 0] thread MainThread:" in output and "dist.all_reduce(torch.ones(1))" in output
    assert not os.path.exists(f"/proc/{told[1]}")


def test_a_rank_that_stands_still_is_named_by_those_that_wait_and_shows_its_own_stack(tmp_path):
    code, output, _ = run_ranks("stand", tmp_path)
    assert code == 1 and (tmp_path / "code").read_text() == "1"
    assert re.search(rf"error: rank 1 of 2 .* has been at step {HARM_STEP} in forward for \d+ s", output)
    assert output.count("error: rank") == 1
    assert "[rank 1] thread MainThread:" in output and "in come_to" in output


def test_a_rank_that_has_ended_may_be_silent(tmp_path):
    code, output, seconds = run_ranks("silent_end", tmp_path)
    assert (code, "error" in output) == (0, False)
    assert seconds > 2 * TIMEOUT_S


def test_the_rank_that_is_furthest_behind_is_the_one_that_hangs():
    beats = [beat(0, "forward", 7), beat(1, "data", 7, idle_s=31.0), beat(2, "update", 6)]
    assert watchdog.standstill_text(beats, name).startswith("rank 2 has been at step 6 in update")
    assert watchdog.standstill_text(beats[:2], name) == (
        "rank 1 has been at step 7 in data for 31 s, and the others wait for it"
    )


def test_ranks_that_all_stand_at_the_same_place_are_told_together():
    text = watchdog.standstill_text([beat(0, "backward", 7, 40.0), beat(1, "backward", 7, 30.0)], name)
    assert text == "no rank has got any further for 30 s; all 2 are at step 7 in backward"


def test_the_first_step_of_a_process_which_compiles_is_never_called_a_hang():
    pulse = Pulse()
    places = []
    for phase, step in (("data", 9), ("forward", 9), ("checkpoint", 9), ("data", 10)):
        pulse.mark(phase, step)
        places.append(pulse.place[0])
    assert places == ["first data", "first forward", "checkpoint", "data"]
    assert [place in watchdog.STEP_PHASES for place in places] == [False, False, False, True]


def test_the_longest_phase_of_a_step_is_known_and_the_first_step_is_forgotten_once_another_has_been_seen(monkeypatch):
    clock = iter([0.0, 1.0, 101.0, 103.0, 110.0, 120.0, 121.0])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(clock))
    pulse, longest = Pulse(), []
    for phase, step in (("data", 9), ("update", 9), ("data", 10), ("update", 10), ("checkpoint", 10), ("data", 11)):
        pulse.mark(phase, step)
        longest.append(pulse.longest_s)
    assert longest == [0.0, 100.0, 100.0, 100.0, 100.0, 10.0]


@pytest.mark.parametrize(("timeout_s", "world_size"), [(0.0, 2), (300.0, 1)])
def test_nobody_watches_a_single_rank_or_without_a_timeout(timeout_s, world_size):
    with watchdog.watching(SimpleNamespace(world_size=world_size), timeout_s) as pulse:
        pulse.mark("data", 1)


def test_in_training_a_rank_that_stands_still_is_shown_at_its_place(tmp_path):
    harm = faults.harm_in_step(faults.STAND_STILL)
    run = faults.Run(tmp_path / "run", "--hang_timeout", str(TIMEOUT_S), planted=harm)
    run.wait_for_step(faults.BAD_STEP - 1)
    ended = run.finish()
    says = f"has been at step {faults.BAD_STEP} in forward"
    assert list(faults.end_problems(ended, [1], says)) == []
    assert "rank 1 of 2" in ended.output and "in harmed" in ended.output
