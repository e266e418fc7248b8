"""pace.py: when a rank is called slow, and a real run that has one."""

from __future__ import annotations

import random
import time

import pytest

from benchmarks import faults
from pace import FIRST_STEPS, SLOW_INTERVALS, SlowRanks, Stopwatch

STEP_S = 1.0


def warnings(*steps: list[float], logging_steps: int = 1) -> list[str]:
    told: list[str] = []
    slow_ranks = SlowRanks(told.append, logging_steps)
    for own_s in ([9.0] + [0.1] * (len(steps[0]) - 1),) * FIRST_STEPS + steps:
        slow_ranks.add(own_s, STEP_S)
    return told


def test_a_rank_that_stays_slow_is_named_once_with_its_time_and_that_of_the_others():
    (told,) = warnings(*[[0.2, 0.2, 0.5, 0.2]] * 9)
    assert told.startswith("rank 2 of 4 is slow: ")
    assert "take it 500.0 ms a step, the others 200.0 ms" in told


@pytest.mark.parametrize(
    ("own_s", "why"),
    [([0.2, 0.29], "less than half more"), ([0.01, 0.05], "4 % of a step"), ([0.0, 0.0], "nothing"), ([0.7], "alone")],
)
def test_a_small_difference_is_none(own_s, why):
    assert warnings(*[own_s] * 9) == [], why


def test_a_few_slow_intervals_or_another_rank_each_time_are_chance():
    few = [[0.2, 0.9]] * (SLOW_INTERVALS - 1)
    assert warnings(*few, [0.2, 0.2], *few) == []
    assert warnings(*[[0.2, 0.9], [0.9, 0.2]] * 5) == []


def test_an_interval_is_as_long_as_that_of_the_log():
    steps = [[0.2, 0.8], [0.2, 0.2]]  # on the mean 0.5
    assert warnings(*steps * (SLOW_INTERVALS - 1), logging_steps=2) == []
    assert len(warnings(*steps * SLOW_INTERVALS, logging_steps=2)) == 1


def test_the_stopwatch_adds_loading_and_the_last_local_forward_pass():
    watch = Stopwatch(on_cpu=True)

    def seconds(forward_s, *, is_local):
        watch.start_loading()
        time.sleep(0.02)
        watch.end_loading()
        watch.start_forward(is_local=is_local)
        time.sleep(forward_s)
        watch.end_forward()
        return watch.seconds()

    assert 0.02 <= seconds(1.0, is_local=False) < 1.0
    assert 0.12 <= seconds(0.1, is_local=True) < 1.0
    assert 0.12 <= seconds(1.0, is_local=False) < 1.0


@pytest.mark.long
@pytest.mark.parametrize("number", range(2), ids=["torch_ddp", "low_level_zero"])
def test_a_run_with_a_slow_rank_says_so_and_goes_on(tmp_path, number):
    trial = faults.slow_rank(faults.Bench(tmp_path, random.Random(0)), number)
    assert trial.code == 0 and trial.problems == (), "\n".join(trial.problems)
