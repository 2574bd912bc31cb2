"""Ranks: processes exchange errors and signals, and stop together. Threads stand for processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dmin_trace.capture.ranks import Ranks
from dmin_trace.errors import CaptureError, TraceError


def run_together(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns or raises in each of `count` ranks."""
    barrier, messages = threading.Barrier(count), [""] * count

    def work_as(rank: int) -> Any:
        def gather(message: str) -> list[str]:
            messages[rank] = message
            barrier.wait(10)
            gathered = list(messages)
            barrier.wait(10)
            return gathered

        try:
            return work(Ranks(rank, count, gather))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work_as, range(count)))


def test_meet_of_one_process_returns_its_signal() -> None:
    ranks = Ranks()
    ranks.meeting = True
    assert ranks.meet() == 0 and ranks.meet(15) == 15 and not ranks.hold(OSError("torn"))
    with pytest.raises(OSError, match="torn"), ranks.holding():
        raise OSError("torn")


def test_meet_returns_the_signal_of_any_process() -> None:
    assert run_together(3, lambda ranks: ranks.meet(15 if ranks.rank == 1 else 0)) == [15, 15, 15]


def test_meet_raises_an_error_of_one_process_in_all() -> None:
    def work(ranks: Ranks) -> int:
        ranks.meeting = True
        if ranks.rank == 1:
            with ranks.holding():
                raise TraceError("the disk is full")
            assert ranks.hold(OSError("a later one"))
        return ranks.meet()

    first, second, third = run_together(3, work)
    assert str(first) == str(third) == "Process 1 of 3 failed: the disk is full"
    assert isinstance(first, CaptureError) and isinstance(second, TraceError)


def test_meet_without_the_others_is_an_error_that_says_how_to_continue() -> None:
    def gather(message: str) -> list[str]:
        raise RuntimeError("connection closed\nby a peer")

    ranks = Ranks(0, 2, gather)
    ranks.meeting = True
    with pytest.raises(CaptureError, match=r"Process 0 of 2 no longer .*\(RuntimeError: connection closed\)\. Run the"):
        ranks.meet()
    assert not ranks.hold(OSError("nobody waits any more"))
