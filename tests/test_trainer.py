import math

import pytest

from args import TrainArgs
from trainer import Evaluation, _groups, plan_schedule


def test_epochs_decide_the_length_unless_steps_are_given():
    args = TrainArgs(gradient_accumulation_steps=4, num_train_epochs=2)
    assert plan_schedule(10, args).num_steps == 6
    schedule = plan_schedule(10, TrainArgs(gradient_accumulation_steps=4, max_train_steps=7))
    assert (schedule.num_epochs, schedule.num_steps) == (3, 7)


def test_the_last_group_of_an_epoch_may_be_shorter():
    assert list(_groups(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_perplexity_is_the_exponential_of_the_mean_loss():
    assert Evaluation(math.log(50.0), 7).perplexity == pytest.approx(50.0)
    assert Evaluation(1e9, 7).perplexity == math.inf
