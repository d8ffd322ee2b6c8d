"""Every error that a client can provoke, from a running server: its problem, and what it leaves unharmed."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from PIL import Image

from tests.api.support import check_problem, pointers
from tests.conftest import TINY_SPEC, write_tiny
from tests.e2e.support import file_of, map_of, only, post, resized, text_of
from tests.imaging.test_hostile import BOMBS
from tests.server import Server, running

REAL = "efficientnet_lite0"
MAX_BODY, MAX_PICTURES, MAX_PIXELS = 1_000_000, 40, 1_000_000
BODY_TIMEOUT_S = 1.0
SIDE = 50_000
LIMITS = {
    "--max-body-bytes": MAX_BODY,
    "--max-pictures": MAX_PICTURES,
    "--max-pixels": MAX_PIXELS,
    "--max-queue": 2,
    "--max-heatmap-pixels": 1_000_000_000,
    "--body-timeout-s": BODY_TIMEOUT_S,
}
EVIL_NAME = 'no. <id> "猫"; ä\r\nX-Evil: yes'
EVIL_SPEC = TINY_SPEC.replace('"labels.txt"', json.dumps(EVIL_NAME))


@dataclass(frozen=True)
class Narrow:
    """A server with small limits, and what it answered before its models were loaded."""

    server: Server
    early: httpx.Response
    early_readiness: httpx.Response


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, photograph: bytes) -> Iterator[Narrow]:
    folder = tmp_path_factory.mktemp("narrow")
    write_tiny(folder / "models" / "tiny")
    write_tiny(folder / "models" / "evil", spec=EVIL_SPEC)
    options = [str(part) for pair in LIMITS.items() for part in pair]
    with running(folder, "--models", str(folder / "models"), *options, ready=False) as server:
        with server.client() as client:
            early = Narrow(server, post(client, photograph), client.get("/readyz"))
        server.wait_ready()
        yield early


@pytest.fixture(scope="module")
def strict(narrow: Narrow) -> Iterator[httpx.Client]:
    with narrow.server.client() as client:
        yield client


@pytest.fixture(scope="module")
def photograph(chelsea: bytes) -> bytes:
    """A small JPEG."""
    return file_of(resized(chelsea, 96, 64), "JPEG")


# 422: a value is wrong


@dataclass(frozen=True)
class Wrong:
    """Fields that are wrong, and the problem: its code, its pointers, and words of its detail."""

    fields: dict[str, Any]
    code: str
    pointers: list[str]
    words: tuple[str, ...] = ()
    model: str = "tiny"


def gen_params(*words: str, pointer: str, method: str | list[str] = "grad_cam", **params: Any) -> Wrong:
    fields = {"method": method, "gen_params": params}
    return Wrong(fields, "invalid_gen_params", [f"/gen_params/{pointer}"], words)


WRONG = {
    "unknown field": Wrong({"metod": "grad_cam"}, "invalid_request", ["/metod"], ("'method'",)),
    "unknown method": Wrong({"method": "gradcam"}, "unknown_method", ["/method"], ("'gradcam'", "'grad_cam'")),
    "one unknown method": Wrong({"method": ["grad_cam", "guided"]}, "unknown_method", ["/method/1"], ("'guided'",)),
    "unknown layer": Wrong(
        {"gen_params": {"target_conv_layer": "conv_haed"}},
        "unknown_layer",
        ["/gen_params/target_conv_layer"],
        ("'conv_haed'", "'conv_head'"),
        REAL,
    ),
    "layer that is no map": Wrong(
        {"gen_params": {"target_conv_layer": "4"}}, "unknown_layer", ["/gen_params/target_conv_layer"], ("dimensions",)
    ),
    "unknown layer of one method": Wrong(
        {"gen_params": {"grad_cam": {"target_conv_layer": "22"}}},
        "unknown_layer",
        ["/gen_params/grad_cam/target_conv_layer"],
        ("'22'", "'2'"),
    ),
    "call that no layer has": Wrong(
        {"gen_params": {"target_conv_layer": "2@" + "9" * 5000}}, "unknown_layer", ["/gen_params/target_conv_layer"]
    ),
    "unknown class": Wrong({"target_classes": ["anr"]}, "unknown_class", ["/target_classes"], ("'anr'", "'ant'")),
    "class in other letters": Wrong(
        {"target_classes": ["egyptian cat"]}, "unknown_class", ["/target_classes"], ("'Egyptian cat'",), REAL
    ),
    "class past the last": Wrong({"target_classes": [0, 5]}, "unknown_class", ["/target_classes"], ("0 to 4", "5")),
    "digits in a string are a name": Wrong({"target_classes": ["1"]}, "unknown_class", ["/target_classes"], ("'1'",)),
    "negative class": Wrong({"target_classes": [-1]}, "invalid_request", ["/target_classes/0"], ("-1", "from 0")),
    "ambiguous class": Wrong({"target_classes": ["cat"]}, "unknown_class", ["/target_classes"], ("'cat'", "[2, 4]")),
    "lists for other pictures": Wrong(
        {"target_classes": [[1], [2]]}, "invalid_request", ["/target_classes"], ("2 lists", "1 picture")
    ),
    "unknown colormap": Wrong({"colormap": "virids"}, "invalid_request", ["/colormap"], ("'viridis'",)),
    "unknown parameter": gen_params("'scalling'", "'scaling'", pointer="scalling", scalling="none"),
    "unknown method's parameters": gen_params("'gradcam'", "'grad_cam'", pointer="gradcam", gradcam={}),
    "unknown value": gen_params("'linear'", "scale_before_relu", pointer="scaling", scaling="linear"),
    "wrong type": gen_params("use_conv_only", "'yes'", pointer="use_conv_only", use_conv_only="yes"),
    "value of one method": gen_params("'linear'", pointer="grad_cam/scaling", grad_cam={"scaling": "linear"}),
    "key of one method": gen_params("'scaling'", pointer="grad_cam/scalling", grad_cam={"scalling": "none"}),
    "no object for one method": gen_params("object", pointer="grad_cam", grad_cam=["none"]),
    "parameters of another method": gen_params(
        "'guided_grad_cam'", pointer="guided_grad_cam", guided_grad_cam={"target_conv_layer": "0"}
    ),
    "a ReLU has no fused ReLU": gen_params(
        "'1'", "no convolution", pointer="use_conv_only", target_conv_layer="1", use_conv_only=False
    ),
    "scaling of three channels": gen_params(
        "guided_grad_cam", "'scaling'", pointer="scaling", method="guided_grad_cam", scaling="none"
    ),
    "use_conv_only of three channels": gen_params(
        "guided_grad_cam", "'use_conv_only'", pointer="use_conv_only", method="guided_grad_cam", use_conv_only=True
    ),
    "layer that cam does not end at": Wrong(
        {"method": "cam"}, "method_not_supported", ["/method"], ("'bn2.act'", "'recommended', which is 'bn2'"), REAL
    ),
    "key that one of two methods refuses": gen_params(
        "'scaling'",
        'to grad_cam alone: {"grad_cam": {"scaling": ...}}',
        pointer="scaling",
        method=["grad_cam", "guided_grad_cam"],
        scaling="none",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_422(client: httpx.Client, photograph: bytes, name: str) -> None:
    case = WRONG[name]
    problem = check_problem(post(client, photograph, case.model, **case.fields), 422, case.code)
    assert pointers(problem) == case.pointers
    for error in problem["errors"]:
        assert resolves(error["pointer"], case.fields), error
    for word in case.words:
        assert word in problem["detail"]
    assert problem["instance"] == f"/models/{case.model}/heatmap"


def resolves(pointer: str, document: Any) -> bool:
    """Whether there is something at a JSON pointer (RFC 6901)."""
    here = document
    for step in pointer.split("/")[1:]:
        key: Any = int(step) if isinstance(here, list) else step.replace("~1", "/").replace("~0", "~")
        if (isinstance(here, list) and key >= len(here)) or (isinstance(here, dict) and key not in here):
            return False
        if not isinstance(here, list | dict):
            return False
        here = here[key]
    return True


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"gen_params": {"x" * 500_000: 1}}, id="key"),
        pytest.param({"gen_params": {"scaling": "x" * 500_000}}, id="value"),
        pytest.param({"gen_params": {"target_conv_layer": "x" * 500_000}}, id="layer"),
        pytest.param({"gen_params": {"grad_cam": "x" * 500_000}}, id="no object"),
        pytest.param({"gen_params": {f"{number:0500}": {} for number in range(1000)}}, id="keys"),
        pytest.param({"x" * 500_000: 1}, id="field"),
        pytest.param({"method": "x" * 500_000}, id="method"),
        pytest.param({"target_classes": ["x" * 500_000]}, id="class"),
        pytest.param({"colormap": "x" * 500_000}, id="colormap"),
    ],
)
def test_what_is_wrong_is_not_echoed_at_length(client: httpx.Client, photograph: bytes, fields: dict[str, Any]) -> None:
    response = post(client, photograph, **fields)
    assert response.status_code == 422
    assert len(response.content) < 10_000
    assert response.elapsed.total_seconds() < 5


# 422: a picture is wrong


def bad_pictures(photograph: bytes) -> dict[str, tuple[bytes, str]]:
    """Files that cannot be read, and what the problem says of each."""
    image = Image.effect_noise((64, 64), 50)
    png = file_of(image)
    return {
        "text": (b"this is no picture", "no JPEG"),
        "truncated JPEG": (photograph[: len(photograph) // 2], "cut short"),
        "truncated PNG": (png[: len(png) // 2], "cut short"),
        "truncated GIF": (file_of(image, "GIF")[:500], ""),
        "header alone": (png[:33], ""),
        "corrupt PNG": (png[:60] + b"\0" * 40 + png[100:], ""),
        "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no JPEG"),
        "PDF": (b"%PDF-1.7\n", "no JPEG"),
        "floats": (file_of(image.convert("F"), "TIFF"), "floating"),
        "PCX": (file_of(image, "PCX"), "no JPEG"),
    }


@pytest.mark.parametrize("name", bad_pictures(b""))
def test_the_undecodable_picture_is_named(client: httpx.Client, photograph: bytes, name: str) -> None:
    bad, words = bad_pictures(photograph)[name]
    for response in (
        post(client, [photograph, bad, photograph]),
        client.post("/models/tiny/infer", files=[("images", photograph), ("image", bad)]),
    ):
        problem = check_problem(response, 422, "undecodable_picture")
        assert pointers(problem) == ["/images/1"]
        assert problem["detail"].startswith("Picture 1: ")
        assert words in problem["detail"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("https://example.org/cat.png", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("no base64!", "base64"),
        ("data:image/png,plain", ";base64,"),
        ("data:", "base64"),
    ],
)
def test_texts_that_hold_no_picture(client: httpx.Client, photograph: bytes, text: str, words: str) -> None:
    response = client.post("/models/tiny/heatmap", json={"images": [text_of(photograph), text]})
    problem = check_problem(response, 422, "undecodable_picture")
    assert pointers(problem) == ["/images/1"]
    assert words in problem["detail"]


def test_a_bad_picture_fails_its_own_request_alone(client: httpx.Client, photograph: bytes) -> None:
    def ask(number: int) -> httpx.Response:
        return post(client, [photograph, b"bad" if number % 3 == 1 else photograph], target_classes=[number % 5])

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert [answer.status_code for answer in answers] == [200, 422, 200] * 4


# The other statuses, as a table

JSON_TYPE = {"content-type": "application/json"}
FORM_TYPE = {"content-type": "multipart/form-data; boundary=x"}
UNNAMED = b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n"
DEEP = b'{"images": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
DEEP_PARAMS = b'{"images": ["AA"], "gen_params": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}"
PARTS = [("image", ("a", b"AA")), *[("alpha", (None, "1"))] * 1000]


@dataclass(frozen=True)
class Request:
    """A request that fails, and the problem: status, code, words of its detail, headers."""

    status: int
    code: str
    method: str
    url: str
    options: dict[str, Any]
    words: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()


HEATMAP = "/models/tiny/heatmap"


def sent(status: int, code: str, *words: str, url: str = HEATMAP, **options: Any) -> Request:
    return Request(status, code, "POST", url, options, words)


def asked(status: int, code: str, method: str, url: str, *words: str, **headers: str) -> Request:
    return Request(status, code, method, url, {}, words, tuple(headers.items()))


REQUESTS = {
    "no JSON": sent(400, "malformed_body", "JSON", content=b"{", headers=JSON_TYPE),
    "NaN in JSON": sent(400, "malformed_body", content=b'{"images": ["AA"], "alpha": NaN}', headers=JSON_TYPE),
    "brackets": sent(400, "malformed_body", "200 levels", content=DEEP, headers=JSON_TYPE),
    "deep parameters": sent(400, "malformed_body", "200 levels", content=DEEP_PARAMS, headers=JSON_TYPE),
    "form without end": sent(400, "malformed_body", content=UNNAMED[:-6], headers=FORM_TYPE),
    "part without name": sent(400, "malformed_body", "name", content=UNNAMED, headers=FORM_TYPE),
    "form without boundary": sent(
        400, "malformed_body", "boundary", content=UNNAMED, headers={"content-type": "multipart/form-data"}
    ),
    "a thousand parts": sent(413, "body_too_large", "128 parts", "JSON array", files=PARTS),
    "infinity": sent(
        422, "invalid_request", content=b'{"images": ["AA"], "gen_params": {"a": 1e999}}', headers=JSON_TYPE
    ),
    "no picture": sent(422, "invalid_request", "no picture", json={}),
    "text": sent(
        415, "unsupported_media_type", "multipart/form-data", content=b"AA", headers={"content-type": "text/x"}
    ),
    "urlencoded form": sent(415, "unsupported_media_type", data={"image": "AA"}),
    "gzip": sent(
        415,
        "unsupported_media_type",
        "gzip",
        content=zlib.compress(bytes(10_000_000)),
        headers={"content-type": "image/png", "content-encoding": "gzip"},
    ),
    "unknown model": sent(404, "model_not_found", "'tiny'", url="/models/tyni/heatmap", content=b"AA"),
    "unknown model to ask": asked(404, "model_not_found", "GET", "/models/tyni", "'tiny'"),
    "unknown model's layers": asked(404, "model_not_found", "GET", "/models/efficientnet/layers", f"'{REAL}'"),
    "unknown path": asked(404, "path_not_found", "GET", "/metods", "'/methods'"),
    "wrong verb": asked(405, "method_not_allowed", "GET", HEATMAP, "POST", Allow="POST"),
    "wrong verb for a list": asked(405, "method_not_allowed", "DELETE", "/models", "GET", Allow="GET, HEAD"),
    "other type": sent(422, "model_type_not_supported", "'detection'", url="/models/detector/heatmap", json={}),
    "other type to infer": sent(422, "model_type_not_supported", url="/models/detector/infer", json={}),
    "failed model": sent(503, "model_failed", "labels.txt", url="/models/broken/heatmap", json={}),
    "failed model to infer": sent(503, "model_failed", "labels.txt", url="/models/broken/infer", json={}),
    "failed model's layers": asked(503, "model_failed", "GET", "/models/broken/layers", "labels.txt"),
    "failed model's classes": asked(503, "model_failed", "GET", "/models/broken/classes", "labels.txt"),
}


# infer answers JSON alone: with an image in Accept, 406 comes first
ACCEPTS = [(name, "*/*") for name in REQUESTS]
ACCEPTS += [(name, "image/png") for name, case in REQUESTS.items() if not case.url.endswith("/infer")]


@pytest.mark.parametrize(("name", "accept"), ACCEPTS)
def test_errors_are_problems_whatever_accept_says(
    client: httpx.Client, photograph: bytes, name: str, accept: str
) -> None:
    case = REQUESTS[name]
    options = {**case.options, "headers": {"accept": accept, **case.options.get("headers", {})}}
    if options.get("json") == {} and case.status in (422, 503) and case.code != "invalid_request":
        options["json"] = {"images": [text_of(photograph)]}
    response = client.request(case.method, case.url, **options)
    problem = check_problem(response, case.status, case.code)
    assert problem["instance"] == case.url
    for word in case.words:
        assert word in problem["detail"]
    for header, value in case.headers:
        assert response.headers[header] == value
    assert "Retry-After" not in response.headers
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    ("accept", "fields", "words"),
    [
        ("image/png", {"target_classes": [0, 1]}, ("asks for 2", "application/json")),
        ("image/png", {"method": ["grad_cam", "guided_grad_cam"]}, ("asks for 2",)),
        ("image/webp", {"encoding": "png"}, ("image/webp", "image/png")),
        ("image/jpeg", {"format": "gray16"}, ("image/jpeg", "image/png")),
        ("image/png", {"format": "npy"}, ("application/x-npy",)),
        ("application/x-npy", {"format": "overlay"}, ("application/x-npy", "image/png")),
        ("image/png", {"result_format": "dl_result"}, ("dl_result",)),
        ("text/html", {}, ("text/html", "image/png")),
        ("image/avif", {}, ("image/avif", "image/webp")),
    ],
)
def test_406(
    client: httpx.Client, photograph: bytes, accept: str, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    response = post(client, photograph, headers={"Accept": accept}, **fields)
    problem = check_problem(response, 406, "not_acceptable")
    for word in words:
        assert word in problem["detail"]


def test_406_where_the_answer_is_json_alone(client: httpx.Client, photograph: bytes) -> None:
    response = post(client, photograph, endpoint="infer", headers={"Accept": "image/png"})
    check_problem(response, 406, "not_acceptable")


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "name",
    [
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e",
        "..%5c..",
        "%00",
        "tiny%00",
        "tiny%0d%0aX-Evil:%20yes",
        "%ff%fe",
        "%F0%9F%90%88",
        "%22%3E%3Cscript%3E",
        "%7Bid%7D",
        "tiny%20",
        "TINY",
        "a" * 3000,
    ],
)
def test_odd_model_ids_are_404(client: httpx.Client, method: str, name: str) -> None:
    for url in (f"/models/{name}", f"/models/{name}/heatmap", f"/models/{name}/layers"):
        response = client.request(method, url)
        if response.status_code != 405:
            assert response.status_code == 404
            check_problem(response, 404, response.json()["code"])
        assert "X-Evil" not in response.headers
        assert len(response.content) < 10_000 + 6 * len(name)


# The names of classes are the model's, not ours


def test_names_of_classes_cannot_forge_headers(strict: httpx.Client, photograph: bytes) -> None:
    name = EVIL_NAME.replace("<id>", "3")
    response = post(strict, photograph, "evil", headers={"Accept": "image/png"}, target_classes=[name])
    assert response.status_code == 200, response.text
    assert "X-Evil" not in response.headers
    assert response.headers["X-Class-Name"].isascii()
    assert unquote(response.headers["X-Class-Name"]) == name
    assert response.headers["X-Class-Id"] == "3"
    embedded = post(strict, photograph, "evil", target_classes=[3]).json()["results"][0]["heatmaps"][0]
    assert embedded["class_name"] == name
    missing = check_problem(post(strict, photograph, "evil", target_classes=[name + "!"]), 422, "unknown_class")
    assert repr(name) in missing["detail"]


# Limits


def test_the_first_load_is_503(narrow: Narrow) -> None:
    problem = check_problem(narrow.early, 503, "model_loading")
    assert "'tiny'" in problem["detail"]
    assert int(narrow.early.headers["Retry-After"]) >= 1
    assert narrow.early_readiness.status_code == 503
    assert any("tiny" in reason for reason in narrow.early_readiness.json()["reasons"])


def drip(server: Server, total: int = 50) -> tuple[bytes, float]:
    """The answer to a body that comes a byte at a time, and the seconds it took."""
    address = urlsplit(server.url)
    head = f"POST {HEATMAP} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {total}\r\n\r\n"
    started = time.monotonic()
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(head.encode())
        connection.settimeout(0.2)
        answer = b""
        for _ in range(total):
            connection.sendall(b"x")
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
            while part := connection.recv(65536):  # the server closes behind it
                answer += part
            break
    return answer, time.monotonic() - started


def test_a_slow_body_is_408(narrow: Narrow) -> None:
    answer, took = drip(narrow.server)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"content-type: application/problem+json" in head.lower()
    assert b"connection: close" in head.lower()
    problem = json.loads(body)
    assert (problem["code"], problem["status"]) == ("body_timeout", 408)
    assert "1 second" in problem["detail"]
    assert took >= BODY_TIMEOUT_S


def test_a_body_over_the_limit_is_413(strict: httpx.Client) -> None:
    picture = {"content-type": "image/png"}
    declared = strict.post(HEATMAP, content=bytes(MAX_BODY + 1), headers=picture)
    chunked = strict.post(HEATMAP, content=(bytes(100_000) for _ in range(40)), headers=picture)
    form = strict.post(HEATMAP, files={"image": bytes(MAX_BODY)})
    for response in (declared, chunked, form):
        assert str(MAX_BODY) in check_problem(response, 413, "body_too_large")["detail"]
    within = strict.post(HEATMAP, content=bytes(MAX_BODY), headers=picture)
    check_problem(within, 422, "undecodable_picture")


def test_more_pictures_than_the_limit_are_413(strict: httpx.Client, photograph: bytes) -> None:
    answers = (
        post(strict, [b"x"] * (MAX_PICTURES + 1)),
        strict.post(HEATMAP, files=[("images", b"x")] * (MAX_PICTURES + 1)),
    )
    for response in answers:
        assert f"at most {MAX_PICTURES}" in check_problem(response, 413, "too_many_pictures")["detail"]
    assert post(strict, [photograph] * MAX_PICTURES, endpoint="infer").status_code == 200


def test_pixels_over_the_limit_are_413(strict: httpx.Client) -> None:
    for width, height, status in ((1000, 1000, 200), (1000, 1001, 413)):
        response = post(strict, file_of(Image.new("RGB", (width, height)), "JPEG"), endpoint="infer")
        assert response.status_code == status, response.text
    problem = check_problem(response, 413, "too_many_pixels")
    assert pointers(problem) == ["/images/0"]
    assert "1000 x 1001" in problem["detail"]
    assert str(MAX_PIXELS) in problem["detail"]


def bombs() -> dict[str, bytes]:
    """Small files that declare some 50,000 x 50,000 pixels."""
    image = Image.new("L", (8, 8))
    png, gif, bmp, jpeg = (bytearray(file_of(image, kind)) for kind in ("PNG", "GIF", "BMP", "JPEG"))
    png[16:24] = struct.pack(">II", SIDE, SIDE)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    frame = bytearray(gif)
    gif[6:10] = struct.pack("<HH", SIDE, SIDE)
    place = frame.index(b",\0\0\0\0") + 5  # the size of the frame, which need not be that of the screen
    frame[place : place + 4] = struct.pack("<HH", SIDE, SIDE)
    bmp[18:26] = struct.pack("<ii", SIDE, SIDE)
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", SIDE, SIDE)
    return {"PNG": bytes(png), "GIF": bytes(gif), "GIF's frame": bytes(frame), "BMP": bytes(bmp), "JPEG": bytes(jpeg)}


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_by_their_headers(client: httpx.Client, server: Server, photograph: bytes, name: str) -> None:
    refused_at_once(client, server, photograph, bombs()[name], SIDE)


def test_a_small_tiff_of_one_huge_tile_is_refused(client: httpx.Client, server: Server, photograph: bytes) -> None:
    """The tile is decoded whole, though the picture in its corner has 8 x 8 pixels: here 140 MB of 140 kB."""
    side = 12_000
    deflate = zlib.compressobj(1)
    tile = b"".join([deflate.compress(bytes(side)) for _ in range(side)]) + deflate.flush()
    # width, length, 8 bits, deflate, black is zero, one sample; the tile's width, length, place and bytes
    numbers = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(tile)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in numbers.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(tile))
    file = head + tile + struct.pack("<H", len(numbers)) + directory + bytes(4)
    refused_at_once(client, server, photograph, file, side)


def refused_at_once(client: httpx.Client, server: Server, photograph: bytes, bomb: bytes, side: int) -> None:
    """A bomb costs neither time nor the worker's memory, and the problem says which picture it was."""
    (worker,) = server.workers()
    before = worker.memory_info().rss
    response = post(client, [photograph, bomb])
    problem = check_problem(response, 413, "too_many_pixels")
    assert pointers(problem) == ["/images/1"]
    assert f" {side * side} pixels; the limit is 50000000" in problem["detail"]
    assert response.elapsed.total_seconds() < 1
    assert worker.memory_info().rss - before < 100e6


@pytest.mark.parametrize("name", [name for name in BOMBS if name.startswith(("BMP", "GIF", "TIFF", "WebP"))])
def test_the_worker_outlives_crafted_files(client: httpx.Client, server: Server, photograph: bytes, name: str) -> None:
    (worker,) = server.workers()
    before = worker.memory_info().rss
    file, words = BOMBS[name][0](), BOMBS[name][1]
    response = client.post("/models/tiny/heatmap?size=model", content=file, headers={"content-type": "image/png"})
    if words.startswith("("):
        result = response.json()["results"][0]
        assert f"({result['width']}, {result['height']})" == words
    else:
        assert words in check_problem(response, response.status_code, response.json()["code"])["detail"]
        assert response.status_code in (413, 422)
    assert worker.memory_info().rss - before < 200e6
    assert [other.pid for other in server.workers()] == [worker.pid]


@pytest.mark.parametrize("model", ["tiny", REAL])
@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_lines_and_points_are_explained(
    client: httpx.Client, server: Server, model: str, size: tuple[int, int]
) -> None:
    """Stretched by the one network, cropped by the other; fitted by their shorter side they are 2 GB."""
    (worker,) = server.workers()
    before = worker.memory_info().rss
    values = map_of(only(client, file_of(Image.new("RGB", size, "teal")), model, format="npy"))
    assert values.shape == (size[1], size[0])
    assert worker.memory_info().rss - before < 200e6


# Queue and deadline


def slow(client: httpx.Client, timeout_s: float) -> httpx.Response:
    """A request that takes much longer than `timeout_s`: hundreds of maps of a million pixels."""
    picture = file_of(Image.new("RGB", (1000, 1000), "orange"), "JPEG")
    fields: dict[str, Any] = {"method": ["grad_cam", "guided_grad_cam"], "target_classes": [0, 1, 2, 3, 4]}
    return post(client, [picture] * MAX_PICTURES, timeout_s=timeout_s, **fields)


def test_a_full_queue_is_429_and_a_passed_deadline_504(strict: httpx.Client, photograph: bytes) -> None:
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: slow(strict, 2.0), range(3)))
    refused, *accepted = sorted(answers, key=lambda answer: answer.status_code)
    problem = check_problem(refused, 429, "queue_full")
    assert "at most 2" in problem["detail"]
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.elapsed < min(answer.elapsed for answer in accepted)
    for answer in accepted:
        assert "2 seconds" in check_problem(answer, 504, "deadline_exceeded")["detail"]
        assert "Retry-After" not in answer.headers
    assert max(answer.elapsed for answer in accepted).total_seconds() < 15
    # the work was dropped: nobody waits behind it
    answer = post(strict, photograph)
    assert answer.status_code == 200
    assert answer.elapsed.total_seconds() < 15


def test_a_deadline_that_cannot_be_met(client: httpx.Client, chelsea: bytes) -> None:
    response = post(client, [chelsea] * 4, timeout_s=0.001)
    assert "0.001 seconds" in check_problem(response, 504, "deadline_exceeded")["detail"]
    assert post(client, chelsea, timeout_s=30).status_code == 200


# After all that


def test_nothing_was_a_defect(server: Server, narrow: Narrow, client: httpx.Client, photograph: bytes) -> None:
    for one in (server, narrow.server):
        log = one.log.read_text()
        assert not re.search(r"Traceback|defect|exited|ended with exit code", log), log
    assert post(client, photograph).status_code == 200
