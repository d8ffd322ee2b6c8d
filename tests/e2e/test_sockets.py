"""What no honest client sends, over real sockets: it is answered with a typed 4xx or cut off, and costs nobody."""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import psutil
import pytest

from tests.conftest import write_tiny
from tests.e2e.support import file_of, post, resized, text_of
from tests.server import Server, running, wait_until

MAX_BODY, MAX_HEADERS, MAX_PARTS, MAX_ARRIVING = 1_000_000, 16_384, 100, 2_500_000
TIMEOUT_S = 1.0
OPTIONS = {
    "--max-body-bytes": MAX_BODY,
    "--max-header-bytes": MAX_HEADERS,
    "--max-parts": MAX_PARTS,
    "--max-queue-bytes": MAX_ARRIVING,
    "--body-timeout-s": TIMEOUT_S,
}
HEATMAP = "/models/tiny/heatmap"
LABELS = ["\u732b\u00e4", "x\x0b\x85X-Evil: 1", 'a"; b="c', "%0d%0aX-Evil: 1", "\x00\x7f\u2028 \ufeff"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    write_tiny(folder / "models" / "tiny")
    write_tiny(folder / "models" / "evil", labels="\n".join(LABELS) + "\n")
    options = [str(part) for pair in OPTIONS.items() for part in pair]
    with running(folder, "--models", str(folder / "models"), *options) as server:
        yield server


@pytest.fixture(scope="module")
def client(guarded: Server) -> Iterator[httpx.Client]:
    with guarded.client() as one:
        yield one


@pytest.fixture(scope="module")
def photograph(chelsea: bytes) -> bytes:
    return file_of(resized(chelsea, 96, 64), "JPEG")


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/problem+json", self
        document: dict[str, Any] = json.loads(self.body)
        assert document["status"] == self.status
        assert document["request_id"] == self.headers["x-request-id"]
        return document


def connect(server: Server) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=60)


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def until(words: bytes, connection: socket.socket) -> bytes:
    received = b""
    while words not in received:
        data = connection.recv(65536)
        assert data, f"the server closed after {received!r}"
        received += data
    return received


def replies(received: bytes) -> list[Reply]:
    """The answers on a connection, one behind the other."""
    found = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers["content-length"])
        found.append(Reply(int(status.split()[1]), headers, received[:length]))
        received = received[length:]
    return found


def ask(server: Server, *parts: bytes) -> list[Reply]:
    """Send bytes, and read until the server closes; it may close before all of them are sent."""
    with connect(server) as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except (ConnectionResetError, BrokenPipeError):
            pass
        return replies(until_closed(connection))


def head(*lines: str, verb: str = "POST", url: str = HEATMAP, close: bool = True) -> bytes:
    more = ["Connection: close"] if close else []
    return "\r\n".join([f"{verb} {url} HTTP/1.1", "Host: localhost", *more, *lines, "", ""]).encode("latin-1")


def typed(body: bytes, media_type: str = "image/png") -> bytes:
    return head(f"Content-Type: {media_type}", f"Content-Length: {len(body)}") + body


def form(*parts: bytes, boundary: bytes = b"x") -> bytes:
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"
    return typed(body, f"multipart/form-data; boundary={boundary.decode()}")


def field(name: bytes, value: bytes = b"1", more: bytes = b"") -> bytes:
    return b'Content-Disposition: form-data; name="' + name + b'"' + more + b"\r\n\r\n" + value


IMAGE = field(b"image", b"AA", b'; filename="a.png"')
PICTURE = head("Content-Type: image/png", "Content-Length: 4", close=False) + b"AAAA"
NESTED = b"Content-Type: multipart/mixed; boundary=y\r\n" + field(b"image", b"--y\r\n\r\nAA\r\n--y--")
LIVE = head(verb="GET", url="/livez")

# The bytes on the connection, and the status and code of the answer.
HOSTILE: dict[str, tuple[list[bytes], int, str]] = {
    "garbage": ([b"\0\1\2\3\r\n\r\n"], 400, "malformed_request"),
    "TLS": ([bytes.fromhex("16030100f8010000f40303") + bytes(200)], 400, "malformed_request"),
    "HTTP/2": ([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], 400, "malformed_request"),
    "a header without a colon": ([head("no colon")], 400, "malformed_request"),
    "NUL in a header": ([head("X-A: \0")], 400, "malformed_request"),
    "a folded header": ([head("X-A: b\r\n c: d", verb="GET", url="/livez")], 400, "malformed_request"),
    "two hosts": ([head("Host: y", verb="GET", url="/livez")], 400, "malformed_request"),
    "no host": ([b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n"], 400, "malformed_request"),
    "a line feed alone": ([b"GET /livez HTTP/1.1\nHost: localhost\nConnection: close\n\n"], 400, "malformed_request"),
    "HTTP of another version": ([b"GET /livez HTTP/3.0\r\nHost: localhost\r\n\r\n"], 400, "malformed_request"),
    "a tunnel": ([head(verb="CONNECT", url="x:80")], 400, "malformed_request"),
    "an endless header": ([b"GET / HTTP/1.1\r\nX-A: ", *[bytes([97]) * 4096] * 100], 431, "headers_too_large"),
    "an endless line": ([b"GET /", *[bytes([97]) * 4096] * 100], 431, "headers_too_large"),
    "endless headers": ([b"GET / HTTP/1.1\r\n", *[b"a: b\r\n" * 1000] * 100], 431, "headers_too_large"),
    "a long header": ([head("X-A: " + "a" * MAX_HEADERS)], 431, "headers_too_large"),
    "a thousand headers": ([head(*["a:"] * 1000, verb="GET", url="/livez")], 431, "headers_too_large"),
    "endless trailers": (
        [head("Content-Type: image/png", "Transfer-Encoding: chunked") + b"0\r\n", *[b"a: b\r\n" * 1000] * 100],
        431,
        "headers_too_large",
    ),
    "an endless chunk extension": (
        [head("Content-Type: image/png", "Transfer-Encoding: chunked") + b"1;", *[b"a" * 4096] * 100],
        431,
        "headers_too_large",
    ),
    "chunk extensions in each chunk": (
        [head("Content-Type: image/png", "Transfer-Encoding: chunked"), *[b"1;" + b"a" * 1000 + b"\r\na\r\n"] * 1000],
        431,
        "headers_too_large",
    ),
    "a long query": ([head(verb="GET", url="/livez?" + "a" * MAX_HEADERS)], 431, "headers_too_large"),
    "a length past all numbers": ([head("Content-Length: " + "9" * 30)], 400, "malformed_request"),
    "a length that is none": ([head("Content-Length: ten")], 400, "malformed_request"),
    "a negative length": ([head("Content-Length: -1")], 400, "malformed_request"),
    "two lengths": ([head("Content-Length: 1", "Content-Length: 2") + b"AA"], 400, "malformed_request"),
    "a length beside chunks": (
        [head("Content-Length: 4", "Transfer-Encoding: chunked") + b"0\r\n\r\n"],
        400,
        "malformed_request",
    ),
    "a chunk without a size": (
        [head("Content-Type: image/png", "Transfer-Encoding: chunked") + b"4\r\nAAAA\r\n", b"xyz\r\n"],
        400,
        "malformed_request",
    ),
    "a declared length over the limit": (
        [head("Content-Type: image/png", f"Content-Length: {MAX_BODY + 1}")],
        413,
        "body_too_large",
    ),
    "a length over the limit to go on with": (
        [head("Content-Type: image/png", f"Content-Length: {MAX_BODY + 1}", "Expect: 100-continue")],
        413,
        "body_too_large",
    ),
    "chunks over the limit": (
        [head("Content-Type: image/png", "Transfer-Encoding: chunked"), *[b"8000\r\n" + bytes(0x8000) + b"\r\n"] * 64],
        413,
        "body_too_large",
    ),
    "a body that is gzip": (
        [head("Content-Type: image/png", "Content-Encoding: gzip", f"Content-Length: {MAX_BODY}")],  # nothing is read
        415,
        "unsupported_media_type",
    ),
    "a body that is gzip twice": (
        [head("Content-Type: application/json", "Content-Encoding: identity, gzip", "Content-Length: 9")],
        415,
        "unsupported_media_type",
    ),
    "a gzip bomb without its name": ([typed(zlib.compress(bytes(10**8)))], 422, "undecodable_picture"),
    "a body without its type": ([head("Content-Length: 2") + b"AA"], 415, "unsupported_media_type"),
    "a thousand fields": ([form(IMAGE, *[field(b"target_classes")] * 1000)], 413, "body_too_large"),
    "a thousand pictures": ([form(*[IMAGE] * 1000)], 413, "too_many_pictures"),
    "a huge field": ([form(IMAGE, field(b"method", b"a" * 100_000))], 413, "body_too_large"),
    "a part without a name": ([form(b"Content-Disposition: form-data\r\n\r\nAA")], 400, "malformed_body"),
    "a part without headers": ([form(b"\r\nAA")], 400, "malformed_body"),
    "a part of a thousand headers": ([form(b"a: b\r\n" * 1000 + IMAGE)], 400, "malformed_body"),
    "a part of a huge header": ([form(b"a: " + b"b" * 100_000 + b"\r\n" + IMAGE)], 400, "malformed_body"),
    "a form within a form": ([form(NESTED)], 422, "invalid_request"),
    "a form without its boundary": ([typed(b"--x--\r\n", "multipart/form-data")], 400, "malformed_body"),
    "a form of another boundary": ([typed(b"--y--\r\n", "multipart/form-data; boundary=x")], 400, "malformed_body"),
    "a boundary of 10 kB": ([form(IMAGE, boundary=b"-" * 10_000)], 400, "malformed_body"),
    "NUL in a field's name": ([form(IMAGE, field(b"met\0hod"))], 422, "invalid_request"),
    "a field's name that is no text": ([form(IMAGE, field(b"\xff\xfe"))], 400, "malformed_body"),
    "a field that is no text": ([form(IMAGE, field(b"method", b"\xff"))], 400, "malformed_body"),
    "a path for a file's name": (
        [form(field(b"image", b"AA", b'; filename="../../etc/passwd"'))],
        422,
        "undecodable_picture",
    ),
    "no UTF-8 in the query": ([head(url=HEATMAP + "?method=%ff%fe", verb="POST")], 422, "invalid_request"),
    "NUL in the query": ([head(url=HEATMAP + "?%00=%00")], 422, "invalid_request"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused(guarded: Server, name: str) -> None:
    parts, status, code = HOSTILE[name]
    (reply,) = ask(guarded, *parts)
    assert (reply.status, reply.problem["code"]) == (status, code), reply


def test_the_limits_are_told_with_their_numbers(guarded: Server) -> None:
    for name, number in {
        "chunks over the limit": MAX_BODY,
        "endless headers": MAX_HEADERS,
        "a long query": MAX_HEADERS,
        "a thousand fields": MAX_PARTS,
        "a thousand pictures": 64,
        "a huge field": 65536,
    }.items():
        (reply,) = ask(guarded, *HOSTILE[name][0])
        assert str(number) in reply.problem["detail"], name


@pytest.mark.parametrize(
    "lines", [["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"], ["Upgrade: h2c"]]
)
def test_nothing_is_upgraded(guarded: Server, lines: list[str]) -> None:
    (reply,) = ask(guarded, head(*lines, verb="GET", url="/livez"))
    assert (reply.status, reply.body) == (200, b'{"status":"alive"}')


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "none-such"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_keeps_its_body_where_it_asks_for_an_upgrade(guarded: Server, upgrade: str, chunked: bool) -> None:
    """The body is no request of its own, though it looks like one; what follows it is."""
    inner = head(verb="GET", url="/livez", close=False)
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(inner)}"
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner) if chunked else inner
    lines = ["Connection: Upgrade, HTTP2-Settings", f"Upgrade: {upgrade}", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"]
    request = head("Content-Type: image/png", length, *lines, close=False) + body
    first, second = ask(guarded, request + head(verb="GET", url="/nowhere"))
    assert (first.problem["code"], second.problem["code"]) == ("undecodable_picture", "path_not_found")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("data", [[], ["--data-binary", "@-", "-H", "Content-Type: image/jpeg"]], ids=["GET", "POST"])
def test_curl_may_ask_for_http2(guarded: Server, photograph: bytes, data: list[str]) -> None:
    url = guarded.url + ("/models/tiny/infer" if data else "/models")
    command = ["curl", "--http2", "--silent", "--show-error", "--max-time", "60", *data, url]
    answer = subprocess.run(
        [*command, "--write-out", "\n%{http_version} %{http_code}"], input=photograph, capture_output=True
    )
    assert answer.stdout.endswith(b"\n1.1 200"), answer


def test_a_target_may_name_the_host(guarded: Server) -> None:
    for target in ("http://x/livez", "HTTP://x:80/livez"):  # RFC 9112, 3.2.2
        (reply,) = ask(guarded, head(verb="GET", url=target))
        assert reply.status == 200


def test_chunks_of_one_byte_are_a_body(guarded: Server) -> None:
    chunks = b"1\r\nA\r\n" * 20_000 + b"0\r\nA-Trailer: 1\r\n\r\n"
    request = head("Content-Type: image/png", "Transfer-Encoding: chunked", close=False)
    first, second = ask(guarded, request + chunks + LIVE)
    assert (first.problem["code"], second.status) == ("undecodable_picture", 200)


# Time


def dripping(connection: socket.socket, byte: bytes) -> bytes:
    """Send a byte now and then until the server closes."""
    connection.settimeout(TIMEOUT_S / 5)
    deadline = time.monotonic() + 60 * TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            connection.sendall(byte)
            first = connection.recv(65536)
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            return b""
        return first + until_closed(connection)
    raise AssertionError("the server still waits")


def test_slow_headers_are_408(guarded: Server) -> None:
    with connect(guarded) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nX-A: ")
        (reply,) = replies(dripping(connection, b"a"))
    assert (reply.status, reply.problem["code"]) == (408, "headers_timeout")
    assert "1 second" in reply.problem["detail"]
    assert reply.headers["connection"] == "close"


@pytest.mark.parametrize("length", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_a_slow_body_is_408(guarded: Server, length: str) -> None:
    with connect(guarded) as connection:
        connection.sendall(head("Content-Type: image/png", length, close=False))
        (reply,) = replies(dripping(connection, b"1\r\na\r\n" if "chunked" in length else b"a"))
    assert (reply.status, reply.problem["code"]) == (408, "body_timeout")
    assert reply.headers["connection"] == "close"


@pytest.mark.parametrize("first", [b"", head(verb="GET", url="/livez", close=False)], ids=["at first", "afterwards"])
@pytest.mark.parametrize("byte", [b"", b"\r\n"], ids=["silence", "empty lines"])
def test_a_connection_without_a_request_is_closed(guarded: Server, first: bytes, byte: bytes) -> None:
    """Also where empty lines, which stand for nothing, end uvicorn's own timer."""
    with connect(guarded) as connection:
        if first:
            connection.sendall(first)
            until(b"alive", connection)
        if byte:
            assert not dripping(connection, byte).startswith(b"HTTP/1.1 200")
        else:
            assert until_closed(connection) == b""


@pytest.mark.parametrize("late", [0, 1000], ids=["at once", "behind its answer"])
def test_a_connection_is_kept_for_the_next_request(guarded: Server, late: int) -> None:
    """For uvicorn's five seconds, longer than this server waits for headers or a body."""
    with connect(guarded) as connection:
        connection.sendall(head("Content-Length: 2000", verb="GET", url="/livez", close=False) + b"a" * (2000 - late))
        until(b"alive", connection)
        connection.sendall(b"a" * late)
        time.sleep(2 * TIMEOUT_S)
        connection.sendall(LIVE)
        (reply,) = replies(until_closed(connection))
    assert reply.status == 200


def test_a_request_that_comes_with_the_end_of_a_refused_one_has_its_time(guarded: Server, photograph: bytes) -> None:
    """More than the five seconds that a connection is kept without one."""
    fields = {"images": [text_of(photograph)] * 8, "method": "rise", "gen_params": {"n": 20_000}, "timeout_s": 6}
    slow = typed(json.dumps(fields).encode(), "application/json")
    with connect(guarded) as connection:
        connection.sendall(head("Content-Length: 1000", verb="GET", url="/livez", close=False))
        received = until(b"alive", connection)
        connection.sendall(b"a" * 1000 + slow)
        first, second = replies(received + until_closed(connection))
    assert (first.status, second.problem["code"]) == (200, "deadline_exceeded")


def test_a_body_that_nobody_asked_for_is_not_awaited(guarded: Server) -> None:
    with connect(guarded) as connection:
        connection.sendall(head("Content-Length: 1000", verb="GET", url="/livez", close=False))
        until(b"alive", connection)
        assert dripping(connection, b"a") == b""


def test_the_time_for_headers_is_not_that_for_answers(guarded: Server, photograph: bytes) -> None:
    """The next request has begun, and waits behind one that takes longer than headers may."""
    body = json.dumps(
        {"images": [text_of(photograph)] * 64, "method": "guided_grad_cam", "target_classes": [0, 1, 2, 3, 4]}
    )
    slow = head("Content-Type: application/json", f"Content-Length: {len(body)}", close=False) + body.encode()
    with connect(guarded) as connection:
        connection.sendall(slow + LIVE[:10])
        received = until(b'"results":', connection)
        connection.sendall(LIVE[10:])
        received += until_closed(connection)
    first, second = replies(received)
    assert (first.status, second.body) == (200, b'{"status":"alive"}')


# Lengths that lie, and clients that leave


def test_what_follows_a_length_that_is_too_short_is_not_read(guarded: Server) -> None:
    """It would be the next request, and is none: the first one is answered, this is refused, and no more is read."""
    first, second = ask(guarded, PICTURE + b"BBBBBBBB\r\n\r\n" + LIVE)
    assert (first.problem["code"], second.problem["code"]) == ("undecodable_picture", "malformed_request")


def test_requests_in_a_row_are_answered_in_a_row(guarded: Server) -> None:
    answers = ask(guarded, PICTURE + head(verb="GET", url="/nowhere", close=False) + LIVE)
    assert [reply.status for reply in answers] == [422, 404, 200]


@pytest.mark.parametrize("reset", [False, True], ids=["in order", "reset"])
@pytest.mark.parametrize(
    "sent",
    [
        b"GET /liv",
        head("Content-Type: image/png", "Content-Length: 1000") + b"A" * 10,
        head("Content-Type: image/png", "Transfer-Encoding: chunked") + b"ffff\r\nAAAA",
        typed(b"--x\r\nContent-Dispo", "multipart/form-data; boundary=x"),
        PICTURE,
        LIVE,
    ],
)
def test_a_client_may_leave_anywhere(guarded: Server, sent: bytes, reset: bool) -> None:
    connection = connect(guarded)
    connection.sendall(sent)
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_a_client_that_only_stops_sending_is_not_waited_for(guarded: Server) -> None:
    with connect(guarded) as connection:
        connection.sendall(head("Content-Type: image/png", "Content-Length: 1000") + b"A" * 10)
        connection.shutdown(socket.SHUT_WR)
        assert until_closed(connection) == b""


def test_bodies_that_never_end_take_bounded_memory_together(guarded: Server) -> None:
    """Each is within the limit; the last one finds no room, until the others are given up."""
    unfinished = head("Content-Type: image/png", f"Content-Length: {MAX_BODY}") + bytes(MAX_BODY - 1)
    with ThreadPoolExecutor(3) as pool:
        answers = [reply for (reply,) in pool.map(lambda _: ask(guarded, unfinished), range(3))]
    *late, refused = sorted(answers, key=lambda reply: reply.status)
    assert [reply.status for reply in late] == [408, 408]
    assert (refused.status, refused.problem["code"]) == (429, "queue_full")
    assert str(MAX_ARRIVING) in refused.problem["detail"]
    assert refused.headers["retry-after"] == "1"
    (answered,) = ask(guarded, unfinished + b"A")
    assert answered.problem["code"] == "undecodable_picture"


# Numbers, keys and names


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"alpha": NaN}', 400),
        ('{"alpha": Infinity}', 400),
        ('{"gen_params": {"a": -Infinity}}', 400),
        ('{"alpha": 1e400}', 422),
        ('{"timeout_s": 1e400}', 422),
        ('{"gen_params": {"a": [1e400]}}', 422),
        ('{"top_k": 1' + "0" * 400 + "}", 422),
        ('{"top_k": 1' + "0" * 100_000 + "}", 400),
        ('{"top_k": 1e3}', 422),
        ('{"target_classes": [1' + "0" * 400 + "]}", 422),
        ('{"target_classes": [' + "0," * 200_000 + "0]}", 422),
        ('{"gen_params": {"layers": 1' + "0" * 5000 + "}}", 400),
        ('{"gen_params": ' + '{"a":' * 400 + "1" + "}" * 400 + "}", 400),
        ('{"gen_params": ' + '{"a":' * 150 + "1" + "}" * 150 + "}", 422),
        ("[" * 10_000, 400),
        ("[" * 100_000, 422),
        ('{"alpha": "\\u0000"}', 422),
        ('{"method": "\\ud83d"}', 400),
    ],
)
def test_odd_json(client: httpx.Client, photograph: bytes, body: str, status: int) -> None:
    images = json.dumps({"images": [text_of(photograph)]})[:-1]
    content = f"{images}, {body[1:]}" if body.startswith("{") else body
    response = client.post(HEATMAP, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text[:500]
    assert len(response.content) < 2000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", "nan"),
        ("alpha", "1e400"),
        ("timeout_s", "inf"),
        ("timeout_s", "-0"),
        ("top_k", "1" + "0" * 400),
        ("top_k", "9" * 5000),  # more digits than Python makes a number of
        ("top_k", "\u0663"),
        ("target_classes", "[" + "9" * 5000 + "]"),
        ("target_classes", "9" * 15),
        ("gen_params", "[" * 5000),
        ("gen_params", '{"a":' * 900 + "1" + "}" * 900),
        ("gen_params", '{"a": NaN}'),
        ("gen_params", '{"a": 1e400}'),
        ("method", '["' + "a" * 5000 + '"]'),
        ("format", "overlay\0"),
        ("size", "original\r\nX-Evil: 1"),
    ],
)
def test_odd_texts_in_query_and_form(client: httpx.Client, photograph: bytes, name: str, value: str) -> None:
    picture = {"content-type": "image/jpeg"}
    for response in (
        client.post(HEATMAP, params={name: value}, content=photograph, headers=picture),
        client.post(HEATMAP, data={name: value}, files={"image": photograph}),
    ):
        assert response.status_code == 422, response.text
        assert response.json()["errors"][0]["pointer"].startswith(f"/{name}")
        assert "X-Evil" not in response.headers
        assert len(response.content) < 2000


def test_of_a_key_that_comes_twice_the_last_counts(client: httpx.Client, photograph: bytes) -> None:
    body = f'{{"images": ["AA"], "top_k": 1, "top_k": 2, "images": ["{text_of(photograph)}"]}}'
    answer = client.post("/models/tiny/infer", content=body, headers={"content-type": "application/json"})
    assert len(answer.json()["results"][0]["classes"]) == 2


@pytest.mark.parametrize("class_id", range(len(LABELS)))
def test_class_names_forge_no_header(client: httpx.Client, photograph: bytes, class_id: int) -> None:
    response = post(client, photograph, "evil", headers={"Accept": "image/png"}, target_classes=[class_id])
    assert response.status_code == 200
    assert "X-Evil" not in response.headers
    assert unquote(response.headers["X-Class-Name"]) == LABELS[class_id]
    assert response.headers["X-Class-Name"].isprintable()
    shown = client.get("/models/evil/classes").json()["classes"][class_id]
    assert shown == {"class_id": class_id, "class_name": LABELS[class_id]}


@pytest.mark.parametrize("value", ["a\tb", "a b", "x" * 1000, "\u00fc", '"><script>', "a;b", "%0d%0aX-Evil:1"])
def test_request_ids_forge_nothing(guarded: Server, value: str) -> None:
    (reply,) = ask(guarded, head(f"X-Request-ID: {value}", verb="GET", url="/livez"))
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])
    assert "x-evil" not in reply.headers


def test_a_bare_line_feed_in_a_header_begins_no_other(guarded: Server) -> None:
    for byte in ("\n", "\r"):
        for reply in ask(guarded, head(f"X-Request-ID: a{byte}X-Evil: 1", verb="GET", url="/livez")):
            assert "x-evil" not in reply.headers


def test_an_answer_that_nobody_reads_is_given_up(guarded: Server, photograph: bytes) -> None:
    body = json.dumps(
        {"images": [text_of(photograph)] * 24, "target_classes": [0, 1, 2, 3] * 8, "format": "npy"}
    ).encode()
    request = head("Content-Type: application/json", f"Content-Length: {len(body)}") + body
    with connect(guarded) as reader:  # slow, but it reads: a part now and then
        reader.sendall(request)
        first = reader.recv(1000)
        assert first.startswith(b"HTTP/1.1 200")
        length = int(re.search(rb"content-length: (\d+)", first)[1])  # type: ignore[index]
        assert length > 20_000_000
        read = len(first)
        while read < length:
            time.sleep(TIMEOUT_S / 10)
            part = len(reader.recv(1_000_000, socket.MSG_WAITALL))
            assert part
            read += part
    with connect(guarded) as idler:
        idler.sendall(request)
        assert idler.recv(1000).startswith(b"HTTP/1.1 200")
        time.sleep(3 * TIMEOUT_S)
        received = until_closed(idler)
    assert len(received) < length - 1_000_000


# After all that


def test_the_server_is_well(guarded: Server, client: httpx.Client, photograph: bytes) -> None:
    answer = post(client, photograph, target_classes=[0], format="npy", size="model")
    again = post(client, photograph, target_classes=[0], format="npy", size="model")
    assert answer.status_code == 200
    assert answer.json()["results"] == again.json()["results"]
    assert client.get("/readyz").status_code == 200
    connections = psutil.Process(guarded.process.pid).net_connections
    wait_until(lambda: sum(one.status == "ESTABLISHED" for one in connections("tcp")) <= 1, 60, guarded)
    log = guarded.log.read_text()
    assert not re.search(r"Traceback|defect|exited|Unhandled|Unsupported upgrade", log), log
