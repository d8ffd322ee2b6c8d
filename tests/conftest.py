"""What all tests share: the pictures, a model repository, and one running server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.models.repository import EMBEDDED
from tests.server import Server, running

DATA = Path(__file__).parent / "data"

TINY_CODE = """
import torch
from torch import nn


def build(classes=5):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16 * 16, classes),
    )
    nn.init.normal_(net[-1].weight, 0, 0.02)
    return net
"""

TINY_SPEC = """
architecture = "python:net:build"
weights = "random:0"
labels = "labels.txt"
[input]
size = [32, 32]
fit = "stretch"
"""


def write_tiny(folder: Path, spec: str = TINY_SPEC, labels: str = "ant\nbee\ncat\ndog\ncat\n") -> None:
    """A model of five classes with spatially varying gradients; two of them bear the name 'cat'."""
    folder.mkdir(parents=True)
    (folder / "net.py").write_text(TINY_CODE)
    (folder / "model.toml").write_text(spec)
    (folder / "labels.txt").write_text(labels)


@pytest.fixture(scope="session")
def chelsea() -> bytes:
    """A cat, 451 x 300."""
    return (DATA / "chelsea.png").read_bytes()


@pytest.fixture(scope="session")
def coffee() -> bytes:
    """A cup of espresso, 600 x 400."""
    return (DATA / "coffee.png").read_bytes()


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder of models: the real one, a tiny one, one of another type, one that cannot be loaded."""
    models = tmp_path_factory.mktemp("models")
    (models / "efficientnet_lite0").mkdir()
    spec = (EMBEDDED / "efficientnet_lite0" / "model.toml").read_text()
    (models / "efficientnet_lite0" / "model.toml").write_text(spec)
    write_tiny(models / "tiny")
    write_tiny(models / "detector", spec='type = "detection"\n' + TINY_SPEC)
    write_tiny(models / "broken", labels="ant\nbee\n")
    return models


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as it was."""
    with running(tmp_path_factory.mktemp("server"), "--models", str(repository), "--max-body-bytes", "8388608") as one:
        yield one


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as one:
        yield one


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_outside() -> None:
    for name in [name for name in os.environ if name.startswith("HEATMAP_")]:
        del os.environ[name]
