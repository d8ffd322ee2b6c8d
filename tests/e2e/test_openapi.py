"""Requests made from the OpenAPI document, right ones and wrong ones: what is answered is what the document says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import Case, GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.conftest import write_tiny
from tests.e2e.support import file_of, text_of
from tests.server import Server, running

DOCUMENT = json.loads((Path(__file__).parents[2] / "openapi" / "openapi.json").read_text())
OPERATIONS = [(verb, path) for path, verbs in DOCUMENT["paths"].items() for verb in verbs]
# A GET here takes texts alone, and no text of a name that it knows is a wrong one.
ASKED = [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
ASKED += [(*operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if operation[0] == "post"]
EXAMPLES = {"post": 300, "get": 12}
CHECKED: list[Any] = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
ACCEPTS = st.sampled_from(["*/*", "application/json", "image/png", "application/x-npy", "text/html, image/webp;q=0"])
PICTURE = file_of(Image.effect_noise((12, 10), 50))
UPLOADS = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff", "application/octet-stream")
FILES = st.sampled_from([PICTURE, file_of(Image.new("RGB", (7, 9), "red"), "JPEG"), PICTURE[:60], b"", b"no picture"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openapi")
    write_tiny(folder / "models" / "tiny")
    with running(folder, "--models", str(folder / "models")) as server:
        yield server


@pytest.fixture(scope="module")
def schema() -> BaseSchema:
    load_all_checks()
    schemathesis.openapi.format("binary", FILES)
    for media_type in UPLOADS:
        schemathesis.openapi.media_type(media_type, FILES)
    return schemathesis.openapi.from_dict(DOCUMENT)


@pytest.mark.parametrize(("verb", "path", "mode"), ASKED, ids=lambda part: getattr(part, "value", part))
def test_answers_are_as_the_document_says(
    tiny: Server, schema: BaseSchema, verb: str, path: str, mode: GenerationMode
) -> None:
    operation, statuses = schema[path][verb], set()
    of_tiny = operation.as_strategy(generation_mode=mode, path_parameters={"id": "tiny"} if "{id}" in path else None)
    of_any = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)

    @settings(
        max_examples=EXAMPLES["get" if path.endswith("load") else verb],
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(of_tiny, of_tiny, of_tiny, of_any), pictures=st.integers(0, 3), accept=ACCEPTS)
    def ask(case: Case[Any], pictures: int, accept: str) -> None:
        if pictures and isinstance(case.body, dict) and case.media_type == "application/json":
            case.body["images"] = [text_of(PICTURE)] * pictures
        with requests.Session() as session:
            response = case.call(base_url=tiny.url, session=session, headers={"Accept": accept})
        statuses.add(response.status_code)
        # a server error may be one of the contract, such as 504 for a deadline of no time; 500 is a defect
        assert response.status_code != 500, response.text
        case.validate_response(response, checks=CHECKED)

    ask()
    if path.endswith("load"):
        assert statuses == {401}, "a server without keys has no admin"
    else:
        assert (200 if mode is GenerationMode.POSITIVE else 422) in statuses


def test_the_server_is_well(tiny: Server) -> None:
    with tiny.client() as client:
        assert client.post("/models/tiny/heatmap", files={"image": PICTURE}).status_code == 200
    assert "Traceback" not in tiny.log.read_text()
