"""A model that one picture brings down: an operation inside the network does for real what a solid colour tells it."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import TINY_CODE, TINY_SPEC, write_tiny
from tests.e2e.support import file_of

FAULTY = """
import ctypes, os, signal, time
import torch
from torch import nn

lost = False


@torch.library.custom_op("NAME::touch", mutates_args=())
def touch(images: torch.Tensor) -> torch.Tensor:
    global lost
    for red, green, blue in (images[:, :, 0, 0] * 255).round().int().tolist():
        if (green, blue) != (7, 77):
            continue
        if red == 1:
            ctypes.string_at(0)
        elif red == 2:
            os.abort()
        elif red == 3:
            time.sleep(1000)
        elif red == 4 or red == 5 and len(images) > 1:
            raise torch.OutOfMemoryError("out of memory")
        elif red == 6:
            lost = True
        elif red == 7:
            time.sleep(0.1)
    if lost:
        raise RuntimeError("CUDA error: device-side assert triggered")
    return images.clone()


touch.register_fake(torch.empty_like)
touch.register_autograd(lambda context, gradient: gradient)


class Touched(nn.Module):
    def forward(self, images):
        return torch.ops.NAME.touch(images)
"""

CODE = FAULTY + TINY_CODE.replace("nn.Sequential(", "nn.Sequential(Touched(), ")
SPEC = (
    TINY_SPEC
    + """
mean = [0, 0, 0]
std = [1, 1, 1]
"""
)


class Fault(IntEnum):
    """What a picture makes the network do."""

    SEGFAULT = 1
    ABORT = 2
    HANG = 3
    OUT_OF_MEMORY = 4
    OUT_OF_MEMORY_IN_COMPANY = 5
    LOSE_DEVICE = 6
    TAKE_TIME = 7


def write_fragile(folder: Path) -> None:
    write_tiny(folder, spec=SPEC)
    (folder / "net.py").write_text(CODE.replace("NAME", folder.name))  # operations have names for the whole process


def write_deadly(folder: Path) -> None:
    """A model whose load takes its process along."""
    write_tiny(folder)
    (folder / "net.py").write_text("import ctypes\n\n\ndef build():\n    ctypes.string_at(0)\n")


def picture_of(fault: Fault, size: int = 32) -> bytes:
    """Another size is another file of the same effect."""
    return file_of(Image.new("RGB", (size, size), (fault.value, 7, 77)))


def harmless(number: int) -> bytes:
    """One of many different pictures without effect."""
    return file_of(Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)))
