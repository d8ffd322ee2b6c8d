"""What clients ask during a soak: a fixed set of valid requests, and broken ones with the code that each must get."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx
from PIL import Image

from tests.conftest import DATA
from tests.e2e.support import file_of, text_of

REAL, TINY = "efficientnet_lite0", "tiny"
SLOW = 0.15
"""How often a request of some tenths of a second comes, where an ordinary one comes once."""

PNG, JPEG = {"content-type": "image/png"}, {"content-type": "image/jpeg"}


@dataclass(frozen=True)
class Case:
    """A request as it goes over the wire.

    `chaotic`: one ulp in the network moves its maps, so that they are compared by correlation. `code` is the problem
    that it must get; a valid request has none.
    """

    name: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    weight: float = 1.0
    chaotic: bool = False
    code: str = ""
    verb: str = "POST"

    def wire(self) -> bytes:
        """The request as bytes for a socket."""
        lines = [f"{self.verb} {self.path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(self.body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


def case(
    name: str,
    path: str,
    *,
    weight: float = 1.0,
    chaotic: bool = False,
    code: str = "",
    verb: str = "POST",
    **options: Any,
) -> Case:
    """`options` are those of `httpx.Request`: json, files and data, content, headers, params."""
    request = httpx.Request(verb, f"http://soak{path}", **options)
    headers = {key: value for key, value in request.headers.items() if key not in ("host", "content-length")}
    return Case(name, request.url.raw_path.decode(), headers, request.read(), weight, chaotic, code, verb)


def with_key(one: Case, key: str) -> Case:
    """The same with a key, which servers without keys ignore."""
    return replace(one, headers={**one.headers, "authorization": f"Bearer {key}"})


def heatmap(model: str) -> str:
    return f"/models/{model}/heatmap"


def asked(pictures: list[bytes], **fields: Any) -> dict[str, Any]:
    return {"images": [text_of(picture) for picture in pictures], **fields}


def photograph(name: str, width: int = 0, kind: str = "PNG") -> bytes:
    """A picture of the test data, as it is or smaller."""
    data = (DATA / name).read_bytes()
    if not width:
        return data
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return file_of(image.resize((width, image.height * width // image.width)), kind)


def tiny_cases() -> list[Case]:
    """Valid requests to the tiny model."""
    cat, cup = photograph("chelsea.png", 160), photograph("coffee.png", 120, "JPEG")
    raw, npy = {"scaling": "none"}, {"format": "npy", "size": "model"}
    path = heatmap(TINY)
    return [
        case("form, overlay", path, files={"image": cat}),
        case("several pictures", path, files=[("images", cat), ("images", cup)], data={"format": "gray16"}),
        case("classes", path, json=asked([cup], target_classes=["ant", 4], gen_params=raw, **npy)),
        case("lists of classes", path, json=asked([cat, cup], target_classes=[[0, 1], [3]], colormap="viridis")),
        case("DLResult", path, json=asked([cat], method=["grad_cam", "guided_grad_cam"], result_format="dl_result")),
        case("webp alone", path, content=cup, headers={**JPEG, "accept": "image/webp"}),
        case(
            "query", path, content=cat, headers=PNG, params={"method": "layer_cam", "encoding": "jpeg", "size": "model"}
        ),
        case("array alone", path, files={"image": cat}, headers={"accept": "application/x-npy"}),
        case("pixel methods", path, json=asked([cup], method=["saliency", "guided_backprop"], target_classes=[1])),
        case("CAMs at once", path, json=asked([cat], method=["hires_cam", "xgrad_cam", "eigen_cam"], format="gray")),
        case("infer", f"/models/{TINY}/infer", json=asked([cat, cup], top_k=0)),
        case("large answer", path, weight=SLOW, json=asked([photograph("rocket.jpg")] * 4, target_classes=[0, 1, 2])),
        case("score_cam", path, weight=SLOW, json=asked([cat] * 3, method="score_cam", **npy)),
        case("rise", path, weight=SLOW, json=asked([cup], method="rise", gen_params={"n": 200}, **npy)),
        case(
            "integrated_gradients",
            path,
            weight=SLOW,
            json=asked([cat], method="integrated_gradients", target_classes=[2], gen_params={"steps": 20}, **npy),
        ),
    ]


def real_cases() -> list[Case]:
    """Valid requests to the embedded model."""
    cat, cup, rocket = photograph("chelsea.png"), photograph("coffee.png"), photograph("rocket.jpg")
    small = photograph("camera.png", 256, "JPEG")
    npy = {"format": "npy", "size": "model"}
    path = heatmap(REAL)
    return [
        case("real: form, overlay", path, files={"image": cat}, data={"top_k": "3"}),
        case("real: classes", path, json=asked([cat], target_classes=[285, "tabby"], top_k=3, **npy)),
        case(
            "real: picture alone", path, content=rocket, headers=JPEG, params={"method": "layer_cam", "format": "gray"}
        ),
        case("real: overlay alone", path, content=cup, headers={**PNG, "accept": "image/png"}),
        case("real: several", path, json=asked([cat, cup, small], method=["grad_cam", "hires_cam"], top_k=1, **npy)),
        case("real: infer", f"/models/{REAL}/infer", files=[("images", cup), ("images", cat)], data={"top_k": "2"}),
        case("real: before the ReLU", path, json=asked([small], top_k=1, gen_params={"scaling": "none"}, **npy)),
        case(
            "real: guided",
            path,
            chaotic=True,
            json=asked([cat], method="guided_grad_cam", target_classes=[282], top_k=1, **npy),
        ),
        case("real: ablation_cam", path, weight=SLOW, json=asked([cat], method="ablation_cam", top_k=1, **npy)),
        case(
            "real: score_cam",
            path,
            weight=SLOW,
            json=asked(
                [cup], method="score_cam", gen_params={"target_conv_layer": "blocks.0.0.conv_pw"}, top_k=1, **npy
            ),
        ),
        case("real: rise", path, weight=SLOW, json=asked([cat], method="rise", gen_params={"n": 48}, top_k=1, **npy)),
        case(
            "real: occlusion",
            path,
            weight=SLOW,
            json=asked([cup], method="occlusion", gen_params={"window": 64, "stride": 40}, top_k=1, **npy),
        ),
    ]


def bad_cases() -> list[Case]:
    """Broken requests, each with the code of its problem."""
    cat = photograph("chelsea.png", 96, "JPEG")
    image, path = text_of(cat), heatmap(TINY)
    form, of_json = {"content-type": "multipart/form-data; boundary=x"}, {"content-type": "application/json"}
    fields: dict[str, tuple[str, dict[str, Any]]] = {
        "unknown field": ("invalid_request", {"metod": "grad_cam"}),
        "no picture": ("invalid_request", {"images": []}),
        "value out of range": ("invalid_request", {"alpha": 2}),
        "unknown method": ("unknown_method", {"method": "gradcam"}),
        "unknown class": ("unknown_class", {"target_classes": ["anr"]}),
        "a name of two classes": ("unknown_class", {"target_classes": ["cat"]}),
        "unknown layer": ("unknown_layer", {"gen_params": {"target_conv_layer": "22"}}),
        "unknown parameter": ("invalid_gen_params", {"gen_params": {"scalling": "none"}}),
        "no picture's bytes": ("undecodable_picture", {"images": [image, "AAAA"]}),
        "an address": ("undecodable_picture", {"images": ["https://example.org/cat.png"]}),
        "truncated picture": ("undecodable_picture", {"images": [text_of(cat[: len(cat) // 2])]}),
        "bomb": ("too_many_pixels", {"images": [text_of(bomb())]}),
        "too many pictures": ("too_many_pictures", {"images": ["AAAA"] * 65}),
    }
    return [
        *(case(name, path, code=code, json={"images": [image], **wrong}) for name, (code, wrong) in fields.items()),
        case("no JSON", path, code="malformed_body", content=b"{", headers=of_json),
        case("NaN", path, code="malformed_body", content=b'{"images": ["AA"], "alpha": NaN}', headers=of_json),
        case("deep JSON", path, code="malformed_body", content=b'{"images": ' + b"[" * 5_000, headers=of_json),
        case("form without end", path, code="malformed_body", content=b"--x\r\n", headers=form),
        case(
            "no media type of ours", path, code="unsupported_media_type", content=b"a", headers={"content-type": "a/b"}
        ),
        case("not acceptable", path, code="not_acceptable", content=cat, headers={**JPEG, "accept": "text/html"}),
        case("no such model", heatmap("tyni"), code="model_not_found", content=cat, headers=JPEG),
        case("no such path", "/metods", code="path_not_found", verb="GET"),
        case("wrong verb", path, code="method_not_allowed", verb="GET"),
    ]


def bomb() -> bytes:
    """A small PNG that declares 50,000 x 50,000 pixels."""
    png = bytearray(file_of(Image.new("L", (8, 8))))
    png[16:24] = struct.pack(">II", 50_000, 50_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


def problem_code(body: bytes) -> str:
    """The code of a problem's body; empty where it is none."""
    try:
        return str(json.loads(body)["code"])
    except (ValueError, KeyError, TypeError):
        return ""
