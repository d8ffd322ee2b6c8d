"""Which devices there are, found out without torch in this process."""

from __future__ import annotations

import ctypes
import functools
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
    found = tuple(f"cuda:{index}" for index in range(_count_cuda_devices()))
    if device == "auto":
        return found or ("cpu",)
    asked = found or ("cuda",) if device == "cuda" else tuple(dict.fromkeys(device.split(",")))
    for name in asked:
        if name not in found:
            has = ", ".join(found) or "no CUDA device"
            raise SettingsError(f"--device: {name} was asked for, but torch finds {has}")
    return asked


@functools.cache
def _count_cuda_devices() -> int:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver: spare the seconds that torch takes to say so
        return 0
    count = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=False)  # noqa: S603
    return int(found.stdout) if found.returncode == 0 else 0
