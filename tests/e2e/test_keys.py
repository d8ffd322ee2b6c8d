"""A server that asks for keys, listens where others may reach it, and is asked by real connections."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx
import pytest

from service.keys import make_key
from tests.api.support import check_problem
from tests.conftest import write_tiny
from tests.e2e.support import post
from tests.server import Server, running, wait_until

PAGE = "https://page.test"
ALLOWED = {"authorization", "x-api-key", "x-request-id", "content-type"}
EXPOSED = {"x-class-id", "x-class-name", "x-confidence", "x-request-id", "server-timing", "retry-after"}


@dataclass(frozen=True)
class Guarded:
    """The server, a key of it, and its file of keys."""

    server: Server
    key: str
    file: Path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    write_tiny(folder / "models" / "tiny")
    key, line = make_key("ann", "predict")
    keys = folder / "keys"
    keys.write_text(line)
    options = ["--models", str(folder / "models"), "--api-keys-file", str(keys), "--cors-origins", PAGE]
    options += ["--allowed-hosts", "maps.test"]
    with running(folder, *options, "--log-format", "json") as server:
        yield Guarded(server, key, keys)


def test_a_key_opens_the_door(guarded: Guarded, chelsea: bytes) -> None:
    with guarded.server.client() as client:
        check_problem(post(client, chelsea), 401, "key_missing")
        check_problem(post(client, chelsea, headers={"X-API-Key": "wrong"}), 401, "key_wrong")
        for headers in ({"X-API-Key": guarded.key}, {"Authorization": f"Bearer {guarded.key}"}):
            response = post(client, chelsea, headers=headers)
            assert response.status_code == 200
            assert response.json()["results"][0]["heatmaps"]


def status(guarded: Guarded, key: str) -> int:
    with guarded.server.client() as client:
        return client.get("/models", headers={"X-API-Key": key}).status_code


def test_keys_come_and_go_with_their_file_while_the_server_runs(guarded: Guarded) -> None:
    file, ann = guarded.file, guarded.file.read_text()
    key, bob = make_key("bob", "predict")
    assert status(guarded, key) == 401
    new = file.with_name("new")
    new.write_text(f"{ann}\n{bob}")
    new.rename(file)
    wait_until(lambda: status(guarded, key) == 200, 30, guarded.server)
    file.write_text(f"{ann}\nbob predict {key}")  # the key itself instead of its hash
    wait_until(lambda: "The keys stay as they were" in guarded.server.log.read_text(), 30, guarded.server)
    assert (status(guarded, key), status(guarded, guarded.key)) == (200, 200)
    file.write_text(ann)
    wait_until(lambda: status(guarded, key) == 401, 30, guarded.server)
    assert status(guarded, guarded.key) == 200
    assert key not in guarded.server.log.read_text()


def test_a_name_that_is_not_the_servers_reads_nothing(guarded: Guarded) -> None:
    """As a web page's would be that points its name at this machine."""
    port = urlsplit(guarded.server.url).port
    with guarded.server.client() as client:
        for path in ("/models", "/docs", "/openapi.json", "/models/tiny/heatmap"):
            for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "LOCALHOST.evil"):
                answer = client.get(path, headers={"Host": host, "X-API-Key": guarded.key})
                assert "localhost or maps.test" in check_problem(answer, 421, "host_not_allowed")["detail"]
        for host in (f"127.0.0.1:{port}", "10.1.2.3", "[::1]:1", f"LocalHost.:{port}", "maps.test", "MAPS.test:443"):
            assert client.get("/models", headers={"Host": host, "X-API-Key": guarded.key}).status_code == 200
        for path in ("/livez", "/readyz"):
            assert client.get(path, headers={"Host": "evil.example"}).status_code == 200


@pytest.mark.parametrize(("listed", "address"), [("10.0.0.0/8", "127.0.0.1"), ("127.0.0.0/8", "203.0.113.7")])
def test_addresses_are_told_by_listed_proxies_alone(tmp_path: Path, listed: str, address: str) -> None:
    write_tiny(tmp_path / "models" / "tiny")
    options = ["--models", str(tmp_path / "models"), "--max-rate", "0.1"]
    with running(tmp_path, *options, ready=False, FORWARDED_ALLOW_IPS=listed) as server, server.client() as client:
        for _ in range(2):
            answer = client.post("/models/tiny/infer", headers={"X-Forwarded-For": "203.0.113.7"})
        assert f"address {address} may send" in check_problem(answer, 429, "rate_limited")["detail"]


def test_the_line_to_try_is_one_with_a_key(guarded: Guarded) -> None:
    assert "curl -H 'X-API-Key: <key>' " in guarded.server.log.read_text()


def test_who_has_no_key_is_refused_before_a_byte_of_the_body_came(guarded: Guarded) -> None:
    url = urlsplit(guarded.server.url)
    with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        connection.sendall(
            b"POST /models/tiny/heatmap HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
            b"Content-Length: 1000000\r\n\r\n"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_every_line_of_the_log_is_an_object(guarded: Guarded, chelsea: bytes) -> None:
    with guarded.server.client() as client:
        for endpoint, query in (("heatmap", "?method=grad_cam&method=saliency"), ("infer", "?top_k=999")):
            headers = {"X-API-Key": guarded.key, "X-Request-ID": f"the-{endpoint}", "Content-Type": "image/png"}
            response = client.post(f"/models/tiny/{endpoint}{query}", content=chelsea, headers=headers)
            told = dict(re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"]))
            wait_until(lambda name=f"the-{endpoint}": name in guarded.server.log.read_text(), 60, guarded.server)
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


def names(header: str) -> set[str]:
    return {name.strip().lower() for name in header.split(",")}


def preflight(client: httpx.Client, origin: str, method: str, headers: str) -> httpx.Response:
    """What a browser asks before its page's request, without a key."""
    asked = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    return client.options("/models/tiny/heatmap", headers=asked)


def test_a_page_of_a_listed_origin_may_send_a_key_and_read_the_answer(guarded: Guarded, chelsea: bytes) -> None:
    with guarded.server.client() as client:
        for headers in (*ALLOWED, ",".join(sorted(ALLOWED))):
            allowed = preflight(client, PAGE, "POST", headers)
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == PAGE
            assert "POST" in allowed.headers["access-control-allow-methods"]
            assert names(allowed.headers["access-control-allow-headers"]) >= ALLOWED
            assert "access-control-allow-credentials" not in allowed.headers
        for key, status in ((guarded.key, 200), ("wrong", 401)):
            answer = post(client, chelsea, headers={"Origin": PAGE, "X-API-Key": key})
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert names(answer.headers["access-control-expose-headers"]) == EXPOSED


def test_other_pages_methods_and_headers_are_not_allowed(guarded: Guarded) -> None:
    with guarded.server.client() as client:
        for origin in ("https://other.test", "http://page.test", "https://page.test.evil", "null"):
            assert "access-control-allow-origin" not in preflight(client, origin, "POST", "x-api-key").headers
        assert preflight(client, PAGE, "DELETE", "x-api-key").status_code == 400
        assert preflight(client, PAGE, "POST", "x-evil").status_code == 400
        answer = client.get("/models", headers={"Origin": "https://other.test", "X-API-Key": guarded.key})
        assert "access-control-allow-origin" not in answer.headers


def test_without_origins_no_page_may_read_anything(client: httpx.Client) -> None:
    assert preflight(client, PAGE, "POST", "x-api-key").status_code == 405
    answer = client.get("/models", headers={"Origin": PAGE})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_page_of_documentation_runs_its_own_scripts_and_no_others(guarded: Guarded) -> None:
    with guarded.server.client() as client:
        page = client.get("/docs")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert (page.headers["x-frame-options"], page.headers["referrer-policy"]) == ("DENY", "no-referrer")
        assert page.headers["x-content-type-options"] == "nosniff"
        parts = [part.split() for part in page.headers["content-security-policy"].split(";")]
        policy = {name: sources for name, *sources in parts}
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == ["'none'"]
        assert policy["connect-src"] == ["'self'"]
        assert not {"'unsafe-inline'", "'unsafe-eval'", "*", "https:"} & set(policy["script-src"])
        (inline,) = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy["script-src"]
        linked = {
            "script-src": re.findall(r'<script[^>]* src="([^"]+)"', page.text),
            "style-src": re.findall(r'<link[^>]* rel="stylesheet" href="([^"]+)"', page.text),
            "img-src": re.findall(r'<link[^>]* rel="shortcut icon" href="([^"]+)"', page.text),
        }
        assert linked.pop("img-src") == ["data:,"]
        assert "data:" in policy["img-src"]
        types = {"script-src": "text/javascript", "style-src": "text/css"}
        for kind, (url,) in linked.items():
            assert "'self'" in policy[kind]
            assert not [source for source in policy[kind] if "." in source], "a server of somebody else's"
            file = client.get(urljoin(f"{guarded.server.url}/docs", url))
            assert str(file.url).startswith(guarded.server.url)
            assert (file.status_code, file.headers["content-type"].partition(";")[0]) == (200, types[kind])
            assert len(file.content) > 100_000
        (document,) = re.findall(r"url: '([^']+)'", inline)
        assert client.get(urljoin("/docs", document)).json()["openapi"].startswith("3.1")
        for gone in ("/redoc", "/docs/oauth2-redirect"):
            assert client.get(gone).status_code == 404
