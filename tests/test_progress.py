"""Progress as plain lines: what is printed where there is no terminal."""

from __future__ import annotations

import pytest

from evomerge import progress as progress_module
from evomerge.errors import UserError
from evomerge.progress import Progress, clock, parse_size, size


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (185, "3m05s"), (3600, "1h00m"), (7620, "2h07m")]
)
def test_a_duration_is_short_to_read(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(999, "999 B"), (1000, "1.0 kB"), (1_500_000, "1.5 MB"), (2.7e9, "2.7 GB"), (3e12, "3.0 TB")],
)
def test_bytes_are_in_decimal_units(num_bytes, text):
    assert size(num_bytes) == text


def test_lines_say_how_much_is_done_how_fast_and_what_is_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with Progress(live=False).stage("search", 10) as stage:
        now[0] = 20.0
        stage.advance(4, "best 0.800")
        now[0] = 21.0
        stage.advance(1, "best 0.810")  # within the interval between lines: not printed
        now[0] = 50.0
        stage.advance(5, "best 0.900")
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "search: 4 of 10  5.0 s each, 30s left, best 0.800",
        "search: 10 of 10  5.0 s each, 0s left, best 0.900",
    ]


def test_quick_reading_is_not_reported(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with Progress(live=False).stage("checking base", 1000, unit="B") as stage:
        stage.update(1000)
    assert capsys.readouterr().err == ""
    with Progress(live=False).stage("checking base", 4_000_000, unit="B") as stage:
        now[0] = 2.0
        stage.update(1_000_000)
    assert "checking base: 1.0 MB of 4.0 MB  500.0 kB/s, 6s left" in capsys.readouterr().err


def test_quiet_prints_nothing(capsys):
    progress = Progress(quiet=True)
    progress.log("hello")
    with progress.stage("search", 2) as stage:
        stage.advance(2)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_bars_close_and_logged_lines_stand_above_them(capsys):
    progress = Progress(live=True)
    with progress.stage("search", 2) as stage:
        progress.log("trial 1 failed [nan]")
        stage.advance(2, "best 0.5")
    text = capsys.readouterr().err
    assert "trial 1 failed [nan]" in text  # square brackets are text, not markup
    assert "2 of 2" in text and "best 0.5" in text


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2GB", 2 * 10**9), ("500MB", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("10kb", 10_000), ("3 TB", 3 * 10**12),
        ("4096", 4096), ("7B", 7), ("1K", 1000), (" 5gib ", 5 * 2**30),
    ],
)  # fmt: skip
def test_sizes_are_read(text: str, num_bytes: int):
    assert parse_size(text, where="--shard-size") == num_bytes


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1GB", "GB", "1PB", "1 G B", "2iB", "big", "1e9", "0.1B"])
def test_what_is_no_size(text: str):
    with pytest.raises(UserError, match=r"--shard-size: .*(.|\n)*500MB"):
        parse_size(text, where="--shard-size")
