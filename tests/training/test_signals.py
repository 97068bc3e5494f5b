"""Signals end a run after a whole step, with a checkpoint; handlers come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from training.shared import BUNDLED_IMAGE, QUICK, newest_step

from sefi_fast.subject import Subject
from sefi_fast.training import TrainingInterrupted, train
from sefi_fast.training.signals import graceful

SIX = {**QUICK, "steps": 6}


@pytest.fixture(autouse=True)
def usual_handlers():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(bundled, output, number):
    straight = train(BUNDLED_IMAGE, model=bundled, **SIX)

    def callback(step, history):
        if step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(TrainingInterrupted, match=r"after 3 of 6 .* goes on from step 3") as caught:
        train(BUNDLED_IMAGE, model=bundled, output=output, callback=callback, **SIX)
    assert (caught.value.signal, caught.value.step) == (number, 3)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert newest_step(output) == 3
    assert Subject.load(output).summary["steps"] == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = train(BUNDLED_IMAGE, model=bundled, output=output, resume=True, **SIX)
    assert torch.equal(resumed.tokens[0], straight.tokens[0])


def test_a_signal_in_the_last_step_finishes_the_run(bundled, output):
    def callback(step, history):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    train(BUNDLED_IMAGE, model=bundled, output=output, callback=callback, **SIX)
    assert os.listdir(output.parent) == [output.name]


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), graceful() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second interrupt was ignored")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_programs_own_handlers_stay_in_charge():
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with graceful() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM] and stop.received is None


def test_a_signal_that_is_ignored_stays_ignored():
    # nohup ignores SIGHUP.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with graceful() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert stop.received is None


def test_an_outer_one_is_shared():
    with graceful() as outer:
        with graceful() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner is outer and outer.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_training_works_in_another_thread(bundled):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(BUNDLED_IMAGE, model=bundled, **{**SIX, "steps": 1}))
    )
    thread.start()
    thread.join()
    assert len(results[0].history.loss) == 1
