"""Signals request a stop; their handlers are installed only while a run trains."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from launch.core.ranks import EXIT_SAVED
from trainer.dist.preemption import EXIT_CODE, StopRequest


@pytest.fixture(autouse=True)
def no_nohup():
    """The default for SIGHUP, which nohup would have these tests ignore."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signal_asks_for_a_stop(number):
    with StopRequest() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        assert stop.agreed()  # and it stays asked for


def test_many_signals_are_one():
    with StopRequest() as stop:
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()


def test_handlers_are_put_back():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("ours"))
    try:
        with StopRequest():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["ours"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with pytest.raises(KeyError), StopRequest():
        raise KeyError
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ignored_by_the_shell_is_no_request(ignored):
    """Ctrl-C is in a shell's background, the terminal's end under nohup."""
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), ignored)
            assert not stop.agreed()
    finally:
        signal.signal(ignored, before)


def test_the_first_ctrl_c_asks_once_there_is_something_to_save_and_the_second_ends(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            assert not stop.agreed()
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.agreed() and stop.interrupted
            assert "ctrl-C again" in capsys.readouterr().err
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.agreed()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_runs_may_follow_each_other():
    for _ in range(2):
        with StopRequest() as stop:
            assert not stop.agreed()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.agreed()


def test_launchers_know_the_exit_code_of_a_rank_that_saved():
    assert EXIT_CODE == EXIT_SAVED


class Interrupted:
    """Like an array of MXNet's: it is given back while the interrupt comes."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # Python looks at signals between two calls


def test_an_interrupt_within_a_destructor_is_not_lost():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), StopRequest():
            Interrupted()
            time.sleep(60)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_time_that_is_up_stops_as_a_signal_does() -> None:
    with StopRequest(minutes=1e-9) as stop:
        assert stop.agreed() and not stop.interrupted
    with StopRequest(minutes=60) as stop:
        assert not stop.agreed()
