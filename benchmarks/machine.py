"""On what a run was made: without this its figures mean little."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "timm", "grad-cam", "torchcam", "captum", "litserve", "fastapi", "pillow")
MATRIX_FLAGS = ("amx_bf16", "amx_tile", "avx512_bf16")


def describe(device: str) -> dict[str, object]:
    """The machine and what is installed, for the record's head."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "bf16 in hardware": ", ".join(_flags()) or "neither AMX nor AVX512-BF16",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _flags() -> list[str]:
    has = _cpuinfo("flags").split()
    return [flag for flag in MATRIX_FLAGS if flag in has]


def _cpuinfo(key: str) -> str:
    """A value of the first processor in /proc/cpuinfo; empty on systems without it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
