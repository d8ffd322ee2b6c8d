"""A soak of some seconds: kills, departures, nonsense and attacks under load cost nobody an answer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.soak.__main__ import Options, soak
from tests.soak.findings import bounds

pytestmark = pytest.mark.alone

SLACK = 10.0
SHORT = Options(minutes=0.25, clients=8, kill_every_s=6.0, tiny=True, compiled_heads=0, attack_every_s=0.2)


def test_a_short_soak_keeps_its_bounds(tmp_path: Path) -> None:
    found = soak(SHORT, tmp_path)
    broken = [bound.row() for bound in bounds(found, SLACK) if bound.kept is False]
    assert not broken, (broken, found.ledger)
    assert found.kills
    assert found.attacks.bursts
    assert all(math.isfinite(seconds) for seconds in found.recoveries())
    assert found.ledger.cancelled
    assert {one.kind for one in found.ledger.outcomes} == {"valid", "bad", "canary"}
    assert len(found.probes) > 200
