"""Eigen-CAM against NumPy's singular value decomposition, and the principal component that other methods share."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_grad_cam import EigenCAM
from torch import Tensor

from service.explain.mathematics import principal_component
from tests.methods.cams import eager_64, modular, peer, raw
from tests.nets import SMALL, close_to, deep, images

NAME = "eigen_cam"
CLASSES = [3, 6]


def by_svd(values: NDArray[np.float64], like: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places as rows, channels as centred columns, (N,C,h,w) to (N,h,w); the sign that correlates with `like`."""
    maps = []
    for one, fit in zip(values, like, strict=True):
        rows = one.reshape(len(one), -1).T.astype(np.float64)
        rows = rows - rows.mean(axis=0)
        left, singular, _ = np.linalg.svd(rows, full_matrices=False)
        projected = left[:, 0] * singular[0]
        maps.append((projected * np.sign(projected @ fit.ravel())).reshape(fit.shape))
    return np.stack(maps)


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 5, 7), (2, 40, 3, 5), (1, 12, 3, 4), (1, 1, 4, 4), (1, 8, 1, 2), (3, 2, 30, 30)],
    ids=["more places", "more channels", "as many", "one channel", "two places", "many more places"],
)
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
def test_the_principal_component_is_that_of_numpys_svd(shape: tuple[int, int, int, int], scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = scale * (
        torch.randn(shape, generator=generator) + torch.randn(shape[:2], generator=generator)[..., None, None]
    )
    like = values.sum(dim=1)
    oracle = by_svd(values.double().numpy(), like.double().numpy())
    ours = principal_component(values, like)
    assert ours.dtype == torch.float32
    assert close_to(ours / scale, oracle / scale) < 1e-5
    opposite = principal_component(values, -like)
    assert torch.equal(opposite, -ours), "the sign is that of `like`"


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 40, 3, 5)])
def test_a_constant_has_no_component(shape: tuple[int, int, int, int]) -> None:
    """Channels of different heights, each the same everywhere: 0, and exactly."""
    values = images(1, 4)[0, 0].flatten()[:1] + torch.arange(shape[1])[None, :, None, None] / 7
    values = values.expand(shape).contiguous()
    assert torch.equal(principal_component(values, values.sum(dim=1)), torch.zeros(shape[0], *shape[2:]))


def test_a_constant_picture_leaves_its_neighbours_in_the_batch_alone() -> None:
    values = images(2, 6)
    values[0] = 0.1
    both = principal_component(values, values.sum(dim=1))
    assert not both[0].any()
    assert close_to(both[1:], principal_component(values[1:], values[1:].sum(dim=1))) < 1e-5


@pytest.mark.parametrize(
    ("network", "layer"), [("resnet18", "layer4"), ("resnet18", "layer2"), ("modular", "1"), ("modular", "2")]
)
def test_equals_numpys_svd_of_the_activation(network: str, layer: str) -> None:
    """3 x 3 places of 512 channels, 12 x 12 of 128, 12 x 12 of 6, 6 x 6 of 5."""
    net, program = modular() if network == "modular" else deep(network)
    pictures = images(2, 12 if network == "modular" else SMALL)
    activation = eager_64(net, layer, pictures, CLASSES)[0].numpy()
    ours = raw(NAME, program, layer, pictures, CLASSES)
    assert close_to(ours, by_svd(activation, activation.sum(axis=1))) < 1e-4
    theirs = peer(EigenCAM, net, layer, pictures, CLASSES)
    for one, other in zip(ours, theirs, strict=True):
        assert abs(correlation(one, other)) > 0.9999, "but its sign is left to chance"


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten().double(), other.flatten().double()]))[0, 1])


def test_what_is_active_is_bright() -> None:
    program, pictures = modular()[1], images(4, 12)
    net = modular()[0]
    total = eager_64(net, "3", pictures, [0, 1, 2, 3])[0].sum(dim=1)
    for one, other in zip(raw(NAME, program, "3", pictures, [0, 1, 2, 3]), total, strict=True):
        assert correlation(one, other) > 0.1


def test_knows_nothing_of_the_class_and_of_the_batch() -> None:
    program, pictures = modular()[1], images(2, 12)
    first = raw(NAME, program, "2", pictures, [0, 1])
    assert torch.equal(raw(NAME, program, "2", pictures, [5, 6]), first)
    assert close_to(raw(NAME, program, "2", pictures[1:], [3]), first[1:]) < 1e-5
