"""Models are loaded, reloaded and unloaded under traffic by whoever has an admin's key; metrics add up."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.keys import make_key
from tests.conftest import TINY_CODE, write_tiny
from tests.documents import COMMANDS
from tests.e2e.support import RAW, Floats, map_of, post, same_map
from tests.fragile import write_deadly
from tests.server import Server, running, wait_until
from tests.threads import repeating

PREDICT, PREDICT_LINE = make_key("ann", "predict")
ADMIN, ADMIN_LINE = make_key("root", "predict,admin")
SLOW: dict[str, Any] = {"method": "rise", "gen_params": {"n": 6000}, "timeout_s": 300}
MOST: dict[str, Any] = {"method": "rise", "gen_params": {"n": 20_000}}


@dataclass
class Operated:
    server: Server
    models: Path
    client: httpx.Client

    def admin(self, path: str) -> httpx.Response:
        return self.client.post(path, headers={"X-API-Key": ADMIN})


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    folder = tmp_path_factory.mktemp("operated")
    write_tiny(folder / "models" / "tiny")
    write_tiny(folder / "models" / "other")
    (folder / "keys").write_text(f"{PREDICT_LINE}\n{ADMIN_LINE}\n")
    options = ("--models", str(folder / "models"), "--api-keys-file", str(folder / "keys"))
    with running(folder, *options) as server, server.client() as client:
        client.headers["Authorization"] = f"Bearer {PREDICT}"
        yield Operated(server, folder / "models", client)


@pytest.fixture
def one(operated: Operated) -> Operated:
    operated.client.headers.pop("X-API-Key", None)
    return operated


def by_admin(one: Operated, path: str) -> httpx.Response:
    with one.server.client() as client:
        return client.post(path, headers={"X-API-Key": ADMIN})


def rewrite(folder: Path, seed: int) -> None:
    """Other weights."""
    (folder / "net.py").write_text(TINY_CODE.replace("manual_seed(3)", f"manual_seed({seed})"))


def test_only_an_admin_may(one: Operated) -> None:
    for path in ("/models/tiny/load", "/models/tiny/unload"):
        lacking = one.client.post(path)
        assert (lacking.status_code, lacking.json()["code"]) == (403, "key_lacks_right")
        with one.server.client() as stranger:
            assert stranger.post(path).json()["code"] == "key_missing"
    assert one.client.get("/models/tiny").json()["state"] == "ready"


def test_without_keys_nobody_may(client: httpx.Client) -> None:
    refused = client.post("/models/tiny/unload")
    assert (refused.status_code, refused.json()["code"]) == (401, "key_missing")
    assert client.get("/models/tiny").json()["state"] == "ready"


def explained(one: Operated, picture: bytes) -> tuple[str, Floats]:
    response = post(one.client, picture, **RAW, target_classes=[1])
    assert response.status_code == 200, response.text
    body = response.json()
    return body["revision"], map_of(body["results"][0]["heatmaps"][0])


def test_a_reload_under_traffic_costs_no_request_and_each_answer_is_of_one_revision(
    one: Operated, chelsea: bytes
) -> None:
    expected = dict([explained(one, chelsea)])
    with repeating(lambda: explained(one, chelsea), 4) as answers:
        rewrite(one.models / "tiny", 4)
        before = one.client.get("/models/tiny").json()["revision"]
        loaded = by_admin(one, "/models/tiny/load")
        assert loaded.status_code == 200, loaded.text
        assert loaded.json()["revision"] != before
        assert one.client.get("/readyz").status_code == 200
        revision, found = explained(one, chelsea)
        assert revision == loaded.json()["revision"]
        expected[revision] = found
    assert len(expected) == 2
    assert {revision for revision, _ in answers} == set(expected)
    for revision, found in answers:
        assert same_map(found, expected[revision], 1e-4)


def test_a_reload_that_fails_says_why_and_the_old_one_serves(one: Operated, chelsea: bytes) -> None:
    before = explained(one, chelsea)
    (one.models / "tiny" / "net.py").write_text("def build(): raise ValueError('no such luck')")
    failed = by_admin(one, "/models/tiny/load")
    assert (failed.status_code, failed.json()["code"]) == (503, "model_failed")
    assert "no such luck" in failed.json()["detail"]
    assert "it is served as before" in failed.json()["detail"]
    assert "Retry-After" not in failed.headers
    revision, found = explained(one, chelsea)
    assert revision == before[0]
    assert same_map(found, before[1], 1e-6)
    rewrite(one.models / "tiny", 6)
    assert by_admin(one, "/models/tiny/load").status_code == 200


def test_an_unloaded_model_answers_what_it_accepted_and_stays_away(one: Operated, chelsea: bytes) -> None:
    with ThreadPoolExecutor(8) as pool:
        accepted = [pool.submit(post, one.client, chelsea, "other", **SLOW) for _ in range(8)]
        wait_until(lambda: metric(one, "heatmap_queue_requests") == 8, 60, one.server)
        unloaded = by_admin(one, "/models/other/unload")
        assert (unloaded.status_code, unloaded.json()["state"]) == (200, "unloaded")
        assert [answer.result().status_code for answer in accepted] == [200] * 8
    refused = post(one.client, chelsea, "other")
    assert (refused.status_code, refused.json()["code"]) == (503, "model_unloaded")
    assert "Retry-After" not in refused.headers
    assert post(one.client, chelsea).status_code == 200
    one.server.workers()[0].kill()
    wait_until(lambda: one.client.get("/readyz").status_code == 503, 60, one.server)
    one.server.wait_ready()
    assert post(one.client, chelsea, "other").json()["code"] == "model_unloaded"
    assert by_admin(one, "/models/other/load").json()["state"] == "ready"
    assert post(one.client, chelsea, "other").status_code == 200


def test_a_new_folder_becomes_a_model(one: Operated, chelsea: bytes) -> None:
    missing = by_admin(one, "/models/new/load")
    assert (missing.status_code, missing.json()["code"]) == (404, "model_not_found")
    write_tiny(one.models / "new")
    assert by_admin(one, "/models/new/load").json()["state"] == "ready"
    assert [model["id"] for model in one.client.get("/models").json()["models"]] == ["new", "other", "tiny"]
    assert post(one.client, chelsea, "new").status_code == 200
    assert by_admin(one, "/models/new/unload").status_code == 200


def test_a_new_model_whose_load_crashes_costs_no_worker(one: Operated, chelsea: bytes) -> None:
    (worker,) = one.server.workers()
    write_deadly(one.models / "deadly")
    failed = by_admin(one, "/models/deadly/load")
    assert (failed.status_code, failed.json()["code"]) == (503, "model_failed")
    assert "the process that captured it was ended by signal 11" in failed.json()["detail"]
    assert one.client.get("/models/deadly").json()["state"] == "failed"
    assert [other.pid for other in one.server.workers()] == [worker.pid]
    shutil.rmtree(one.models / "deadly")
    write_tiny(one.models / "deadly")
    assert by_admin(one, "/models/deadly/load").json()["state"] == "ready"
    assert by_admin(one, "/models/deadly/unload").status_code == 200


def metric(one: Operated, name: str, **labels: str) -> float:
    text = one.client.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    (value,) = [sample.value for sample in samples if sample.name == name and sample.labels == labels]
    return value


def ended(one: Operated) -> dict[str, float]:
    names = ("accepted", "answered", "failed", "cancelled", "timed_out")
    return {name: metric(one, f"heatmap_requests_{name}_total") for name in names}


def test_the_documented_command_loads_a_model(one: Operated) -> None:
    (command,) = [command.line for command in COMMANDS if "<key>" in command.line]
    command = command.replace("http://127.0.0.1:8000", one.server.url).replace("<key>", ADMIN)
    command = command.replace("efficientnet_lite0", "tiny").replace("curl", "curl --fail-with-body -sS")
    answer = subprocess.run(["bash", "-c", command], check=True, capture_output=True, timeout=120)
    assert json.loads(answer.stdout)["state"] == "ready"


def test_metrics_add_up(one: Operated, chelsea: bytes) -> None:
    before = ended(one)
    for _ in range(3):
        assert post(one.client, chelsea).status_code == 200
    assert post(one.client, chelsea, method="no_such").status_code == 422  # known to workers alone
    assert post(one.client, chelsea, colormap="no_such").status_code == 422  # never accepted
    assert post(one.client, [chelsea] * 8, **MOST, timeout_s=0.2).status_code == 504
    with one.server.client(timeout=2) as hasty, pytest.raises(httpx.ReadTimeout):
        post(hasty, [chelsea] * 16, headers=dict(one.client.headers), **MOST, timeout_s=300)
    wait_until(lambda: metric(one, "heatmap_queue_requests") == 0, 60, one.server)
    after = ended(one)
    found = {name: after[name] - before[name] for name in after}
    assert found == {"accepted": 6, "answered": 3, "failed": 1, "cancelled": 1, "timed_out": 1}
    assert metric(one, "heatmap_stage_seconds_count", model="tiny", stage="compute") >= 3
    assert metric(one, "heatmap_worker_serves", device="cpu") == 1
    replaced = metric(one, "heatmap_workers_replaced_total")
    one.server.workers()[0].kill()
    wait_until(lambda: metric(one, "heatmap_workers_replaced_total") == replaced + 1, 60, one.server)
    one.server.wait_ready()


def test_slow_requests_starve_no_quick_one(one: Operated, chelsea: bytes) -> None:
    """A stream of RISE, each of which would hold the only slot for long; grad_cam is answered meanwhile."""
    with repeating(lambda: post(one.client, chelsea, **SLOW), 8):
        wait_until(lambda: metric(one, "heatmap_queue_requests") >= 8, 60, one.server)
        quick = [post(one.client, chelsea) for _ in range(10)]
        assert metric(one, "heatmap_queue_requests") >= 4, "they still wait"
        assert [answer.status_code for answer in quick] == [200] * 10
