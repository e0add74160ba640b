import pytest

from sparkmed.config import Train
from sparkmed.training.schedule import averaging_decay, learning_rate


def train(**more):
    return Train(epochs=10, warmup_epochs=2, optimizer={"lr": 0.1}, **more)


def test_warm_up_leads_from_one_process_to_the_scaled_rate():
    assert learning_rate(train(), 4, 0) == pytest.approx(0.1)
    assert learning_rate(train(), 4, 1) == pytest.approx(0.25)
    assert learning_rate(train(), 4, 2) == pytest.approx(0.4)
    assert learning_rate(train(scale_lr="sqrt"), 4, 2) == pytest.approx(0.2)
    assert learning_rate(train(scale_lr="none"), 4, 2) == pytest.approx(0.1)


def test_decay():
    assert learning_rate(train(), 1, 6) == pytest.approx(0.05)  # the middle of half a cosine
    assert learning_rate(train(), 1, 10) == pytest.approx(0, abs=1e-12)
    assert learning_rate(train(schedule="poly"), 1, 6) == pytest.approx(0.1 * 0.5**0.9)
    assert learning_rate(train(schedule="constant"), 2, 9.99) == pytest.approx(0.2)


def test_no_warm_up_and_nothing_but_warm_up():
    assert learning_rate(Train(warmup_epochs=0, epochs=2), 2, 0) == pytest.approx(2e-3)
    assert learning_rate(Train(warmup_epochs=9, epochs=2), 2, 1) == pytest.approx(1.5e-3)


def test_averages_follow_fast_at_first():
    assert averaging_decay(0.99, 0) == pytest.approx(0.1)
    assert averaging_decay(0.99, 10**6) == 0.99
