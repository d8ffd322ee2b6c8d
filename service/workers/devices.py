"""Which devices there are, found out without torch in this process."""

from __future__ import annotations

import ctypes
import subprocess
import sys

from service.settings import SettingsError


def resolve(device: str) -> tuple[str, ...]:
    """The devices that the setting `device` stands for, one worker each.

    `auto` takes every CUDA device, or the CPU where there is none. Raises SettingsError where CUDA is asked for
    and missing.
    """
    if device == "cpu":
        return ("cpu",)
    if device not in ("auto", "cuda"):
        return tuple(dict.fromkeys(device.split(",")))
    count = _count_cuda_devices()
    if not count and device == "cuda":
        raise SettingsError("--device: cuda was asked for, but torch finds no CUDA device")
    return tuple(f"cuda:{index}" for index in range(count)) or ("cpu",)


def _count_cuda_devices() -> int:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver: spare the seconds that torch takes to say so
        return 0
    count = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=False)  # noqa: S603
    return int(found.stdout) if found.returncode == 0 else 0
