"""Stages that overlap, worked out by hand."""

from __future__ import annotations

import pytest

from service.workers.stages import Span, Stages, covered


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([], 0),
        ([(1, 3)], 2),
        ([(1, 3), (5, 6)], 3),
        ([(5, 6), (1, 3), (2, 4)], 4),
        ([(1, 9), (2, 3), (9, 10), (4, 5)], 9),
        ([(1, 3), (1, 3)], 2),
    ],
)
def test_a_moment_in_several_spans_counts_once(spans: list[Span], seconds: float) -> None:
    assert covered(spans) == seconds


def test_the_parts_add_up_and_compute_comes_before_decode_and_decode_before_render() -> None:
    #           0  1  2  3  4  5  6  7  8  9 10
    # decode    |==|     |=====|
    # compute         |=====|     |==|
    # render                      |=====|  |==|
    stages = Stages(decode=[(0, 1), (3, 5)], compute=[(2, 4), (6, 7)], render=[(6, 8), (9, 10)])
    timings = stages.timings(total=11)
    assert (timings.compute, timings.decode, timings.render, timings.queue) == (3, 2, 2, 4)


def test_a_request_that_did_nothing_only_waited() -> None:
    assert vars(Stages().timings(2.0)) == {"queue": 2.0, "decode": 0, "compute": 0, "render": 0}
