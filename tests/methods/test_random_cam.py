"""Random CAM: uniform weights from the seed alone."""

import numpy as np
import torch

from tests.methods.cams import eager_64, modular, of_numbers, raw
from tests.nets import close_to, images

NAME = "random_cam"


def test_weighs_each_channel_by_a_number_of_the_seed() -> None:
    net, program = modular()
    pictures = images(2, 12)
    weights = np.random.default_rng(7).uniform(-1, 1, 5)
    oracle = np.einsum("c,nchw->nhw", weights, eager_64(net, "2", pictures, [0, 0])[0].numpy())
    assert close_to(raw(NAME, program, "2", pictures, [0, 0], seed=7), oracle) < 1e-5


def test_knows_nothing_of_the_class_and_of_the_place_in_the_batch() -> None:
    program, pictures = modular()[1], images(2, 12)
    first = raw(NAME, program, "2", pictures, [0, 1])
    assert torch.equal(raw(NAME, program, "2", pictures, [5, 6]), first)
    assert close_to(raw(NAME, program, "2", pictures[1:], [3]), first[1:]) < 1e-5
    assert close_to(raw(NAME, program, "2", pictures, [0, 1], seed=1), first) > 0.1


def test_weights_are_uniform_between_minus_1_and_1() -> None:
    basis = torch.eye(2_500).reshape(1, 2_500, 50, 50)  # channel k is 1 at place k: the map is the weights
    weights = of_numbers(NAME, basis, basis).flatten()
    assert weights.abs().max() <= 1
    shares = torch.histc(weights, 10, -1, 1) / len(weights)
    assert (shares - 0.1).abs().max() < 0.02
