"""A server that asks for keys, listens where others may reach it, and is asked by real connections."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from service.keys import make_key
from tests.api.support import check_problem
from tests.conftest import write_tiny
from tests.e2e.support import post
from tests.server import Server, running, wait_until


@dataclass(frozen=True)
class Guarded:
    """The server, and a key of it."""

    server: Server
    key: str


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    write_tiny(folder / "models" / "tiny")
    key, line = make_key("ann", "predict")
    keys = folder / "keys"
    keys.write_text(line)
    with running(
        folder, "--models", str(folder / "models"), "--api-keys-file", str(keys), "--log-format", "json"
    ) as server:
        yield Guarded(server, key)


def test_a_key_opens_the_door(guarded: Guarded, chelsea: bytes) -> None:
    with guarded.server.client() as client:
        check_problem(post(client, chelsea), 401, "key_missing")
        check_problem(post(client, chelsea, headers={"X-API-Key": "wrong"}), 401, "key_wrong")
        for headers in ({"X-API-Key": guarded.key}, {"Authorization": f"Bearer {guarded.key}"}):
            response = post(client, chelsea, headers=headers)
            assert response.status_code == 200
            assert response.json()["results"][0]["heatmaps"]


def test_who_has_no_key_is_refused_before_a_byte_of_the_body_came(guarded: Guarded) -> None:
    url = urlsplit(guarded.server.url)
    with socket.create_connection((url.hostname, url.port), timeout=10) as connection:
        connection.sendall(
            b"POST /models/tiny/heatmap HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\n"
            b"Content-Length: 1000000\r\n\r\n"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_every_line_of_the_log_is_an_object(guarded: Guarded, chelsea: bytes) -> None:
    with guarded.server.client() as client:
        for endpoint, query in (("heatmap", "?method=grad_cam&method=saliency"), ("infer", "?top_k=999")):
            headers = {"X-API-Key": guarded.key, "X-Request-ID": f"the-{endpoint}", "Content-Type": "image/png"}
            response = client.post(f"/models/tiny/{endpoint}{query}", content=chelsea, headers=headers)
            told = dict(re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"]))
            wait_until(lambda name=f"the-{endpoint}": name in guarded.server.log.read_text(), 5, guarded.server)
            text = guarded.server.log.read_text()
            records = [json.loads(line) for line in text.splitlines()]
            (line,) = [record for record in records if record.get("request_id") == f"the-{endpoint}"]
            assert (line["message"], line["status"], line["outcome"]) == ("request", response.status_code, "answered")
            assert (line["model"], line["key"], line["pictures"]) == ("tiny", "ann", 1)
            assert line["path"] == f"/models/tiny/{endpoint}"
            assert line.get("methods", []) == (["grad_cam", "saliency"] if endpoint == "heatmap" else [])
            for stage in ("queue", "decode", "compute", "render"):
                assert line[f"{stage}_ms"] == pytest.approx(float(told[stage]), abs=0.001)
            assert line["total_ms"] >= float(told["total"])
    assert {record["process"] for record in records} == {"server", "cpu"}
    assert not any(record.get("path") in ("/livez", "/readyz") for record in records)
    assert guarded.key not in text
    assert "top_k" not in text
    assert "uvicorn.access" not in text
