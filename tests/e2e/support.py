"""What the end-to-end tests write and read: picture files, requests and decoded heatmaps."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]
RAW: dict[str, Any] = {"format": "npy", "size": "model", "gen_params": {"scaling": "none"}}


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image as a picture file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def resized(picture: bytes, width: int, height: int) -> Image.Image:
    return Image.open(io.BytesIO(picture)).convert("RGB").resize((width, height))


def text_of(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def post(
    client: httpx.Client,
    pictures: bytes | Iterable[bytes],
    model: str = "tiny",
    endpoint: str = "heatmap",
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> httpx.Response:
    """A JSON request."""
    several = [pictures] if isinstance(pictures, bytes) else pictures
    body = {"images": [text_of(picture) for picture in several], **fields}
    return client.post(f"/models/{model}/{endpoint}", json=body, headers=headers)


def results(client: httpx.Client, pictures: bytes | Iterable[bytes], model: str = "tiny", **fields: Any) -> Any:
    """The `results` of a JSON request that succeeds."""
    response = post(client, pictures, model, **fields)
    assert response.status_code == 200, response.text
    return response.json()["results"]


def only(client: httpx.Client, picture: bytes, model: str = "tiny", **fields: Any) -> Any:
    """The only heatmap of a JSON request that succeeds."""
    (result,) = results(client, picture, model, **fields)
    (heatmap,) = result["heatmaps"]
    return heatmap


def data_of(heatmap: Mapping[str, Any]) -> bytes:
    return base64.b64decode(heatmap["data"], validate=True)


def array_of(data: bytes) -> Floats:
    """The array in an npy file."""
    values: Floats = np.load(io.BytesIO(data), allow_pickle=False)
    assert values.dtype == np.float32
    return values


def map_of(heatmap: Mapping[str, Any]) -> Floats:
    assert (heatmap["format"], heatmap["media_type"]) == ("npy", "application/x-npy")
    return array_of(data_of(heatmap))


def image_of(heatmap: Mapping[str, Any]) -> Image.Image:
    """The heatmap's picture, decoded; its format and size are as the answer says."""
    image = Image.open(io.BytesIO(data_of(heatmap)))
    assert image.get_format_mimetype() == heatmap["media_type"]
    assert image.size == (heatmap["width"], heatmap["height"])
    image.load()
    return image


def pixels_of(heatmap: Mapping[str, Any]) -> Floats:
    """The heatmap's pixels as floats, so that differences don't wrap round."""
    return np.asarray(image_of(heatmap)).astype(np.float32)


def same_map(one: Floats, other: Floats, tolerance: float) -> bool:
    """Whether two maps differ by at most `tolerance` of the largest value, and show anything at all."""
    largest = float(np.abs(other).max())
    return largest > 0 and one.shape == other.shape and float(np.abs(one - other).max()) <= tolerance * largest
