"""Twenty SIGKILLs at random moments change no table; `python -m tests.end_to_end.chaos --kills 100` sends more."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.chaos import chaos


def test_twenty_kills_change_no_table(tmp_path: Path) -> None:
    assert "20 kills" in chaos(tmp_path, kills=20, seed=0)
