"""What the service answers, against what can be computed by hand: numpy, Pillow, cmap, autograd, other requests."""

from __future__ import annotations

import io
import re
from typing import Any
from urllib.parse import unquote

import cmap
import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from tests.conftest import TINY_CODE
from tests.e2e.support import (
    RAW,
    Floats,
    data_of,
    file_of,
    image_of,
    map_of,
    only,
    pixels_of,
    post,
    resized,
    results,
    same_map,
    text_of,
)
from tests.server import OPTIONS_OFF

REAL = "efficientnet_lite0"
CAT, CUP = 285, 967
STAGES = ["queue", "decode", "compute", "render", "total"]
# A picture of 256 x 256 passes the real model's resize unchanged: the network sees the 224 x 224 in its middle.
SEEN = slice(16, 240)
PARAMS = {"target_conv_layer": ["conv_head"], "use_conv_only": True, "scaling": "scale_after_relu", **OPTIONS_OFF}


@pytest.fixture(scope="module")
def small(chelsea: bytes) -> bytes:
    """A picture that `tiny` sees as it is, 32 x 32."""
    return file_of(resized(chelsea, 32, 32))


@pytest.fixture(scope="module")
def square(chelsea: bytes) -> bytes:
    """A picture of which the real model sees the middle, 256 x 256."""
    return file_of(resized(chelsea, 256, 256))


def rgb(picture: bytes) -> Floats:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(np.float32)


# What the network says


def test_the_cat_is_recognised(client: httpx.Client, chelsea: bytes) -> None:
    (result,) = results(client, chelsea, REAL, top_k=3, format="gray", size="model")
    assert (result["index"], result["width"], result["height"]) == (0, 451, 300)
    assert [entry["class_name"] for entry in result["classes"]] == ["tiger cat", "Egyptian cat", "tabby"]
    assert [entry["class_id"] for entry in result["classes"]] == [282, 285, 281]
    assert [entry["confidence"] for entry in result["classes"]] == pytest.approx([0.39, 0.34, 0.18], abs=0.03)
    (heatmap,) = result["heatmaps"]
    assert {key: heatmap[key] for key in result["classes"][0]} == result["classes"][0]


def test_each_class_is_seen_where_it_is(client: httpx.Client, chelsea: bytes, coffee: bytes) -> None:
    both = Image.new("RGB", (448, 448))
    both.paste(resized(chelsea, 448, 224), (0, 0))
    both.paste(resized(coffee, 448, 224), (0, 224))
    (result,) = results(client, file_of(both), REAL, target_classes=[CAT, CUP], format="npy")
    cat, cup = (map_of(heatmap) for heatmap in result["heatmaps"])
    assert cat.shape == cup.shape == (448, 448)
    assert cat[:224].sum() >= 0.75 * cat.sum() > 0
    assert cup[224:].sum() >= 0.65 * cup.sum() > 0
    assert np.unravel_index(cat.argmax(), cat.shape)[0] < 224 <= np.unravel_index(cup.argmax(), cup.shape)[0]


def test_infer_gives_the_same_classes(client: httpx.Client, chelsea: bytes, coffee: bytes) -> None:
    for model in (REAL, "tiny"):
        explained = results(client, [chelsea, coffee], model, top_k=4, format="gray", size="model")
        inferred = results(client, [chelsea, coffee], model, endpoint="infer", top_k=4)
        assert [list(result) for result in inferred] == [["index", "width", "height", "classes"]] * 2
        for one, other in zip(inferred, explained, strict=True):
            assert [entry["class_id"] for entry in one["classes"]] == [entry["class_id"] for entry in other["classes"]]
            confidences = [entry["confidence"] for entry in other["classes"]]
            assert [entry["confidence"] for entry in one["classes"]] == pytest.approx(confidences, abs=1e-5)
            assert (one["width"], one["height"]) == (other["width"], other["height"])


def test_top_k_counts_the_listed_classes(client: httpx.Client, small: bytes) -> None:
    for asked, listed in ((None, 5), (0, 5), (2, 2), (9, 5)):
        fields: dict[str, Any] = {} if asked is None else {"top_k": asked}
        (result,) = results(client, small, endpoint="infer", **fields)
        confidences = [entry["confidence"] for entry in result["classes"]]
        assert len(confidences) == listed
        assert confidences == sorted(confidences, reverse=True)
        if listed == 5:
            assert sum(confidences) == pytest.approx(1, abs=1e-5)


# The maps, by autograd on the network itself


class Oracle:
    """`tiny` once more, explained by autograd on the plain module."""

    def __init__(self, picture: bytes) -> None:
        names: dict[str, Any] = {}
        exec(TINY_CODE, names)
        self.net: nn.Sequential = names["build"]().eval()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = torch.from_numpy(rgb(picture)) / 255
        self.image = ((pixels - mean) / std).permute(2, 0, 1)[None]

    def scores(self) -> Floats:
        return np.asarray(torch.softmax(self.net(self.image), 1).detach()[0])

    def grad_cam(self, layer: int, class_id: int) -> Tensor:
        activation: Tensor = self.net[: layer + 1](self.image).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.net[layer + 1 :](activation)[0, class_id], activation)
        return (gradient.mean((2, 3), keepdim=True) * activation).sum(1).detach()[0]

    def guided_grad_cam(self, class_id: int) -> Floats:
        """ReLU's gradient is clipped at 0; the convolution's Grad-CAM is clipped, upsampled and multiplied."""
        image = self.image.clone().requires_grad_()
        hidden = image
        for module in self.net:
            hidden = module(hidden)
            if isinstance(module, nn.ReLU):
                hidden.register_hook(lambda gradient: gradient.clamp(min=0))
        (gradient,) = torch.autograd.grad(hidden[0, class_id], image)
        coarse = self.grad_cam(2, class_id).clamp(min=0)[None, None]
        fine = nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)
        return np.asarray((fine[0] * gradient[0]).permute(1, 2, 0))


def upsampled(coarse: Tensor) -> Floats:
    fine = nn.functional.interpolate(coarse[None, None], size=(32, 32), mode="bilinear", align_corners=False)
    return np.asarray(fine[0, 0])


@pytest.mark.parametrize(
    ("gen_params", "layer"),
    [
        ({}, 2),
        ({"use_conv_only": False}, 3),
        ({"use_conv_only": "false"}, 3),
        ({"target_conv_layer": "0"}, 0),
        ({"target_conv_layer": "0", "use_conv_only": False}, 1),
        ({"target_conv_layer": "1"}, 1),
        ({"target_conv_layer": "recommended"}, 3),
    ],
)
@pytest.mark.parametrize("class_id", [0, 3])
def test_grad_cam_equals_autograd(
    client: httpx.Client, small: bytes, gen_params: dict[str, Any], layer: int, class_id: int
) -> None:
    expected = Oracle(small).grad_cam(layer, class_id)
    fields: dict[str, Any] = {**RAW, "gen_params": {**gen_params, "scaling": "none"}}
    heatmap = only(client, small, target_classes=[class_id], **fields)
    assert same_map(map_of(heatmap), upsampled(expected), 1e-4)
    assert heatmap["value_range"] == pytest.approx([expected.min().item(), expected.max().item()], rel=1e-3)
    assert heatmap["confidence"] == pytest.approx(float(Oracle(small).scores()[class_id]), abs=1e-5)
    assert heatmap["gen_params"]["scaling"] == "none"
    assert heatmap["gen_params"]["use_conv_only"] is (gen_params.get("use_conv_only", True) is True)


def test_guided_grad_cam_equals_autograd(client: httpx.Client, small: bytes) -> None:
    expected = Oracle(small).guided_grad_cam(1)
    for size in ("model", "original"):
        heatmap = only(client, small, method="guided_grad_cam", target_classes=[1], format="npy", size=size)
        assert same_map(map_of(heatmap), expected, 1e-4)
        assert heatmap["gen_params"] == {"target_conv_layer": ["2"]}
        assert heatmap["value_range"] == pytest.approx([expected.min(), expected.max()], rel=1e-3)
    assert expected.min() < 0 < expected.max()


def test_the_layers_relu_is_taken_with_use_conv_only_false(client: httpx.Client, square: bytes) -> None:
    layers = {layer["name"]: layer for layer in client.get(f"/models/{REAL}/layers").json()["layers"]}
    relu = layers["conv_head"]["relu"]
    assert relu in layers

    def taken(**params: Any) -> Any:
        fields: dict[str, Any] = {**RAW, "gen_params": {"scaling": "none", **params}}
        return only(client, square, REAL, target_classes=[CAT], **fields)

    convolution, fused, direct = taken(), taken(use_conv_only=False), taken(target_conv_layer=relu)
    assert same_map(map_of(fused), map_of(direct), 1e-4)
    assert not same_map(map_of(fused), map_of(convolution), 0.05)
    assert fused["gen_params"] == {
        "target_conv_layer": ["conv_head"],
        "use_conv_only": False,
        "scaling": "none",
        **OPTIONS_OFF,
    }


# Scaling


@pytest.mark.parametrize("class_id", [0, 3])
def test_scaling_is_halcons(client: httpx.Client, chelsea: bytes, class_id: int) -> None:
    maps = {}
    for scaling in ("none", "scale_after_relu", "scale_before_relu"):
        fields: dict[str, Any] = {"target_classes": [class_id], "format": "npy", "gen_params": {"scaling": scaling}}
        heatmap = only(client, chelsea, **fields)
        assert heatmap["gen_params"]["scaling"] == scaling
        maps[scaling] = map_of(heatmap)
    raw = maps["none"]
    assert raw.shape == (300, 451)
    assert raw.min() < 0 < raw.max()
    positive = np.maximum(raw, 0)
    assert np.abs(maps["scale_after_relu"] - positive / positive.max()).max() < 1e-6
    assert np.abs(maps["scale_before_relu"] - positive / np.abs(raw).max()).max() < 1e-6
    lowest, highest = heatmap["value_range"]
    assert lowest * 1.000001 <= raw.min()
    assert raw.max() <= highest * 1.000001
    # 16 cells laid over 451 x 300 pixels: every cell's centre has a pixel near it
    assert raw.max() == pytest.approx(highest, rel=0.1)


def test_the_default_scaling_is_after_the_relu(client: httpx.Client, small: bytes) -> None:
    named = only(client, small, format="npy", gen_params={"scaling": "scale_after_relu"})
    assert data_of(only(client, small, format="npy")) == data_of(named)
    assert map_of(named).max() == pytest.approx(1)
    assert map_of(named).min() >= 0


# Which heatmaps, in which order


def test_lists_per_picture_give_the_maps_of_single_requests(
    client: httpx.Client, chelsea: bytes, coffee: bytes, square: bytes
) -> None:
    pictures = [chelsea, coffee, square]
    lists = [[CAT], [], [CUP, "tabby"]]
    together = results(client, pictures, REAL, target_classes=lists, **RAW)
    assert [result["index"] for result in together] == [0, 1, 2]
    assert [len(result["heatmaps"]) for result in together] == [1, 1, 2]
    top = together[1]["heatmaps"][0]
    assert top["class_id"] == together[1]["classes"][0]["class_id"]
    for picture, targets, result in zip(pictures, lists, together, strict=True):
        (alone,) = results(client, picture, REAL, target_classes=targets, **RAW)
        for one, other in zip(result["heatmaps"], alone["heatmaps"], strict=True):
            assert (one["class_id"], one["class_name"]) == (other["class_id"], other["class_name"])
            assert same_map(map_of(one), map_of(other), 1e-4)


def test_lists_per_picture_of_a_small_model(client: httpx.Client, chelsea: bytes, coffee: bytes, small: bytes) -> None:
    pictures = [chelsea, coffee, small]
    lists: list[list[int | str]] = [["ant", 4, 2], [], [3]]
    together = results(client, pictures, target_classes=lists, **RAW)
    for picture, targets, result in zip(pictures, lists, together, strict=True):
        wanted = targets or [result["classes"][0]["class_id"]]
        for target, heatmap in zip(wanted, result["heatmaps"], strict=True):
            alone = only(client, picture, target_classes=[target], **RAW)
            assert heatmap["class_id"] == alone["class_id"]
            assert same_map(map_of(heatmap), map_of(alone), 1e-5)


def test_methods_are_outer_and_targets_inner(client: httpx.Client, chelsea: bytes, small: bytes) -> None:
    methods = ["guided_grad_cam", "grad_cam"]
    targets = [4, "bee", 0]
    both = results(client, [chelsea, small], method=methods, target_classes=targets, format="npy", size="model")
    expected = [(method, class_id) for method in methods for class_id in (4, 1, 0)]
    for result in both:
        assert [(heatmap["method"], heatmap["class_id"]) for heatmap in result["heatmaps"]] == expected
        assert [heatmap["class_name"] for heatmap in result["heatmaps"]] == ["cat", "bee", "ant"] * 2
    for picture, result in zip([chelsea, small], both, strict=True):
        for heatmap in result["heatmaps"]:
            alone = only(
                client,
                picture,
                method=heatmap["method"],
                target_classes=[heatmap["class_id"]],
                format="npy",
                size="model",
            )
            assert same_map(map_of(heatmap), map_of(alone), 1e-5)
            assert heatmap["gen_params"] == alone["gen_params"]


def test_a_class_asked_for_twice_is_answered_twice(client: httpx.Client, small: bytes) -> None:
    (result,) = results(client, small, target_classes=[1, "bee", 1])
    assert [heatmap["class_id"] for heatmap in result["heatmaps"]] == [1, 1, 1]
    assert len({heatmap["data"] for heatmap in result["heatmaps"]}) == 1


# Parameters


def test_effective_parameters_are_told(client: httpx.Client, square: bytes) -> None:
    (result,) = results(client, square, REAL, method=["grad_cam", "guided_grad_cam"], format="npy", size="model")
    assert [heatmap["gen_params"] for heatmap in result["heatmaps"]] == [PARAMS, {"target_conv_layer": ["conv_head"]}]
    assert {heatmap["precision"] for heatmap in result["heatmaps"]} == {"fp32"}
    assert map_of(result["heatmaps"][1]).shape == (224, 224, 3)


def test_parameters_for_one_method_alone(client: httpx.Client, small: bytes) -> None:
    params: dict[str, Any] = {"target_conv_layer": "0", "grad_cam": {"scaling": "none", "target_conv_layer": "2"}}
    (result,) = results(client, small, method=["grad_cam", "guided_grad_cam"], gen_params=params, format="npy")
    cam, guided = (heatmap["gen_params"] for heatmap in result["heatmaps"])
    assert cam == {"target_conv_layer": ["2"], "use_conv_only": True, "scaling": "none", **OPTIONS_OFF}
    assert guided == {"target_conv_layer": ["0"]}


def test_effective_parameters_may_be_sent_again(client: httpx.Client, small: bytes) -> None:
    first = only(client, small, format="npy")
    again = only(client, small, format="npy", gen_params=first["gen_params"])
    assert (again["data"], again["gen_params"]) == (first["data"], first["gen_params"])


# The request's encodings


@pytest.mark.parametrize("style", ["overlay", "npy"])
def test_three_encodings_carry_the_same_request(client: httpx.Client, chelsea: bytes, style: str) -> None:
    url = "/models/tiny/heatmap"
    targets = '[1, "dog"]'
    params = '{"scaling": "none", "grad_cam": {"target_conv_layer": "0"}}'
    texts = {"target_classes": targets, "gen_params": params, "format": style, "alpha": "0.3", "top_k": "2"}
    values = {
        "target_classes": [1, "dog"],
        "gen_params": {"scaling": "none", "grad_cam": {"target_conv_layer": "0"}},
        "format": style,
        "alpha": 0.3,
        "top_k": 2,
    }
    text = text_of(chelsea)
    png = {"content-type": "image/png"}
    repeated: dict[str, Any] = {**texts, "target_classes": ["1", "dog"]}
    query = {key: value for key, value in texts.items() if key not in ("target_classes", "format")}
    answers = [
        client.post(url, files={"image": chelsea}, data=texts),
        client.post(url, files={"images": ("a.txt", chelsea, "text/plain")}, data=repeated),
        client.post(url, files={"image": chelsea}, params=texts),
        client.post(url, files={"image": chelsea}, data={"target_classes": targets, "format": style}, params=query),
        client.post(url, json={"images": [text], **values}),
        client.post(url, json={"images": ["data:image/png;base64," + text], **values}),
        client.post(url, json={"images": ["data:image/jpeg;name=a;base64," + text]}, params=texts),
        client.post(url, content=chelsea, headers=png, params=texts),
        client.post(url, content=chelsea, headers={"content-type": "application/octet-stream"}, params=repeated),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
    bodies = [answer.json()["results"] for answer in answers]
    assert [heatmap["class_id"] for heatmap in bodies[0][0]["heatmaps"]] == [1, 3]
    assert bodies[0][0]["heatmaps"][0]["gen_params"]["target_conv_layer"] == ["0"]
    assert len(bodies[0][0]["classes"]) == 2
    assert all(body == bodies[0] for body in bodies[1:])


# Formats, encodings, sizes


@pytest.fixture(scope="module")
def npy(client: httpx.Client, square: bytes) -> Floats:
    """The map of which the pictures below are pictures, 256 x 256."""
    return map_of(only(client, square, REAL, target_classes=[CAT], format="npy"))


def painted(client: httpx.Client, square: bytes, **fields: Any) -> Any:
    return only(client, square, REAL, target_classes=[CAT], **fields)


def colours(values: Floats, name: str) -> Floats:
    table = np.rint(cmap.Colormap(name).lut(256)[:, :3] * 255).astype(np.float32)
    looked_up: Floats = table[np.rint(values * 255).astype(int)]
    return looked_up


def outside() -> NDArray[np.bool_]:
    mask = np.ones((256, 256), bool)
    mask[SEEN, SEEN] = False
    return mask


def test_the_map_lies_where_the_network_looked(client: httpx.Client, square: bytes, npy: Floats) -> None:
    seen = map_of(painted(client, square, format="npy", size="model"))
    assert (npy.shape, seen.shape) == ((256, 256), (224, 224))
    assert np.abs(npy[SEEN, SEEN] - seen).max() < 1e-5
    assert not npy[outside()].any()
    assert seen.max() == pytest.approx(1)


@pytest.mark.parametrize(
    ("fields", "name", "alpha"),
    [
        ({}, "matlab:jet", 0.5),
        ({"alpha": 0.25, "colormap": "viridis"}, "bids:viridis", 0.25),
        ({"alpha": 0}, "matlab:jet", 0),
        ({"alpha": 1, "colormap": "gray"}, "matlab:gray", 1),
    ],
)
def test_overlay_is_colours_and_picture(
    client: httpx.Client, square: bytes, npy: Floats, fields: dict[str, Any], name: str, alpha: float
) -> None:
    heatmap = painted(client, square, **fields)
    assert (heatmap["format"], heatmap["media_type"], image_of(heatmap).mode) == ("overlay", "image/png", "RGB")
    expected = alpha * colours(npy, name) + (1 - alpha) * rgb(square)
    expected[outside()] = rgb(square)[outside()]
    assert np.abs(pixels_of(heatmap) - expected).max() <= 0.51


def test_heatmap_is_colours_where_the_network_looked(client: httpx.Client, square: bytes, npy: Floats) -> None:
    heatmap = painted(client, square, format="heatmap", colormap="viridis")
    assert (heatmap["media_type"], image_of(heatmap).mode) == ("image/png", "RGBA")
    pixels = pixels_of(heatmap)
    assert np.array_equal(pixels[..., 3] == 0, outside())
    assert (pixels[SEEN, SEEN, 3] == 255).all()
    assert np.abs(pixels[SEEN, SEEN, :3] - colours(npy, "bids:viridis")[SEEN, SEEN]).max() <= 0.51
    peak = np.unravel_index(npy.argmax(), npy.shape)
    assert pixels[peak].tolist() == [253, 231, 37, 255]  # viridis ends in this yellow


@pytest.mark.parametrize(("style", "top", "modes"), [("gray", 255, {"L"}), ("gray16", 65535, {"I;16", "I"})])
def test_grays_are_the_map_in_steps(
    client: httpx.Client, square: bytes, npy: Floats, style: str, top: int, modes: set[str]
) -> None:
    heatmap = painted(client, square, format=style)
    assert heatmap["media_type"] == "image/png"
    assert image_of(heatmap).mode in modes
    assert np.abs(pixels_of(heatmap) - top * npy).max() <= 0.51
    assert pixels_of(heatmap).max() == top
    assert not pixels_of(heatmap)[outside()].any()


@pytest.mark.parametrize("scaling", ["none", "scale_before_relu"])
def test_pictures_of_maps_that_are_not_scaled_to_one(client: httpx.Client, small: bytes, scaling: str) -> None:
    """`none` is divided by its maximum for display; what is scaled shows as it is, clipped."""
    fields: dict[str, Any] = {"target_classes": [3], "gen_params": {"scaling": scaling}}
    values = map_of(only(client, small, format="npy", **fields))
    shown = np.clip(values / values.max() if scaling == "none" else values, 0, 1)
    assert scaling == "none" or shown.max() < 0.9
    assert np.abs(pixels_of(only(client, small, format="gray", **fields)) - 255 * shown).max() <= 0.51


def test_pictures_of_three_channels(client: httpx.Client, small: bytes) -> None:
    fields: dict[str, Any] = {"method": "guided_grad_cam", "target_classes": [1]}
    values = np.abs(map_of(only(client, small, format="npy", **fields))).max(axis=2)
    shown = values / values.max()
    assert np.abs(pixels_of(only(client, small, format="gray", **fields)) - 255 * shown).max() <= 0.51
    overlay = pixels_of(only(client, small, **fields))
    assert np.abs(overlay - 0.5 * colours(shown, "matlab:jet") - 0.5 * rgb(small)).max() <= 0.51


def test_three_channels_lie_where_the_network_looked(client: httpx.Client, square: bytes) -> None:
    guided, seen = (
        map_of(painted(client, square, method="guided_grad_cam", format="npy", size=size))
        for size in ("original", "model")
    )
    assert (guided.shape, seen.shape) == ((256, 256, 3), (224, 224, 3))
    assert same_map(guided[SEEN, SEEN], seen, 1e-4)
    assert not guided[outside()].any()
    assert guided.min() < 0 < guided.max()
    pixels = pixels_of(painted(client, square, method="guided_grad_cam", format="heatmap"))
    assert np.array_equal(pixels[..., 3] == 0, outside())


@pytest.mark.parametrize("style", ["overlay", "heatmap"])
@pytest.mark.parametrize("encoding", ["webp", "jpeg"])
def test_other_encodings_show_the_same(client: httpx.Client, square: bytes, style: str, encoding: str) -> None:
    lossless = painted(client, square, format=style)
    lossy = painted(client, square, format=style, encoding=encoding)
    assert lossy["media_type"] == f"image/{encoding}"
    mode = "RGBA" if (style, encoding) == ("heatmap", "webp") else "RGB"
    assert image_of(lossy).mode == mode
    expected = pixels_of(lossless)
    if mode == "RGB" and style == "heatmap":
        expected = np.where(outside()[..., None], rgb(square), expected[..., :3])
    elif mode == "RGBA":
        assert np.array_equal(pixels_of(lossy)[..., 3] == 0, outside())
        expected = expected[..., :3] * (expected[..., 3:] > 0)
    found = pixels_of(lossy)[..., :3] * (1 if mode == "RGB" else pixels_of(lossy)[..., 3:] > 0)
    assert np.abs(found - expected).mean() < 6


@pytest.mark.parametrize("style", ["overlay", "heatmap", "gray", "gray16", "npy"])
@pytest.mark.parametrize(("size", "width", "height"), [("original", 451, 300), ("model", 32, 32)])
def test_sizes(client: httpx.Client, chelsea: bytes, style: str, size: str, width: int, height: int) -> None:
    heatmap = only(client, chelsea, format=style, size=size)
    assert (heatmap["width"], heatmap["height"]) == (width, height)
    if style == "npy":
        assert map_of(heatmap).shape == (height, width)
    else:
        assert image_of(heatmap).size == (width, height)


def test_the_models_size_lies_over_the_networks_input(client: httpx.Client, square: bytes) -> None:
    seen = map_of(painted(client, square, format="npy", size="model"))
    expected = 0.5 * colours(seen, "matlab:jet") + 0.5 * rgb(square)[SEEN, SEEN]
    assert np.abs(pixels_of(painted(client, square, size="model")) - expected).max() <= 0.51


def test_a_map_without_anything_above_zero_shows_no_colours(client: httpx.Client) -> None:
    black = file_of(Image.new("RGB", (32, 32)))
    fields: dict[str, Any] = {"target_classes": [3], "gen_params": {"target_conv_layer": "0"}}
    (result,) = results(client, black, **fields)
    (overlay,) = result["heatmaps"]
    assert overlay["degenerate"] == "all_negative"
    assert overlay["value_range"][0] < overlay["value_range"][1] <= 0
    assert not pixels_of(overlay).any()
    assert not pixels_of(only(client, black, format="heatmap", **fields))[..., 3].any()
    assert not pixels_of(only(client, black, format="gray", **fields)).any()
    assert not map_of(only(client, black, format="npy", **fields)).any()
    fields["gen_params"]["scaling"] = "none"
    assert map_of(only(client, black, format="npy", **fields)).max() <= 0


# The heatmap itself


@pytest.mark.parametrize(
    ("accept", "fields"),
    [
        ("image/png", {}),
        ("image/png", {"format": "gray16"}),
        ("image/webp", {"encoding": "webp"}),
        ("image/jpeg", {"encoding": "jpeg", "format": "heatmap"}),
        ("application/x-npy", {"format": "npy"}),
    ],
)
def test_the_heatmap_itself_is_what_json_holds(
    client: httpx.Client, square: bytes, accept: str, fields: dict[str, Any]
) -> None:
    embedded = only(client, square, REAL, target_classes=["Egyptian cat"], **fields)
    wanted = {key: value for key, value in fields.items() if key == "format" and value != "npy"}
    response = post(client, square, REAL, headers={"Accept": accept}, target_classes=["Egyptian cat"], **wanted)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == accept == embedded["media_type"]
    assert response.content == data_of(embedded)
    assert response.headers["X-Class-Id"] == str(CAT)
    assert response.headers["X-Class-Name"] == "Egyptian%20cat"
    assert unquote(response.headers["X-Class-Name"]) == embedded["class_name"]
    assert float(response.headers["X-Confidence"]) == pytest.approx(embedded["confidence"], abs=1e-5)


# HALCON's dictionary


def test_dl_result_is_halcons_dictionary(client: httpx.Client, chelsea: bytes, small: bytes) -> None:
    fields: dict[str, Any] = {"method": ["grad_cam", "guided_grad_cam"], "target_classes": [2, 0]}
    both = results(client, [chelsea, small], result_format="dl_result", **fields)
    plain = results(client, [chelsea, small], format="npy", top_k=0, **fields)
    for dictionary, result in zip(both, plain, strict=True):
        assert set(dictionary) == {
            "classification_class_ids",
            "classification_class_names",
            "classification_confidences",
            "heatmap_grad_cam",
            "heatmap_guided_grad_cam",
        }
        classes = result["classes"]
        assert len(classes) == 5
        assert dictionary["classification_class_ids"] == [entry["class_id"] for entry in classes]
        assert dictionary["classification_class_names"] == [entry["class_name"] for entry in classes]
        assert dictionary["classification_confidences"] == sorted(
            (entry["confidence"] for entry in classes), reverse=True
        )
        cams, guided = dictionary["heatmap_grad_cam"], dictionary["heatmap_guided_grad_cam"]
        assert set(cams) == {"heatmap_image_class_2", "heatmap_image_class_0"}
        assert set(guided) == {"guided_grad_cam_image_class_2", "guided_grad_cam_image_class_0"}
        assert [*cams.values(), *guided.values()] == result["heatmaps"]
        assert map_of(guided["guided_grad_cam_image_class_0"]).ndim == 3


def test_dl_result_follows_what_is_given(client: httpx.Client, small: bytes) -> None:
    (dictionary,) = results(client, small, result_format="dl_result", top_k=2, format="gray")
    assert len(dictionary["classification_class_ids"]) == 2
    (heatmap,) = dictionary["heatmap_grad_cam"].values()
    assert image_of(heatmap).mode == "L"
    (inferred,) = results(client, small, endpoint="infer", result_format="dl_result")
    assert sorted(inferred["classification_class_ids"]) == [0, 1, 2, 3, 4]
    assert len(inferred) == 3


# Pictures of every kind

TURNS: dict[int, Any] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_turned_photographs_are_answered_upright(client: httpx.Client, chelsea: bytes, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph = file_of(resized(chelsea, 90, 60), "JPEG", exif=exif)
    upright = file_of(Image.fromarray(np.ascontiguousarray(TURNS[orientation](rgb(photograph)).astype(np.uint8))))
    (turned,) = results(client, photograph, target_classes=[1])
    (expected,) = results(client, upright, target_classes=[1])
    assert (turned["width"], turned["height"]) == ((90, 60) if orientation < 5 else (60, 90))
    assert turned == expected


def odd_pictures(picture: bytes) -> dict[str, tuple[bytes, bytes | None]]:
    """Files of every kind, 60 x 40, and the plain picture that each shows where that is the same to the bit."""
    image = resized(picture, 60, 40)
    gray = image.convert("L")
    plain, plain_gray = file_of(image), file_of(gray.convert("RGB"))
    wide = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    translucent = image.copy()
    translucent.putalpha(Image.linear_gradient("L").resize(image.size))
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=translucent.getchannel("A"))
    palette = image.quantize(16)
    shown = file_of(palette.convert("RGB"))
    frames = [image.rotate(180), image]
    return {
        "gray PNG": (file_of(gray), plain_gray),
        "16-bit PNG": (file_of(wide), plain_gray),
        "alpha PNG": (file_of(translucent), file_of(white)),
        "palette PNG": (file_of(palette), shown),
        "palette with alpha PNG": (file_of(palette, transparency=b"\x80" * 16), None),
        "GIF": (file_of(palette, "GIF"), shown),
        "animated GIF": (file_of(palette, "GIF", save_all=True, append_images=frames, duration=20), shown),
        "animated WebP": (file_of(image, "WEBP", lossless=True, save_all=True, append_images=frames), plain),
        "lossless WebP": (file_of(image, "WEBP", lossless=True, exact=True), plain),
        "CMYK JPEG": (file_of(image.convert("CMYK"), "JPEG"), None),
        "gray JPEG": (file_of(gray, "JPEG"), None),
        "progressive JPEG": (file_of(image, "JPEG", progressive=True), None),
        "several JPEGs in one": (file_of(image, "MPO", save_all=True, append_images=frames), None),
        "BMP": (file_of(image, "BMP"), plain),
        "TIFF": (file_of(image, "TIFF"), plain),
        "compressed TIFF": (file_of(image, "TIFF", compression="tiff_lzw"), plain),
        "1-bit PNG": (file_of(gray.convert("1")), file_of(gray.convert("1").convert("RGB"))),
    }


def test_pictures_of_every_kind_are_read(client: httpx.Client, chelsea: bytes) -> None:
    kinds = odd_pictures(chelsea)
    same = {name: plain for name, (_, plain) in kinds.items() if plain is not None}
    found = results(client, [file for file, _ in kinds.values()], format="heatmap", target_classes=[1])
    assert [(result["width"], result["height"]) for result in found] == [(60, 40)] * len(kinds)
    by_name = dict(zip(kinds, found, strict=True))
    expected = results(client, same.values(), format="npy", target_classes=[1])
    twins = results(client, [kinds[name][0] for name in same], format="npy", target_classes=[1])
    for name, one, other in zip(same, twins, expected, strict=True):
        assert same_map(map_of(one["heatmaps"][0]), map_of(other["heatmaps"][0]), 1e-5), name
    assert all(result["heatmaps"][0]["degenerate"] is None for result in by_name.values())


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 10_000), (10_000, 1), (3, 2)])
@pytest.mark.parametrize("model", ["tiny", REAL])
def test_odd_sizes_are_answered(client: httpx.Client, model: str, width: int, height: int) -> None:
    picture = file_of(Image.new("RGB", (width, height), "orange"))
    (result,) = results(client, picture, model, target_classes=[1])
    assert (result["width"], result["height"]) == (width, height)
    assert image_of(result["heatmaps"][0]).size == (width, height)


# What every answer carries


def test_times_and_the_requests_id(client: httpx.Client, chelsea: bytes) -> None:
    named = {"X-Request-ID": "a-request.of_mine-1"}
    answers = [
        post(client, [chelsea] * 3, headers=named, method=["grad_cam", "guided_grad_cam"]),
        post(client, chelsea, headers={**named, "Accept": "image/png"}),
        post(client, chelsea, endpoint="infer", headers=named),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Request-ID"] == named["X-Request-ID"]
        found = re.findall(r"(\w+);dur=([\d.]+)", answer.headers["Server-Timing"])
        times = {name: float(duration) for name, duration in found}
        assert list(times) == STAGES
        parts = sum(times[stage] for stage in STAGES[:-1])
        assert 0 < parts <= times["total"] + 1
        assert times["total"] < 1000 * answer.elapsed.total_seconds() + 1
    assert answers[0].json()["request_id"] == named["X-Request-ID"]
    others = [post(client, chelsea, endpoint="infer") for _ in range(2)]
    assert len({answer.headers["X-Request-ID"] for answer in others}) == 2
    assert others[0].json()["request_id"] == others[0].headers["X-Request-ID"]
