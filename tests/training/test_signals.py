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
USUAL = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
}


@pytest.fixture(autouse=True)
def usual_handlers():
    before = {number: signal.signal(number, usual) for number, usual in USUAL.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def kill_at(last, number):
    """Return a callback that sends a signal after some steps."""
    return lambda step, history: os.kill(os.getpid(), number) if step == last else None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(bundled, output, number):
    straight = train(BUNDLED_IMAGE, model=bundled, **SIX)
    with pytest.raises(TrainingInterrupted, match=r"after 3 of 6 .* goes on from step 3") as caught:
        train(BUNDLED_IMAGE, model=bundled, output=output, callback=kill_at(3, number), **SIX)
    assert (caught.value.signal, caught.value.step) == (number, 3)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert newest_step(output) == 3
    assert Subject.load(output).summary["steps"] == 3
    assert all(signal.getsignal(number) is usual for number, usual in USUAL.items())
    resumed = train(BUNDLED_IMAGE, model=bundled, output=output, resume=True, **SIX)
    assert torch.equal(resumed.tokens[0], straight.tokens[0])


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), graceful() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second interrupt was ignored")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_outer_one_is_shared():
    with graceful() as outer:
        with graceful() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner is outer and outer.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_handlers_that_the_program_set_stay_in_charge(number):
    # nohup ignores SIGHUP.
    seen = []
    handler = signal.SIG_IGN if number == signal.SIGHUP else lambda *arguments: seen.append(number)
    signal.signal(number, handler)
    with graceful() as stop:
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) is handler
    assert stop.received is None and len(seen) == (handler is not signal.SIG_IGN)


def test_a_run_of_another_thread_and_one_in_its_last_step_finish(bundled, output):
    arguments = {"model": bundled, "output": output, **SIX}
    train(BUNDLED_IMAGE, callback=kill_at(6, signal.SIGTERM), **arguments)
    assert os.listdir(output.parent) == [output.name]
    output.unlink()
    thread = threading.Thread(target=lambda: train(BUNDLED_IMAGE, **{**arguments, "steps": 1}))
    thread.start()
    thread.join()
    assert Subject.load(output).summary["steps"] == 1
