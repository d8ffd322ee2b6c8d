"""What there is: models, layers, classes, methods."""

from __future__ import annotations

import pytest

from tests.api.support import FAILED, LOADING, READY, Api, StandIn, check_problem, pointers

MODEL_KEYS = [
    "id",
    "revision",
    "state",
    "reason",
    "type",
    "architecture",
    "device",
    "runtime",
    "precision",
    "input",
    "num_classes",
    "default_layer",
    "recommended_layer",
    "compiled_layers",
    "compiled_bytes",
]


@pytest.fixture
def api() -> Api:
    return Api(StandIn(FAILED, READY, LOADING))


def test_models_in_every_state_are_listed(api: Api) -> None:
    models = api.get("/models").json()["models"]
    assert [(model["id"], model["state"], model["reason"]) for model in models] == [
        ("broken", "failed", "no weights"),
        ("resnet", "ready", None),
        ("slow", "loading", None),
    ]
    assert list(models[1]) == MODEL_KEYS
    assert api.get("/models/resnet").json() == models[1]
    assert api.get("/models/slow").json() == models[2]


def test_layers_are_halcons_summary(api: Api) -> None:
    (layer,) = api.get("/models/resnet/layers").json()["layers"]
    keys = ["name", "type", "output_shape", "parameters", "target", "reason", "default", "recommended", "relu"]
    assert list(layer) == keys
    assert (layer["name"], layer["output_shape"], layer["relu"]) == ("conv", [8, 7, 7], "relu")


@pytest.mark.parametrize(
    ("query", "ids"), [("", [0, 1, 2]), ("BEE", [1]), ("a", [0, 2]), ("2", [2]), ("02", []), ("dog", [])]
)
def test_classes_are_found_by_name_or_id(api: Api, query: str, ids: list[int]) -> None:
    classes = api.get("/models/resnet/classes", params={"query": query}).json()["classes"]
    assert [entry["class_id"] for entry in classes] == ids
    assert all(entry["class_name"] == READY.classes[entry["class_id"]] for entry in classes)


@pytest.mark.parametrize("path", ["/models", "/models/resnet", "/models/resnet/layers", "/methods"])
def test_a_path_without_fields_takes_none(api: Api, path: str) -> None:
    for query, pointer in (("query=cat", "/query"), ("a~/b=", "/a~0~1b"), ("x" * 5000, "/xxx")):
        problem = check_problem(api.get(f"{path}?{query}"), 422, "invalid_request")
        assert pointers(problem)[0].startswith(pointer)
        assert "takes none" in problem["detail"]
        assert len(problem["detail"]) < 1000


def test_classes_take_the_query_alone_and_once(api: Api) -> None:
    for query, pointer in (("q=cat", "/q"), ("query=cat&qeury=", "/qeury")):
        problem = check_problem(api.get(f"/models/resnet/classes?{query}"), 422, "invalid_request")
        assert pointers(problem) == [pointer]
        assert "The fields are query." in problem["detail"]
    assert "Did you mean 'query'?" in problem["detail"]
    for query in ("query=cat&query=bee", "query=cat&query=", "query=a&query=a"):
        problem = check_problem(api.get(f"/models/resnet/classes?{query}"), 422, "invalid_request")
        assert (pointers(problem), "twice" in problem["detail"]) == (["/query"], True)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/docs", "/openapi.json"])
def test_probes_and_pages_take_any_query(api: Api, path: str) -> None:
    assert api.get(f"{path}?probe=1&probe=2").status_code == api.get(path).status_code
    assert api.get(f"{path}?probe=1").status_code != 422


@pytest.mark.parametrize("rows", ["layers", "classes"])
def test_a_model_without_rows_says_why(api: Api, rows: str) -> None:
    response = api.get(f"/models/slow/{rows}")
    check_problem(response, 503, "model_loading")
    assert int(response.headers["retry-after"]) >= 1
    response = api.get(f"/models/broken/{rows}")
    assert "no weights" in check_problem(response, 503, "model_failed")["detail"]
    assert "retry-after" not in response.headers


def test_methods_are_listed(api: Api) -> None:
    (method,) = api.get("/methods").json()["methods"]
    assert list(method) == ["name", "family", "channels", "paper", "description", "cost", "gen_params"]
    assert method["gen_params"] == {"type": "object"}


def test_methods_before_the_first_worker_has_told() -> None:
    check_problem(Api(StandIn(methods=())).get("/methods"), 503, "no_worker")
