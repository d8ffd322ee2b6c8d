"""Every method over HTTP: what all answer, several at once, several layers, and a long one whose time is up."""

from __future__ import annotations

import time
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.support import RAW, map_of, only, post, results, same_map

REAL = "efficientnet_lite0"
FEW: dict[str, dict[str, object]] = {
    "rise": {"n": 8},
    "occlusion": {"window": 8, "stride": 8},
    "ss_cam": {"n": 2},
    "smooth_grad": {"n": 4},
    "smooth_grad_cam_plus_plus": {"n": 4},
}
REFUSED = {"cam", "attention_rollout"}  # the tiny network has no pooling, and no attention


@pytest.fixture(scope="module")
def methods(client: httpx.Client) -> dict[str, Any]:
    return {method["name"]: method for method in client.get("/methods").json()["methods"]}


def test_every_method_answers_or_says_why_not(client: httpx.Client, methods: dict[str, Any], chelsea: bytes) -> None:
    for name, method in methods.items():
        response = post(client, chelsea, method=name, gen_params=FEW.get(name, {}), format="npy", size="model")
        if name in REFUSED:
            assert response.status_code == 422
            assert response.json()["code"] == "method_not_supported"
            assert name in response.json()["detail"]
            continue
        assert response.status_code == 200, response.text
        (heatmap,) = response.json()["results"][0]["heatmaps"]
        values = map_of(heatmap)
        assert values.shape == ((32, 32) if method["channels"] == 1 else (32, 32, 3))
        assert np.isfinite(values).all()
        assert heatmap["degenerate"] in (None, "all_negative")
        assert heatmap["gen_params"].keys() == method["gen_params"]["properties"].keys()


def test_methods_and_layers_together_are_those_of_requests_of_their_own(
    client: httpx.Client, methods: dict[str, Any], chelsea: bytes
) -> None:
    names = [name for name in methods if name not in REFUSED]
    fields: dict[str, Any] = {"target_classes": [1], "format": "npy", "size": "model"}
    (together,) = results(client, chelsea, method=names, gen_params=FEW, **fields)
    for name, heatmap in zip(names, together["heatmaps"], strict=True):
        alone = only(client, chelsea, method=name, gen_params=FEW.get(name, {}), **fields)
        assert heatmap["method"] == name
        assert heatmap["gen_params"] == alone["gen_params"]
        assert same_map(map_of(heatmap), map_of(alone), 1e-4), name


def test_maps_of_several_layers_are_averaged_each_by_its_maximum(client: httpx.Client, chelsea: bytes) -> None:
    def raw(layers: list[str] | str) -> Any:
        fields = {**RAW, "gen_params": {"scaling": "none", "target_conv_layer": layers}, "target_classes": [1]}
        return only(client, chelsea, **fields)

    both = raw(["0", "2"])
    assert both["gen_params"]["target_conv_layer"] == ["0", "2"]
    singles = [map_of(raw(layer)) for layer in ("0", "2")]
    # Each is scaled by the maximum at the network's input, where its picture is upsampled to.
    assert same_map(map_of(both), np.mean([one / one.max() for one in singles], axis=0), 1e-4)


def test_a_long_method_stops_between_chunks_when_its_time_is_up(client: httpx.Client, chelsea: bytes) -> None:
    started = time.monotonic()
    response = post(client, chelsea, REAL, method="rise", gen_params={"n": 20_000}, timeout_s=2)
    assert response.status_code == 504
    assert response.json()["code"] == "deadline_exceeded"
    assert post(client, chelsea, REAL).status_code == 200  # the device is free again
    assert time.monotonic() - started < 100
