"""A server that asks for keys, listens where others may reach it, and is asked by real connections."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from service.keys import make_key
from tests.api.support import check_problem
from tests.conftest import write_tiny
from tests.e2e.support import post
from tests.server import Server, running


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
    with running(folder, "--models", str(folder / "models"), "--api-keys-file", str(keys)) as server:
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
