"""Which hosts the server answers for, and what any other is told."""

from __future__ import annotations

import pytest

from service.api.hosts import Hosts
from tests.api.support import Api, ask, check_problem

HOSTS = Hosts(("0.0.0.0", "maps.example.org", "Lab."))
OPEN = ["/livez", "/readyz"]
CLOSED = ["/", "/docs", "/openapi.json", "/metrics", "/models", "/nowhere", "/livez/", "/readyz/x"]


@pytest.mark.parametrize("port", ["", ":", ":80", ":8000"])
@pytest.mark.parametrize(
    "name",
    [
        "localhost",
        "LocalHost",
        "localhost.",
        "model.localhost",
        "127.0.0.1",
        "10.1.2.3",
        "8.8.8.8",
        "[::1]",
        "[2001:DB8::7]",
        "[::ffff:1.2.3.4]",
        "[fe80::1%25eth0]",
        "maps.example.org",
        "MAPS.example.org.",
        "lab",
        "",
    ],
)
def test_addresses_localhost_and_given_names_are_allowed(name: str, port: str) -> None:
    assert HOSTS.refusal(name + port) is None


@pytest.mark.parametrize("port", ["", ":80", ":8000"])
@pytest.mark.parametrize(
    "name",
    [
        "evil.example",
        "localhost.evil.example",
        "notlocalhost",
        "evil.example.org",
        "sub.maps.example.org",
        "maps.example.org.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1.nip.io",
        "127.1",
        "2130706433",
        "0x7f000001",
        "localhost..",
        ".localhost.evil.example",
        "user@localhost",
        "localhost, evil.example",
        "localhost evil",
        "[evil.example]",
        "..",
    ],
)
def test_any_other_name_is_foreign(name: str, port: str) -> None:
    refused = HOSTS.refusal(name + port)
    assert refused is not None
    assert "Use an IP address or localhost or maps.example.org or lab;" in refused.detail
    assert "--allowed-hosts" in refused.detail


def test_a_port_is_a_number_and_the_last() -> None:
    for host in ("localhost:evil", "localhost:80:evil", "evil:localhost", "localhost:80@evil.example"):
        assert HOSTS.refusal(host) is not None


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_foreign_host_reads_nothing(path: str, method: str) -> None:
    api = Api(cors_origins="*")
    headers = {"host": "evil.example:8000", "origin": "http://evil.example:8000"}
    response = ask(api.app, method, path, headers=headers)
    assert "'evil.example'" in check_problem(response, 421, "host_not_allowed")["detail"]
    assert "access-control-allow-origin" not in response.headers
    assert not api.dispatcher.asked


@pytest.mark.parametrize("path", OPEN)
def test_probes_come_by_whatever_name(path: str) -> None:
    for host in ("evil.example", "pod-7.cluster.internal:8000", "\xff"):
        assert Api().get(path, headers={"host": host.encode("latin-1")}).status_code == 200


def test_the_settings_name_hosts() -> None:
    api = Api(allowed_hosts="maps.example.org, lab", host="machine.example")
    for host in ("maps.example.org:443", "lab", "machine.example:8000", "localhost:8000", "192.168.1.2:8000"):
        assert api.get("/models", headers={"host": host}).status_code == 200
    detail = check_problem(api.get("/models", headers={"host": "example"}), 421, "host_not_allowed")["detail"]
    assert "localhost or machine.example or maps.example.org or lab" in detail


def test_a_long_name_is_told_in_part() -> None:
    response = Api().get("/models", headers={"host": "a" * 10_000})
    assert "a" * 201 not in check_problem(response, 421, "host_not_allowed")["detail"]
