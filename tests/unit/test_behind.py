"""Work behind: in order, bounded, and nothing after a failure."""

from __future__ import annotations

import threading
import time

import pytest

from stages.behind import Behind


def test_all_is_done_in_order_at_the_end() -> None:
    done: list[int] = []
    with Behind(depth=2) as behind:
        for i in range(50):
            behind.submit(done.append, i)
    assert done == list(range(50))


def test_work_goes_on_beside_the_caller() -> None:
    start = time.perf_counter()
    with Behind(depth=3) as behind:
        for _ in range(6):
            behind.submit(time.sleep, 0.1)
            time.sleep(0.1)
    assert time.perf_counter() - start < 0.9  # 1.2 one after another


def test_what_waits_is_bounded() -> None:
    gate, given = threading.Event(), threading.Event()

    def fill() -> None:
        with Behind(depth=2) as behind:
            for _ in range(2):
                behind.submit(gate.wait)
            given.set()
            behind.submit(gate.wait)
            given.clear()

    thread = threading.Thread(target=fill)
    thread.start()
    assert given.wait(5)
    time.sleep(0.1)
    assert given.is_set()  # the third is not taken
    gate.set()
    thread.join(5)
    assert not given.is_set()


def test_after_a_failure_nothing_is_begun_and_the_caller_is_told() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"), Behind(depth=9) as behind:
        behind.submit(time.sleep, 0.05)
        behind.submit(fail)
        behind.submit(done.append, 1)
    with pytest.raises(OSError, match="no"), Behind(depth=1) as behind:
        behind.submit(fail)
        behind.submit(done.append, 2)  # waits for the first
        done.append(3)
    assert not done


def test_where_the_caller_fails_what_has_not_begun_is_left() -> None:
    done: list[int] = []
    with pytest.raises(ValueError, match="mine"), Behind(depth=9) as behind:
        behind.submit(time.sleep, 0.1)
        for i in range(3):
            behind.submit(done.append, i)
        raise ValueError("mine")
    assert not done
