"""Noise drawn ahead of time."""

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import PrivacyError
from common.privacy.noise import KeyedNoise, SecureNoise
from common.privacy.noise.prefetch import Prefetch

KEYS = {"noise_key": bytes(32), "mask_key": bytes(range(32))}


class Tickets:
    """A source whose integers are 0, 1, 2, ...: whoever hands one out twice is found."""

    def __init__(self):
        self.drawn = 0
        self._lock = threading.Lock()

    def integers(self, count):
        with self._lock:
            start, self.drawn = self.drawn, self.drawn + count
        return np.arange(start, start + count, dtype=np.int32)

    def words(self, count):
        return np.zeros(count, dtype=np.uint64)


def noise_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("noise")]


@given(
    count=st.integers(0, 5),
    requests=st.lists(st.integers(0, 5), max_size=30),
    batches=st.none() | st.integers(0, 10),
)
def test_nothing_is_handed_out_twice(count, requests, batches):
    """For any requests; each gets as many as it asked for, and at most one draw lies ahead."""
    source, seen = Tickets(), set()
    with Prefetch(source, count=count, batches=batches) as ahead:
        for request in requests:
            drawn = ahead.integers(request).tolist()
            assert len(drawn) == request
            assert not seen.intersection(drawn)
            seen.update(drawn)
            assert source.drawn <= len(seen) + count


@given(requests=st.lists(st.integers(0, 5), max_size=20))
def test_the_result_does_not_depend_on_timing(requests):
    """Integers that are drawn long before they are asked for, and only then: the same."""

    def run(*, late):
        source, permits = Tickets(), threading.Semaphore(0)
        quick = source.integers

        def drawn(count):
            if late and threading.current_thread() is not threading.main_thread():
                permits.acquire()
            return quick(count)

        source.integers = drawn
        results = []
        with Prefetch(source, count=3) as ahead:
            for request in requests:
                permits.release()
                if not late and ahead._ahead is not None:
                    ahead._ahead.result()
                results.append(ahead.integers(request).tolist())
            permits.release()  # what nobody asked for any more
        return results

    assert run(late=False) == run(late=True)


def test_equal_requests_get_what_the_source_alone_would_give():
    """So a simulation with fixed noise does not depend on whether noise is drawn ahead."""
    alone = KeyedNoise(**KEYS)
    with Prefetch(KeyedNoise(**KEYS), count=1000, batches=3) as ahead:
        for _ in range(6):
            assert np.array_equal(ahead.integers(1000), alone.integers(1000))
            assert np.array_equal(ahead.words(3), alone.words(3))


def test_no_more_batches_are_drawn_than_will_be_asked_for():
    """Two are wanted: the third, which nobody foresaw, is drawn when it is asked for."""
    source = Tickets()
    with Prefetch(source, count=4, batches=2) as ahead:
        ahead.integers(4)
        ahead.integers(4)
        assert ahead._ahead is None
        assert source.drawn == 8
        assert ahead.integers(4).tolist() == [8, 9, 10, 11]


def test_it_draws_while_the_caller_computes():
    """By a thread of its own, before anybody asks."""
    called = threading.Event()
    source = Tickets()
    quick = source.integers

    def noted(count):
        assert threading.current_thread() is not threading.main_thread()
        called.set()
        return quick(count)

    source.integers = noted
    with Prefetch(source, count=4, batches=1) as ahead:
        assert called.wait(30)
        assert ahead.integers(4).tolist() == [0, 1, 2, 3]


def test_an_error_of_the_thread_is_raised_where_its_noise_is_asked_for():
    """And the next request is answered again."""
    source = Tickets()
    good = source.integers

    def failing(count):
        raise PrivacyError("no noise")

    source.integers = failing
    with Prefetch(source, count=2) as ahead:
        with pytest.raises(PrivacyError, match="no noise"):
            ahead.integers(2)
        source.integers = good
        assert ahead.integers(2).tolist() == [0, 1]


def test_the_thread_ends_with_close():
    """At once, and closing again does nothing; what was ahead is dropped, never handed out."""
    source = Tickets()
    ahead = Prefetch(source, count=2)
    assert noise_threads()
    ahead.close()
    ahead.close()
    assert not noise_threads()
    assert ahead.integers(2).tolist() == [2, 3]
    assert not noise_threads()


def test_the_thread_ends_with_the_object():
    """For callers that leave by an exception."""
    ahead = Prefetch(Tickets(), count=2)
    (thread,) = noise_threads()
    del ahead
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_a_process_that_forgets_to_close_ends():
    """Neither the thread nor a draw under way keeps it alive."""
    code = """
from common.privacy.noise import SecureNoise
from common.privacy.noise.prefetch import Prefetch
ahead = Prefetch(SecureNoise(), count=1_000_000)
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 3


def test_a_forked_child_is_refused():
    """It would be handed the very integers that the parent gets; closing it there does not hang."""
    code = """
import os, sys
from common.errors import PrivacyError
from common.privacy.noise import SecureNoise
from common.privacy.noise.prefetch import Prefetch
ahead = Prefetch(SecureNoise(), count=1000)
ahead._lock.acquire()
pid = os.fork()
if pid == 0:
    for draw in (ahead.integers, ahead.words):
        try:
            draw(1000)
        except PrivacyError:
            continue
        os._exit(1)
    ahead.close()
    os._exit(0)
ahead._lock.release()
ahead.integers(1000)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0


def test_its_text_shows_nothing():
    """Neither noise nor keys."""
    with Prefetch(SecureNoise(), count=10) as ahead:
        assert repr(ahead) == "Prefetch()"
