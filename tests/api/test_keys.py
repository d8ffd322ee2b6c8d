"""Who gets in: every route without a key, with a wrong one, with one of the wrong right, and with the right one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from fastapi import FastAPI, Request

from service.api.keys import PROBLEMS, Keys
from service.keys import KeyFile, make_key
from tests.api.support import Api, ask, check_problem

OPEN = {"/livez", "/readyz", "/docs", "/openapi.json"}
ROUTES = [
    ("GET", "/models"),
    ("GET", "/models/resnet"),
    ("GET", "/models/resnt"),
    ("GET", "/models/resnet/layers"),
    ("GET", "/models/resnet/classes?query=a"),
    ("GET", "/methods"),
    ("GET", "/metrics"),
    ("POST", "/models/resnet/heatmap"),
    ("POST", "/models/resnet/infer"),
    ("POST", "/models/resnt/infer"),
]
ADMIN = [("POST", "/models/resnet/load"), ("POST", "/models/resnet/unload")]
KEYS = {
    name: make_key(name, rights) for name, rights in (("ann", "predict"), ("root", "admin"), ("all", "predict,admin"))
}


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name][0]}"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("\n".join(line for _, line in KEYS.values()))
    return path


@pytest.fixture
def guarded(file: Path) -> Api:
    return Api(api_keys_file=file)


@pytest.mark.parametrize(("method", "url"), ROUTES)
def test_every_route_needs_a_key_with_the_right(guarded: Api, method: str, url: str) -> None:
    missing = ask(guarded.app, method, url)
    assert "X-API-Key" in check_problem(missing, 401, "key_missing")["detail"]
    wrong = ask(guarded.app, method, url, headers={"X-API-Key": "x" * 43})
    assert "x" * 43 not in wrong.text
    check_problem(wrong, 401, "key_wrong")
    assert missing.headers["www-authenticate"] == wrong.headers["www-authenticate"] == "Bearer"
    lacking = ask(guarded.app, method, url, headers=bearer("root"))
    assert "'predict'" in check_problem(lacking, 403, "key_lacks_right")["detail"]
    assert "www-authenticate" not in lacking.headers
    for headers in (bearer("ann"), bearer("all"), {"X-API-Key": KEYS["ann"][0]}):
        assert ask(guarded.app, method, url, headers=headers).status_code not in (401, 403)


def test_no_route_is_forgotten(guarded: Api) -> None:
    document = guarded.get("/openapi.json").json()
    told = {(verb.upper(), path) for path, verbs in document["paths"].items() for verb in verbs if path not in OPEN}
    assert told == {
        (verb, url.partition("?")[0].replace("resnet", "{id}")) for verb, url in ROUTES + ADMIN if "resnt" not in url
    }
    for path in OPEN:
        assert guarded.get(path).status_code == 200
    root = guarded.get("/")
    assert (root.status_code, urljoin("http://localhost/", root.headers["location"])) == (307, "http://localhost/docs")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Authorization": KEYS["ann"][0]}, "key_missing"),
        ({"Authorization": f"Basic {KEYS['ann'][0]}"}, "key_missing"),
        ({"Authorization": "Bearer"}, "key_missing"),
        ({"X-API-Key": ""}, "key_missing"),
        ({"Authorization": f"Bearer {KEYS['ann'][0]}x"}, "key_wrong"),
        ({"Authorization": "Bearer sha256:" + KEYS["ann"][1].rpartition(":")[2]}, "key_wrong"),
        ({"X-API-Key": KEYS["ann"][1].rpartition(":")[2]}, "key_wrong"),
        ({"X-API-Key": b"\xff\xfe"}, "key_wrong"),
        ({"X-API-Key": "ann"}, "key_wrong"),
        ({**bearer("ann"), "X-API-Key": "wrong"}, None),
        ({"Authorization": "Bearer wrong", "X-API-Key": KEYS["ann"][0]}, "key_wrong"),
        ({"Authorization": "Basic x", "X-API-Key": KEYS["ann"][0]}, None),
        ({"Authorization": f"bearer {KEYS['ann'][0]}"}, None),
    ],
)
def test_ways_to_send_a_key(guarded: Api, headers: dict[str, Any], code: str | None) -> None:
    response = guarded.get("/models", headers=headers)
    if code:
        check_problem(response, 401, code)
    else:
        assert response.status_code == 200


def test_a_key_in_the_query_is_none(guarded: Api) -> None:
    check_problem(guarded.raw(f"api_key={KEYS['ann'][0]}"), 401, "key_missing")


def test_the_key_is_checked_before_the_body_is_read(guarded: Api) -> None:
    read: list[bool] = []

    async def body() -> AsyncIterator[bytes]:
        read.append(True)
        yield b"picture"

    for headers in ({}, {"X-API-Key": "wrong"}, bearer("root")):
        assert guarded.post(content=body(), headers=headers).status_code in (401, 403)
    assert not read
    assert guarded.post(content=body(), headers={**bearer("ann"), "content-type": "image/png"}).status_code == 200
    assert read


def test_without_a_file_of_keys_everybody_may_predict() -> None:
    api = Api()
    for method, url in ROUTES:
        for headers in ({}, bearer("ann")):
            assert ask(api.app, method, url, headers=headers).status_code not in (401, 403)


def app_with_an_admin_route(api: Api, file: Path | None) -> FastAPI:
    """The app and a route of the test's own, which names the key that came in."""

    @api.app.post("/admin", dependencies=[Keys(KeyFile(file) if file else None).admin], responses=PROBLEMS)
    async def route(request: Request) -> str:
        name: str = request.state.key_name
        return name

    return api.app


def test_an_admin_route_needs_the_right_admin_and_no_other(guarded: Api, file: Path) -> None:
    app = app_with_an_admin_route(guarded, file)
    check_problem(ask(app, "POST", "/admin"), 401, "key_missing")
    check_problem(ask(app, "POST", "/admin", headers={"X-API-Key": "wrong"}), 401, "key_wrong")
    lacking = ask(app, "POST", "/admin", headers=bearer("ann"))
    detail = check_problem(lacking, 403, "key_lacks_right")["detail"]
    assert "'ann'" in detail
    assert "'admin'" in detail
    for name in ("root", "all"):
        assert ask(app, "POST", "/admin", headers=bearer(name)).json() == name


def test_without_a_file_of_keys_nobody_is_an_admin() -> None:
    app = app_with_an_admin_route(Api(), None)
    for headers in ({}, bearer("all")):
        response = ask(app, "POST", "/admin", headers=headers)
        detail = check_problem(response, 401, "key_missing")["detail"]
        assert "heatmap-service key" in detail
        assert "--api-keys-file" in detail
        assert response.headers["www-authenticate"] == "Bearer"


def test_openapi_tells_how_to_send_a_key_and_where_one_is_needed(guarded: Api, file: Path) -> None:
    for api in (guarded, Api()):
        optional: list[Any] = [] if api is guarded else [{}]
        app_with_an_admin_route(api, file)
        document = api.get("/openapi.json").json()
        assert document["components"]["securitySchemes"] == {
            "bearer": {"type": "http", "scheme": "bearer"},
            "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        needed = {
            path: operation.get("security") for path, verbs in document["paths"].items() for operation in verbs.values()
        }
        predict = [*optional, {"bearer": ["predict"]}, {"X-API-Key": ["predict"]}]
        admin = [{"bearer": ["admin"]}, {"X-API-Key": ["admin"]}]
        for path in ("/admin", "/models/{id}/load", "/models/{id}/unload"):
            assert needed.pop(path) == admin
        assert needed.pop("/livez") == needed.pop("/readyz") == []
        assert all(security == predict for security in needed.values())
        for path in needed:
            (operation,) = document["paths"][path].values()
            assert {"401", "403"} <= operation["responses"].keys()
