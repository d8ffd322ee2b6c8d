"""What both HTTP peers do around pytorch-grad-cam: a JPEG in; classes and an overlay at its original size out."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pytorch_grad_cam.utils.image import show_cam_on_image
from torch import Tensor
from torchvision import transforms

from benchmarks.networks import RESIZE, SIDE, Network

TOP = 5


@dataclass(frozen=True)
class Picture:
    """A decoded picture, uint8 (H,W,3), and the network's input (3,h,w)."""

    rgb: NDArray[np.uint8]
    tensor: Tensor


def preprocessing(network: Network) -> Callable[[Image.Image], Tensor]:
    """torchvision's usual chain for evaluation."""
    chain: Callable[[Image.Image], Tensor] = transforms.Compose(
        [
            transforms.Resize(RESIZE, transforms.InterpolationMode(network.interpolation)),
            transforms.CenterCrop(SIDE),
            transforms.ToTensor(),
            transforms.Normalize(network.mean, network.std),
        ]
    )
    return chain


def decode(data: bytes, prepare: Callable[[Image.Image], Tensor]) -> Picture:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return Picture(np.asarray(image), prepare(image))


def answer(picture: Picture, cam: NDArray[np.float32], confidences: Tensor, png_level: int) -> dict[str, Any]:
    """The five most confident classes, and the map (h,w) over the part of the picture that the network saw."""
    height, width = picture.rgb.shape[:2]
    side = round(SIDE / RESIZE * min(height, width))
    top, left = (height - side) // 2, (width - side) // 2
    mask = np.zeros((height, width), np.float32)
    mask[top : top + side, left : left + side] = cv2.resize(cam, (side, side))
    overlay = show_cam_on_image(np.float32(picture.rgb) / 255, mask, use_rgb=True)
    file = io.BytesIO()
    Image.fromarray(overlay).save(file, "PNG", compress_level=png_level)
    values, ids = confidences.topk(TOP)
    classes = [
        {"class_id": class_id, "confidence": confidence}
        for class_id, confidence in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return {"classes": classes, "overlay": b64encode(file.getvalue()).decode()}
