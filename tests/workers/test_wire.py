"""Messages over a real pipe."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
import tracemalloc

import pytest

from service.errors import QueueFull
from service.workers import wire
from service.workers.messages import Answer, Beat, Done, Heatmap, PictureResult, Timings, ToParent

COUNT, SIZE = 12, 2**20


def answer(count: int) -> Done:
    maps = tuple(
        Heatmap(
            "a", 1, 2, "b", 0.5, {"n": 1}, "fp32", (0.0, 1.0), None, None, None, "npy", "c", 3, 4, bytes([i]) * SIZE
        )
        for i in range(count)
    )
    return Done(7, Answer("m", "r", (PictureResult(0, 3, 4, (), maps),), Timings()), 1.5)


def through(message: ToParent) -> ToParent:
    """What arrives of a message."""
    here, there = multiprocessing.Pipe()
    with here, there:
        sending = threading.Thread(target=wire.send, args=(there, message))
        sending.start()
        received = wire.receive(here)
        sending.join()
    return received


@pytest.mark.parametrize("message", [Beat(0.5), answer(0), answer(3)])
def test_a_message_arrives_as_it_was_sent(message: ToParent) -> None:
    assert through(message) == message


def test_a_problem_arrives_as_it_was_sent() -> None:
    received = through(Done(1, QueueFull("Full.", retry_after=2.0)))
    assert isinstance(received, Done)
    assert isinstance(received.outcome, QueueFull)
    assert (received.outcome.detail, received.outcome.retry_after) == ("Full.", 2.0)


def test_a_message_is_in_memory_once_while_it_arrives() -> None:
    """But for the one heatmap that is being read."""
    message = answer(COUNT)
    tracemalloc.start()
    try:
        received = through(message)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert received == message
    assert COUNT * SIZE < peak < (COUNT + 3) * SIZE


def test_a_worker_that_dies_in_the_midst_of_a_message_is_gone() -> None:
    here, there = multiprocessing.Pipe()
    with here:
        with there:
            there.send((pickle.dumps(answer(0)), 2))
            there.send_bytes(b"one of two")
        with pytest.raises(EOFError):
            wire.receive(here)


def test_a_heatmap_can_be_copied() -> None:
    done = answer(1)
    assert copy.deepcopy(done) == done
    assert all(pickle.loads(pickle.dumps(done, protocol)) == done for protocol in (2, 4, 5))
