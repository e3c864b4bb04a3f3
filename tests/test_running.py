"""How a run is asked to stop."""

from __future__ import annotations

import os
import signal

import pytest

from evomerge.running import DRAIN, DROP, StopSignal


def test_each_signal_asks_more_urgently_and_the_third_raises():
    stop, said = StopSignal(), []
    with stop.installed(said.append):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.level == DRAIN and stop.reason == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.level == DROP and stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(said) == 2 and "Ctrl-C again" in said[0] and "dropped" in said[1]


def test_while_nothing_runs_the_first_signal_raises():
    stop = StopSignal()
    with stop.installed(print):
        stop.nothing_runs = True
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.level == DRAIN


def test_the_handlers_of_before_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal().installed(print):
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
