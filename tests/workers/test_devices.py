"""Which workers a `--device` stands for; no test needs a device."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from service.settings import SettingsError
from service.workers import devices
from service.workers.devices import resolve


@pytest.fixture(autouse=True)
def _ask_again() -> Iterator[None]:
    """The number of devices may be remembered."""
    forget = getattr(devices._count_cuda_devices, "cache_clear", lambda: None)
    forget()
    yield
    forget()


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Any:
    def there_are(number: int) -> None:
        monkeypatch.setattr(devices, "_count_cuda_devices", lambda: number)

    return there_are


@pytest.mark.parametrize(
    ("device", "number", "expected"),
    [
        ("cpu", 2, ("cpu",)),
        ("auto", 0, ("cpu",)),
        ("auto", 2, ("cuda:0", "cuda:1")),
        ("cuda", 1, ("cuda:0",)),
        ("cuda:1", 2, ("cuda:1",)),
        ("cuda:1,cuda:0", 2, ("cuda:1", "cuda:0")),
        ("cuda:1,cuda:1", 2, ("cuda:1",)),
    ],
)
def test_devices(count: Any, device: str, number: int, expected: tuple[str, ...]) -> None:
    count(number)
    assert resolve(device) == expected


def test_cuda_that_is_missing(count: Any) -> None:
    count(0)
    with pytest.raises(SettingsError, match=r"--device.*no CUDA device"):
        resolve("cuda")


@pytest.mark.parametrize(("device", "number"), [("cuda:0", 0), ("cuda:2", 2), ("cuda:0,cuda:7", 1)])
def test_a_number_that_no_device_has(count: Any, device: str, number: int) -> None:
    count(number)
    with pytest.raises(SettingsError, match="--device"):
        resolve(device)


def test_without_a_driver_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    assert resolve("auto") == ("cpu",)


@pytest.mark.parametrize(
    ("status", "output", "expected"), [(0, "2\n", ("cuda:0", "cuda:1")), (0, "0\n", ("cpu",)), (1, "", ("cpu",))]
)
def test_with_a_driver_another_process_asks_torch(
    monkeypatch: pytest.MonkeyPatch, status: int, output: str, expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    ended = subprocess.CompletedProcess([], status, stdout=output, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: ended)
    assert resolve("auto") == expected
