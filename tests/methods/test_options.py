"""The options that methods share, each against numbers worked out by hand, NumPy, or float64 autograd.

And several layers in one request.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from service.errors import InvalidGenParams
from service.explain.fusion import fused, heatmap_of
from service.explain.mathematics import principal_component
from service.explain.method import REGISTRY
from service.explain.trace import Pass
from service.models.resident import Model
from service.workers.plan import make_plan
from tests.methods.cams import eager_64, modular, raw
from tests.nets import (
    IMAGENET,
    Dense,
    Varied,
    close_to,
    explain,
    hand,
    hand_picture,
    images,
    model_of,
    pictures,
    program_of,
    request,
    seeded,
    table,
    varied,
)

CLASSES = [3, 6]
BIG = 1e-5 * 50  # what the numbers on paper, the largest of which is below 50, may be off by


@cache
def linear() -> Model:
    return hand()


@cache
def with_relu() -> Model:
    return hand(nn.ReLU())


def on_paper(model: Model, class_id: int, **params: Any) -> NDArray[np.float32]:
    (answer,) = explain(model, request(1, (class_id,), methods=("grad_cam",), gen_params=params), hand_picture())
    return answer.maps[0].values


# --- eigen_smooth


@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("method", ["grad_cam", "layer_cam", "grad_cam_plus_plus"])
def test_eigen_smooth_is_the_first_component_of_the_weighted_activations(method: str, layer: str) -> None:
    net, program = modular()
    shown = images(2, 12)
    activation, gradient, _ = eager_64(net, layer, shown, CLASSES)
    total = activation.sum(dim=(2, 3), keepdim=True)
    weighted = {
        "grad_cam": gradient.mean(dim=(2, 3), keepdim=True) * activation,
        "layer_cam": gradient.relu() * activation,
        "grad_cam_plus_plus": (gradient.relu() / (2 + total * gradient)).sum(dim=(2, 3), keepdim=True) * activation,
    }[method]
    ours = raw(method, program, layer, shown, CLASSES, eigen_smooth=True)
    for one, mine in zip(weighted.numpy(), ours, strict=True):
        rows = one.reshape(len(one), -1).T
        rows = rows - rows.mean(axis=0)
        left, singular, _ = np.linalg.svd(rows, full_matrices=False)
        component = (left[:, 0] * singular[0]).reshape(one.shape[1:])
        component *= np.sign((component * one.sum(axis=0)).sum())  # the sign of the plain map
        assert close_to(mine, component) < 1e-4
        assert close_to(mine, one.sum(axis=0)) > 0.01, "it is no sum over channels"


# --- aug_smooth


@pytest.mark.parametrize("method", ["grad_cam", "eigen_cam"])
def test_aug_smooth_is_the_mean_of_six_passes(method: str) -> None:
    """The network's input times 0.9, 1 and 1.1, each as it is and mirrored; mirrored maps are mirrored back."""
    program, shown = varied(), images(2, 12)
    target = table(program).target("second", True)
    kind = REGISTRY[method]

    def ours(seen: Tensor, **params: Any) -> Tensor:
        backward = Pass(program, seen, [target]).backward(torch.tensor(CLASSES))
        return heatmap_of(kind, backward, [target], kind.Params.model_validate(params))

    maps = []
    for factor in (0.9, 1.0, 1.1):
        maps.append(ours(shown * factor))
        maps.append(
            torch.from_numpy(ours(torch.from_numpy(shown.numpy()[..., ::-1].copy()) * factor).numpy()[..., ::-1].copy())
        )
    answer = ours(shown, aug_smooth=True)
    assert close_to(answer, sum(maps) / torch.tensor(6.0)) < 1e-5
    assert close_to(answer, maps[2]) > 0.01, "one pass is not the mean"
    alone = Pass(program, shown[1:], [target]).backward(torch.tensor(CLASSES[1:]))
    smooth = kind.Params.model_validate({"aug_smooth": True})
    assert close_to(heatmap_of(kind, alone, [target], smooth), answer[1:]) < 1e-5


def test_aug_smooth_equals_float64_of_the_six_passes() -> None:
    net, program = modular()
    shown = images(1, 12)
    target = table(program).target("0", True)
    total = torch.zeros(1, 12, 12, dtype=torch.float64)
    for factor in (0.9, 1.0, 1.1):
        for mirrored in (False, True):
            seen = factor * (shown.flip(3) if mirrored else shown)
            activation, gradient, _ = eager_64(net, "0", seen, [2])
            one = (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1)
            total += (one.flip(2) if mirrored else one) / 6
    kind = REGISTRY["grad_cam"]
    smooth = kind.Params.model_validate({"aug_smooth": True})
    answer = heatmap_of(kind, Pass(program, shown, [target]).backward(torch.tensor([2])), [target], smooth)
    assert close_to(answer, total) < 1e-5


# --- grad_modifier

# Class 0: g is [[1, 0], [0, 1]] and [[-20, 3], [-1, 4]]. Its means: 1/2 and -14/4.
MEANS = {
    None: (2 / 4, -14 / 4),
    "absolute": (2 / 4, 28 / 4),
    "negate": (-2 / 4, 14 / 4),
    "relu": (2 / 4, 7 / 4),
    "invert": (2 / 4, (-1 / 20 + 1 / 3 - 1 + 1 / 4) / 4),  # 0 where g is 0
    "small_values": (2 / 4, (1 / 20 + 1 / 3 + 1 + 1 / 4) / 4),
}


@pytest.mark.parametrize("modifier", MEANS)
def test_grad_modifier_comes_before_the_mean(modifier: str | None) -> None:
    first, second = MEANS[modifier]
    expected = first * np.array([[1, 2], [3, 4]]) + second * np.array([[-2, 2], [2, -2]])
    np.testing.assert_allclose(on_paper(linear(), 0, grad_modifier=modifier), expected, rtol=0, atol=BIG)


# --- backprop_modifier


def test_guided_and_deconv_differ_on_paper() -> None:
    # Class 0 in front of a ReLU: of [[1, 0], [0, 1]] and [[-20, 3], [-1, 4]] the network passes what stands where the
    # activation is positive, guided of that what is positive, deconv what is positive anywhere.
    seen, other = np.array([[1, 2], [3, 4]]), np.array([[-2, 2], [2, -2]])
    model = with_relu()
    weights = {None: (3 - 1) / 4, "guided": 3 / 4, "deconv": (3 + 4) / 4, "rectified": (3 + 4) / 4}
    for modifier, weight in weights.items():
        answer = on_paper(model, 0, backprop_modifier=modifier)
        np.testing.assert_allclose(answer, 0.5 * seen + weight * other, rtol=0, atol=BIG, err_msg=str(modifier))


def test_both_modifiers_together() -> None:
    # deconv first, [[0, 3], [0, 4]], then 1/g: 1/3 + 1/4; channel 0 keeps 1/1 + 1/1
    expected = 0.5 * np.array([[1, 2], [3, 4]]) + (1 / 3 + 1 / 4) / 4 * np.array([[-2, 2], [2, -2]])
    answer = on_paper(with_relu(), 0, backprop_modifier="deconv", grad_modifier="invert")
    np.testing.assert_allclose(answer, expected, rtol=0, atol=BIG)


def backward_by_hand(layer: str, shown: Tensor, classes: list[int], modifier: str) -> tuple[Tensor, Tensor]:
    """A and g of `Varied` at a convolution, layer by layer in float64, without autograd."""
    net = seeded(Varied).double()
    convolutions: dict[str, nn.Module] = {name: net.get_submodule(name) for name in ("first", "second", "third")}
    before: dict[str, Tensor] = {}
    value = shown.double()
    for name, convolution in convolutions.items():
        before[name] = convolution(value)
        value = F.relu(before[name])
    head = net.get_submodule("head")
    gradient = head.get_parameter("weight")[classes].reshape(value.shape)
    for name in ("third", "second", "first"):
        gradient = gradient.clamp(min=0)
        if modifier == "guided":
            gradient = gradient * (before[name] > 0)
        if name == layer:
            break
        stride = 2 if name == "second" else 1
        weight = convolutions[name].get_parameter("weight")
        gradient = F.conv_transpose2d(gradient, weight, stride=stride, padding=1, output_padding=stride - 1)
    return before[layer], gradient


@pytest.mark.parametrize("layer", ["first", "second", "third"])
@pytest.mark.parametrize("modifier", ["guided", "deconv", "rectified"])
def test_backprop_modifier_equals_float64_layer_by_layer(modifier: str, layer: str) -> None:
    shown = images(2, 12)
    activation, gradient = backward_by_hand(layer, shown, CLASSES, modifier)
    oracle = torch.einsum("nc,nchw->nhw", gradient.mean(dim=(2, 3)), activation)
    answer = raw("grad_cam", varied(), layer, shown, CLASSES, backprop_modifier=modifier)
    assert close_to(answer, oracle) < 1e-5
    assert close_to(answer, raw("grad_cam", varied(), layer, shown, CLASSES)) > 0.01


@pytest.mark.parametrize("modifier", ["guided", "deconv"])
def test_other_activations_keep_their_derivative_behind_the_gate(modifier: str) -> None:
    """SiLU on paper: relu(g) times its derivative, s (1 + x (1 - s)) with s the sigmoid of x."""
    values = np.array([[[1, 2], [3, 4]], [[-2, 2], [2, -2]]], np.float64)
    passed = np.maximum([[[1, 0], [0, 1]], [[-20, 3], [-1, 4]]], 0)
    sigmoid = 1 / (1 + np.exp(-values))
    weights = (passed * sigmoid * (1 + values * (1 - sigmoid))).mean(axis=(1, 2))
    expected = np.einsum("c,chw->hw", weights, values)
    answer = on_paper(hand(nn.SiLU()), 0, backprop_modifier=modifier)
    np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# --- several layers


def test_maps_are_upsampled_and_divided_by_their_own_maximum_on_paper() -> None:
    # [[8, 0]] becomes 8 6 2 0, over 8; [[-3, -1]] has no maximum above 0; the third is fine already, over 2.
    maps = [torch.tensor([[[8.0, 0.0]]]), torch.tensor([[[-3.0, -1.0]]]), torch.tensor([[[2.0, 1.0, -4.0, 0.0]]])]
    shown = torch.zeros(1, 3, 1, 4)
    third = np.array([1.0, 0.5, -2.0, 0.0])
    np.testing.assert_allclose(fused(maps, shown)[0, 0], (np.array([1, 0.75, 0.25, 0]) + third) / 3, rtol=1e-6)
    assert not fused(maps[1:2] * 2, shown).any(), "negative everywhere, twice: nothing"
    tiny = [1e-38 * maps[0], 1e30 * maps[2]]  # no map outweighs another
    np.testing.assert_allclose(fused(tiny, shown)[0, 0], (np.array([1, 0.75, 0.25, 0]) + third) / 2, rtol=1e-5)


def test_maps_of_three_channels_are_divided_by_their_largest_absolute_value() -> None:
    first = torch.tensor([1.0, -4.0, 2.0]).reshape(1, 1, 1, 3)
    second = torch.tensor([-5.0, -5.0, -2.5]).reshape(1, 1, 1, 3)
    answer = fused([first, second, 0 * first], torch.zeros(1, 3, 1, 1))
    np.testing.assert_allclose(answer[0, 0, 0], np.array([0.25 - 1, -1 - 1, 0.5 - 0.5]) / 3, rtol=1e-6)


def test_each_picture_of_a_batch_has_its_own_maximum() -> None:
    maps = [torch.tensor([[[2.0, 1.0]], [[0.5, -8.0]]]), torch.tensor([[[-1.0, -1.0]], [[3.0, 3.0]]])]
    answer = fused(maps, torch.zeros(2, 3, 1, 2))
    np.testing.assert_allclose(answer, [[[0.5, 0.25]], [[1.0, -7.5]]], rtol=1e-6)


class Branches(nn.Module):
    """Two convolutions beside each other, whose outputs have different sizes; none depends on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, padding=1)
        self.coarse = nn.Conv2d(3, 4, 3, stride=3)
        self.join = nn.Conv2d(8, 3, 1)
        self.head = nn.Linear(3 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.fine(x))
        coarse = F.relu(self.coarse(x))
        joined = F.relu(self.join(torch.cat([F.max_pool2d(fine, 3), coarse], 1)))
        scores: Tensor = self.head(joined.flatten(1))
        return scores


BUILDS: dict[str, Callable[[], nn.Module]] = {"varied": Varied, "dense": Dense, "branches": Branches}


@cache
def model_named(name: str) -> tuple[nn.Module, Model]:
    net = seeded(BUILDS[name])
    program = varied() if name == "varied" else program_of(net, 12)
    return net, model_of(program, values=IMAGENET)


def upsampled(one: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Bilinear, corners not aligned, one axis after the other by NumPy's own interpolation."""
    for axis in (0, 1):
        cells = one.shape[axis]
        places = (np.arange(size) + 0.5) * cells / size - 0.5
        one = np.apply_along_axis(partial(np.interp, places, np.arange(cells)), axis, one)
    return one


def fused_64(module: nn.Module, layers: list[str], shown: Tensor, class_id: int) -> NDArray[np.float64]:
    total = np.zeros((shown.shape[2], shown.shape[3]))
    for layer in layers:
        activation, gradient, _ = eager_64(module, layer, shown, [class_id])
        one = upsampled((gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1)[0].numpy(), shown.shape[2])
        if one.max() > 0:
            total += one / one.max() / len(layers)
    return total


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("varied", ["first", "second"]),
        ("varied", ["third", "first", "second"]),
        ("dense", ["first", "second", "third"]),
        ("dense", ["third", "second"]),
        ("branches", ["fine", "coarse"]),
        ("branches", ["join", "coarse", "fine"]),
    ],
)
def test_several_layers_are_the_mean_of_maps_each_by_its_own_maximum(name: str, layers: list[str]) -> None:
    """In a batch of two pictures, one with two classes, beside a method that reads one layer."""
    net, model = model_named(name)
    fitted = pictures(2, 12)
    params = {"target_conv_layer": layers}
    asked = request(2, (1, 4), (2,), methods=("grad_cam", "layer_cam"), gen_params={"grad_cam": params})
    both = explain(model, asked, fitted)
    shown = model.normalise(fitted)
    for index, answer in enumerate(both):
        several = [one for one in answer.maps if one.task.method.name == "grad_cam"]
        assert [one.class_id for one in several] == [[1, 4], [2]][index]
        for one in several:
            assert one.task.effective["target_conv_layer"] == layers
            assert close_to(one.values, fused_64(net, layers, shown[index : index + 1], one.class_id)) < 1e-5
        single = next(one for one in answer.maps if one.task.method.name == "layer_cam")
        (alone,) = explain(model, request(1, (single.class_id,), methods=("layer_cam",)), fitted[index : index + 1])
        assert close_to(single.values, alone.maps[0].values) < 1e-5


def test_a_layer_whose_map_is_negative_counts_as_0() -> None:
    """Class 1 behind a head that is negative everywhere: the map of the last layer is no more than 0."""
    net = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 2))
    )
    with torch.no_grad():
        weight = net.get_submodule("4").get_parameter("weight")
        weight[1] = -weight[1].abs()
    model, fitted = model_of(program_of(net, 12), values=IMAGENET), pictures(1, 12)
    params = {"target_conv_layer": ["0", "2"]}
    (answer,) = explain(model, request(1, (1,), methods=("grad_cam",), gen_params=params), fitted)
    shown = model.normalise(fitted)
    last = raw("grad_cam", model.program, "2", shown, [1])
    assert last.max() <= 0
    assert last.min() < 0
    assert close_to(answer.maps[0].values, fused_64(net, ["0", "2"], shown, 1)) < 1e-5
    assert answer.maps[0].values.max() == pytest.approx(0.5), "the mean with nothing"


def test_a_method_of_three_channels_takes_several_layers() -> None:
    model, fitted = model_named("varied")[1], pictures(1, 12)
    layers = ["first", "third"]
    singly = []
    for layer in layers:
        asked = request(1, (3,), methods=("guided_grad_cam",), gen_params={"target_conv_layer": layer})
        (answer,) = explain(model, asked, fitted)
        singly.append(answer.maps[0].values.astype(np.float64))
        assert singly[-1].any()
    asked = request(1, (3,), methods=("guided_grad_cam",), gen_params={"target_conv_layer": layers})
    (answer,) = explain(model, asked, fitted)
    assert answer.maps[0].values.shape == (12, 12, 3)
    assert close_to(answer.maps[0].values, sum(one / np.abs(one).max() for one in singly) / 2) < 1e-5


def test_the_same_layer_twice_counts_once() -> None:
    model = model_named("varied")[1]
    twice, once = (
        make_plan(request(1, methods=("grad_cam",), gen_params={"target_conv_layer": layers}), model).tasks[0]
        for layers in (["first", "first"], "first")
    )
    assert [target.name for target in twice.targets] == ["first"]
    assert twice == once
    with pytest.raises(InvalidGenParams):
        make_plan(request(1, methods=("grad_cam",), gen_params={"target_conv_layer": []}), model)


def test_options_and_several_layers_go_together() -> None:
    """aug_smooth is within each layer: its mean first, then its maximum."""
    model, fitted = model_named("branches")[1], pictures(1, 12)
    layers = ["fine", "coarse"]
    options = {"aug_smooth": True, "eigen_smooth": True, "grad_modifier": "absolute"}
    maps = []
    for layer in layers:
        asked = request(1, (2,), methods=("grad_cam",), gen_params={"target_conv_layer": layer, **options})
        (answer,) = explain(model, asked, fitted)
        one = upsampled(answer.maps[0].values.astype(np.float64), 12)
        assert one.max() > 0
        maps.append(one / one.max())
    asked = request(1, (2,), methods=("grad_cam",), gen_params={"target_conv_layer": layers, **options})
    (answer,) = explain(model, asked, fitted)
    assert close_to(answer.maps[0].values, sum(maps) / 2) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_picture_that_is_not_finite_has_no_component_and_leaves_its_mates_alone(bad: float) -> None:
    values = images(3, 6)
    values[1, 2, 3, 3] = bad
    found = principal_component(values, like=values.sum(dim=1))
    assert found[1].isnan().all()
    alone = principal_component(values[::2], like=values[::2].sum(dim=1))
    assert close_to(found[::2], alone) < 1e-6
