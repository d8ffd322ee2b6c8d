"""The soak's judgement: a checker that overlooks a difference, a loss or a leak would prove nothing."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.e2e.support import file_of
from tests.soak.answers import Difference, Reply, check_same
from tests.soak.cases import Case, bad_cases, real_cases, tiny_cases
from tests.soak.findings import Bound, Findings, bounds
from tests.soak.traffic import Outcome
from tests.soak.watch import Memory, Probe, Slope, per_interval

Change = Callable[[dict[str, Any]], None]

PIXELS = np.linspace(0, 255, 30 * 40 * 3).reshape(30, 40, 3).astype(np.uint8)
VALUES = np.linspace(-1, 3, 100, dtype=np.float32).reshape(10, 10)


def npy(values: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values))
    return file.getvalue()


def heatmap(data: bytes, media_type: str) -> dict[str, Any]:
    text = base64.b64encode(data).decode()
    return {"class_id": 3, "confidence": 0.5, "value_range": [-1.0, 3.0], "media_type": media_type, "data": text}


def answer(change: Change = lambda _answer: None) -> Reply:
    png = file_of(Image.fromarray(PIXELS))
    heatmaps = [heatmap(npy(VALUES), "application/x-npy"), heatmap(png, "image/png")]
    body = {"request_id": "a", "revision": "r", "results": [{"index": 0, "heatmaps": heatmaps}]}
    change(body)
    return Reply(200, {"content-type": "application/json"}, json.dumps(body).encode())


def heatmaps_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = body["results"][0]["heatmaps"]
    return found


def with_data(place: int, data: bytes) -> Change:
    return lambda body: heatmaps_of(body)[place].update(data=base64.b64encode(data).decode())


def with_value(**values: Any) -> Change:
    return lambda body: heatmaps_of(body)[0].update(values)


def picture(pixels: int, levels: int) -> bytes:
    """The picture with some pixels off by some levels."""
    changed = PIXELS.astype(int)
    changed[0, :pixels] = changed[0, :pixels] + levels
    return file_of(Image.fromarray(changed.astype(np.uint8)))


NOISE = np.zeros((10, 10), np.float32)
NOISE[5, 5] = 3e-4


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda body: body.update(request_id="b"), id="another request"),
        pytest.param(with_value(confidence=0.50005), id="rounding of a confidence"),
        pytest.param(with_value(value_range=[-1.0002, 3.0]), id="rounding of a range"),
        pytest.param(with_data(0, npy(VALUES + 0.9 * NOISE)), id="rounding of a map"),
        pytest.param(with_data(1, picture(40, 2)), id="two levels"),
        pytest.param(with_data(1, picture(12, 90)), id="one pixel in a hundred"),
    ],
)
def test_roundings_are_no_difference(change: Change) -> None:
    check_same(answer(change), answer(), chaotic=False)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda body: body.update(revision="s"), id="another revision"),
        pytest.param(lambda body: body.update(more=1), id="a key more"),
        pytest.param(lambda body: heatmaps_of(body).pop(), id="a heatmap less"),
        pytest.param(with_value(class_id=4), id="another class"),
        pytest.param(with_value(confidence=0.5002), id="another confidence"),
        pytest.param(with_value(confidence=None), id="no confidence"),
        pytest.param(with_value(value_range=[-1.0, 3.001]), id="another range"),
        pytest.param(with_data(0, npy(VALUES + 1.1 * NOISE)), id="another value"),
        pytest.param(with_data(0, npy(VALUES * np.nan)), id="not a number"),
        pytest.param(with_data(0, npy(VALUES[:9])), id="another shape"),
        pytest.param(with_data(1, picture(40, 3)), id="three levels"),
        pytest.param(with_data(1, file_of(Image.fromarray(PIXELS[:29]))), id="another size"),
    ],
)
def test_what_says_something_else_differs(change: Change) -> None:
    with pytest.raises(Difference):
        check_same(answer(change), answer(), chaotic=False)


def test_sixteen_bits_are_compared_as_finely_as_eight() -> None:
    pixels = np.arange(1000, 1100, dtype=np.uint16).reshape(10, 10)
    one, same, other = (Reply(200, GRAY16, file_of(Image.fromarray(pixels + off))) for off in (0, 500, 600))
    check_same(same, one, chaotic=False)
    with pytest.raises(Difference):
        check_same(other, one, chaotic=False)


GRAY16 = {"content-type": "image/png", "x-class-id": "1", "x-class-name": "a", "x-confidence": "0.5"}


@pytest.mark.parametrize(("header", "value"), [("x-class-id", "2"), ("x-confidence", "0.6"), ("content-type", "a/b")])
def test_the_headers_of_a_single_heatmap_count(header: str, value: str) -> None:
    one, other = (Reply(200, GRAY16, picture(pixels, 1)) for pixels in (0, 1))
    check_same(other, one, chaotic=False)
    with pytest.raises(Difference):
        check_same(Reply(200, {**GRAY16, header: value}, other.body), one, chaotic=False)


def test_chaotic_maps_must_correlate() -> None:
    rng = np.random.default_rng(0)
    near, far = (npy(VALUES + rng.normal(0, sigma, VALUES.shape).astype(np.float32)) for sigma in (0.01, 0.2))
    check_same(answer(with_data(0, near)), answer(), chaotic=True)
    with pytest.raises(Difference, match="correlate"):
        check_same(answer(with_data(0, far)), answer(), chaotic=True)


def test_no_two_cases_share_a_name() -> None:
    cases: list[Case] = [*tiny_cases(), *real_cases(), *bad_cases()]
    assert len({case.name for case in cases}) == len(cases)
    assert all(bool(case.code) == (case in bad_cases()) for case in cases)


# Bounds


def sound() -> Findings:
    """What a service does that keeps every bound, for three minutes."""
    found = Findings(started=0.0, ended=180.0, kills=[15.0 * turn for turn in range(1, 12)], exit_status=0)
    found.descriptors = (18, 18)
    for kill in found.kills:
        found.ledger.outcomes += [
            Outcome("valid", kill - 1, kill + 0.1, 200, ""),  # the dead worker's last answer
            Outcome("valid", kill + 0.1, kill + 0.2, 503, "no_worker"),
            Outcome("valid", kill - 1, kill + 3, 200, ""),
            Outcome("valid", kill + 3.5, kill + 4, 200, ""),
        ]
        statuses = ((0.0, 200), (0.05, 503), (2.5, 503), (2.55, 200))
        found.probes += [Probe("/readyz", kill + after, status, 0.01) for after, status in statuses]
    found.memory = [Memory(float(at), 70 + at % 2, 800 + 10 * (at % 15)) for at in range(180)]
    return found


def broken(found: Findings) -> list[str]:
    return [bound.what for bound in bounds(found) if bound.kept is False]


def test_what_keeps_every_bound() -> None:
    found = sound()
    assert broken(found) == []
    assert found.recoveries() == pytest.approx([3.0] * 11)
    assert found.readiness() == pytest.approx([2.55] * 11)
    assert found.share() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda found: found.ledger.lost.append("one"), "lost"),
        (lambda found: found.ledger.differing.append("one"), "differ"),
        (lambda found: found.attacks.failures.append("one"), "attacks"),
        (lambda found: found.ledger.wrong.append("one"), "wrong"),
        (lambda found: found.reloads.update([500]), "reloads"),
        (lambda found: found.ledger.outcomes.extend([Outcome("valid", 1, 2, 503, "x")] * 40), "valid"),
        (lambda found: setattr(found, "kills", [*found.kills, 176.0]), "kill"),
        (lambda found: found.probes.extend([Probe("/livez", 5, 200, 0.06)] * 5), "p99"),
        (lambda found: found.probes.append(Probe("/livez", 5, 0, 0.01)), "without an answer"),
        (lambda found: found.probes.append(Probe("/livez", 5, 503, 0.01)), "livez"),
        (lambda found: setattr(found, "memory", leaking(server=1.0)), "memory of the server"),
        (lambda found: setattr(found, "memory", leaking(workers=1.0)), "memory of the workers"),
        (lambda found: setattr(found, "descriptors", (18, 19)), "descriptors"),
        (lambda found: setattr(found, "counters", counters(accepted=11)), "metrics"),
        (lambda found: setattr(found, "exit_status", None), "exit status"),
        (lambda found: setattr(found, "children_left", 1), "children"),
        (lambda found: found.folders_left.append("one"), "folders"),
    ],
)
def test_what_breaks_a_bound(spoil: Callable[[Findings], None], what: str) -> None:
    found = sound()
    spoil(found)
    assert any(what in name for name in broken(found)), broken(found)


def leaking(server: float = 0.0, workers: float = 0.0) -> list[Memory]:
    """MiB more per minute."""
    return [Memory(float(at), 70 + server * at / 60, 800 + workers * at / 60) for at in range(180)]


def counters(accepted: int) -> dict[str, float]:
    return {"accepted": accepted, "answered": 6, "failed": 2, "cancelled": 1, "timed_out": 1}


def test_counters_that_add_up() -> None:
    found = sound()
    found.counters = counters(accepted=10)
    assert broken(found) == []


def test_time_is_not_judged_while_others_are_busy() -> None:
    found = sound()
    found.kills.append(176.0)
    found.others = 0.9
    judged: dict[str, Bound] = {bound.what: bound for bound in bounds(found)}
    assert judged["seconds from a kill to the next 200"].kept is None
    assert math.inf in found.recoveries()


def test_a_slope_comes_with_its_error() -> None:
    exact = Slope.of([(60.0 * minute, 5 + 2 * minute) for minute in range(5)])
    assert [exact.slope, exact.error] == pytest.approx([2, 0], abs=1e-9)
    rng = np.random.default_rng(0)
    slopes = [Slope.of([(6.0 * turn, rng.normal()) for turn in range(20)]) for _ in range(400)]
    assert np.std([one.slope for one in slopes]) == pytest.approx(np.mean([one.error for one in slopes]), rel=0.1)


def test_workers_are_weighed_at_the_end_of_each_interval() -> None:
    samples = [Memory(float(at), float(at), float(at % 10)) for at in range(40)]
    points = per_interval(samples, [0.0, 10.0, 20.0, 30.0], since=10.0)
    assert [(point.server, point.workers) for point in points] == [(14.5, 9.0), (24.5, 9.0)]
