"""Progress in pipes and logs: lines, no carriage returns."""

import sys

import pytest

from fastdiff import _progress


class _Clock:
    now = 0.0

    def monotonic(self):
        return self.now


def test_a_pipe_gets_a_line_every_ten_seconds(monkeypatch, capsys):
    clock = _Clock()
    monkeypatch.setattr(_progress, "time", clock)
    with _progress.progress(200, "step", initial=100) as bar:
        for _ in range(50):
            clock.now += 1.0
            bar.update()
            bar.set_postfix_str("loss 0.5")
    error = capsys.readouterr().err
    assert "\r" not in error
    lines = error.splitlines()
    assert len(lines) == 5
    assert lines[0] == "110 of 200 steps (55%), about 2 min left, loss 0.5"
    assert lines[-1] == "150 of 200 steps (75%), about 50 s left, loss 0.5"


def test_a_terminal_gets_a_bar_and_silence_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with _progress.progress(3, "step") as bar:
        bar.update(3)
    assert "\r" in capsys.readouterr().err
    with _progress.progress(3, "step", show=False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (89, "89 s"),
        (91, "2 min"),
        (5340, "89 min"),
        (12_000, "3 h 20 min"),
        (400_000, "4.6 days"),
    ],
)
def test_durations(seconds, text):
    assert _progress.duration(seconds) == text
