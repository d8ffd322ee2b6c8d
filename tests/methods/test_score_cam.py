"""Score-CAM against numbers worked out by hand and a plain loop in float64, and why its peers differ."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytorch_grad_cam import ScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional as F
from torchcam.methods import ScoreCAM as TorchScoreCam
from torchvision.models import SwinTransformer, VisionTransformer

from service.explain.mathematics import masking_scores, upsample
from service.explain.means import Means
from service.explain.method import CamParams
from service.explain.trace import Pass, Trace
from service.methods.score_cam import ScoreCam
from service.models.program import Program
from tests.nets import (
    SMALL,
    Varied,
    close_to,
    deep,
    explain,
    hand,
    hand_picture,
    images,
    peer_copy,
    program_of,
    request,
    seeded,
    table,
    trace_of,
    varied,
)

CLASSES = [1, 6]
STRONG = 100.0
"""What pictures are multiplied by, so that confidences differ and weights are not all the same."""


def traced(program: Program, layer: str, pictures: Tensor, classes: list[int]) -> Trace:
    return trace_of(program, pictures, table(program).target(layer, True), classes)


def ours(program: Program, layer: str, pictures: Tensor, classes: list[int]) -> Tensor:
    return ScoreCam().heatmap(traced(program, layer, pictures, classes), CamParams())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_equals_the_numbers_on_paper() -> None:
    # Masks [[0, 1/3], [2/3, 1]] and [[0, 1], [1, 0]]. Masked by the first, red is [[0, 2/3], [2, 4]] and green minus
    # blue [[0, 2/3], [4/3, -2]]: logits -10/3 and -4/3. By the second: [[0, 2], [3, 0]] twice but for a 2: 4 and 11.
    scores = [sigmoid(-2) - 0.5, sigmoid(-7) - 0.5]
    first = sigmoid(scores[0] - scores[1])
    expected = first * np.array([[1, 2], [3, 4]]) + (1 - first) * np.array([[-2, 2], [2, -2]])
    (answer,) = explain(hand(), request(1, (0,), methods=("score_cam",)), hand_picture())
    np.testing.assert_allclose(answer.maps[0].values, expected, rtol=0, atol=1e-5 * 4)
    assert answer.maps[0].values.dtype == np.float32


def probability(logits: Tensor) -> Tensor:
    return logits.softmax(dim=0)


def mask_of(maps: Tensor, size: torch.Size) -> Tensor:
    """A feature map (h,w) as a mask (H,W)."""
    if maps.min() == maps.max():
        return maps.new_zeros(size)
    mask = F.interpolate(maps[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    return (mask - mask.min()) / (mask.max() - mask.min())


def oracle_64(
    module: nn.Module,
    layer: str,
    pictures: Tensor,
    classes: list[int],
    score: Callable[[Tensor], Tensor] = probability,
    mask: Callable[[Tensor, torch.Size], Tensor] = mask_of,
    fold: Callable[[Tensor], Tensor] = lambda value: value,
) -> tuple[Tensor, Tensor]:
    """Score-CAM by a plain loop in float64 on an eager copy: scores (N,C) and maps (N,h,w)."""
    twin = peer_copy(module, torch.float64).requires_grad_(False)
    seen: list[Tensor] = []
    with twin.get_submodule(layer).register_forward_hook(lambda *args: seen.append(args[2].clone())):
        twin(pictures.double())
    activation = fold(seen[0])
    scores = torch.zeros(activation.shape[:2], dtype=torch.float64)
    for n, (picture, number) in enumerate(zip(pictures.double(), classes, strict=True)):
        nothing = score(twin(torch.zeros_like(picture)[None])[0])[number]
        for k, channel in enumerate(activation[n]):
            masked = picture * mask(channel, picture.shape[1:])
            scores[n, k] = score(twin(masked[None])[0])[number] - nothing
    return scores, torch.einsum("nk,nkhw->nhw", scores.softmax(dim=1), activation)


@pytest.mark.parametrize("layer", ["first", "second", "third"])
def test_equals_a_plain_loop_in_float64(layer: str) -> None:
    pictures = STRONG * images(2, 12)
    scores, maps = oracle_64(seeded(Varied), layer, pictures, CLASSES)
    assert scores.std(dim=1).max() > 0.01, "weights that are all the same prove little"
    trace = traced(varied(), layer, pictures, CLASSES)
    assert close_to(masking_scores(trace, trace.activation), scores) < 1e-5
    assert close_to(ScoreCam().heatmap(trace, CamParams()), maps) < 1e-5


def test_equals_the_loop_on_a_deep_network() -> None:
    """Eight channels of it: in float64 they take long enough."""
    net, program = deep("resnet18")
    pictures = STRONG * images(1, SMALL)
    scores, _ = oracle_64(net, "layer4.1.bn2", pictures, [3], fold=lambda value: value[:, :8])
    trace = traced(program, "layer4.1.conv2", pictures, [3])
    assert close_to(masking_scores(trace, trace.activation[:, :8]), scores) < 1e-4


def vit() -> nn.Module:
    net: nn.Module = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=16, num_classes=7)
    return net


def swin() -> nn.Module:
    net: nn.Module = SwinTransformer([4, 4], 12, depths=[1, 1], num_heads=[2, 2], window_size=[4, 4], num_classes=7)
    return net


def test_equals_the_loop_on_tokens() -> None:
    net = seeded(vit)
    pictures = STRONG * images(2, 32)
    layer = "encoder.layers.encoder_layer_0"
    scores, maps = oracle_64(net, layer, pictures, CLASSES, fold=lambda x: x[:, 1:].mT.reshape(2, 12, 4, 4))
    trace = traced(program_of(net, 32), layer, pictures, CLASSES)
    assert close_to(masking_scores(trace, trace.activation), scores) < 1e-4
    assert close_to(ScoreCam().heatmap(trace, CamParams()), maps) < 1e-5


def test_equals_the_loop_with_channels_last() -> None:
    net = seeded(swin)
    pictures = STRONG * images(2, 32)
    scores, maps = oracle_64(net, "features.1", pictures, CLASSES, fold=lambda x: x.movedim(3, 1))
    trace = traced(program_of(net, 32), "features.1", pictures, CLASSES)
    assert close_to(masking_scores(trace, trace.activation), scores) < 1e-4
    assert close_to(ScoreCam().heatmap(trace, CamParams()), maps) < 1e-4  # channels nearly cancel


def test_a_constant_channel_scores_nothing_and_costs_no_pass() -> None:
    """Upsampled, a constant differs from place to place by roundings, which a scaling to 0..1 would make a mask."""
    maps = torch.randn(1, 5, 5, 5, generator=torch.Generator().manual_seed(0))
    maps[0, 2] = 0.1
    upsampled = upsample(maps[0], like=images(1, 12))
    assert upsampled[2].min() < upsampled[2].max(), "no roundings: this proves nothing"
    net = seeded(Varied)
    shown: list[int] = []

    def predict(images: Tensor) -> Tensor:
        shown.append(len(images))
        with torch.no_grad():
            logits: Tensor = net(images)
            return logits

    target = table(varied()).target("second", True)
    one = Pass(varied(), STRONG * images(1, 12), [target], means=Means(predict, chunk=3))
    scores = masking_scores(one.backward(torch.tensor([1])).trace(target), maps)
    assert scores[0, 2] == 0
    assert (scores != 0).sum() == 4
    assert shown == [1, 3, 1], "the zero image, and four channels by three"


def test_alone_equals_in_a_batch_and_in_chunks_of_any_size() -> None:
    pictures = STRONG * images(3, 12)
    target = table(varied()).target("second", True)
    both = ours(varied(), "second", pictures, [1, 6, 1])
    for index, number in enumerate([1, 6, 1]):
        one = Pass(varied(), pictures[index : index + 1], [target], means=Means(chunk=2))
        alone = ScoreCam().heatmap(one.backward(torch.tensor([number])).trace(target), CamParams())
        assert close_to(alone, both[index : index + 1]) < 1e-5


def test_serves_every_layer() -> None:
    assert ScoreCam().refusal(varied(), table(varied()).target("second", True)) is None


def logit(logits: Tensor) -> Tensor:
    return logits


def aligned(maps: Tensor, size: torch.Size) -> Tensor:
    """As pytorch-grad-cam upsamples: corner to corner."""
    mask = F.interpolate(maps[None, None], size, mode="bilinear", align_corners=True)[0, 0]
    return (mask - mask.min()) / (mask.max() - mask.min())


def scaled_first(maps: Tensor, size: torch.Size) -> Tensor:
    """As torch-cam makes masks: scaled before they are upsampled, so that they need not reach 0 and 1."""
    scaled = (maps - maps.min()) / (maps.max() - maps.min())
    mask: Tensor = F.interpolate(scaled[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    return mask


def pytorch_grad_cam(net: nn.Module, layer: str, pictures: Tensor, classes: list[int]) -> Tensor:
    """Its weights, (N,C)."""
    twin = peer_copy(net)
    targets = [ClassifierOutputTarget(number) for number in classes]
    with ScoreCAM(twin, [twin.get_submodule(layer)]) as cam:
        cam(pictures, targets)
        activation = cam.activations_and_grads.activations[0].numpy()
        return torch.from_numpy(cam.get_cam_weights(pictures, twin.get_submodule(layer), targets, activation, None))


def torch_cam(net: nn.Module, layer: str, pictures: Tensor, classes: list[int]) -> Tensor:
    twin = peer_copy(net)
    with TorchScoreCam(twin, layer, input_shape=(3, 12, 12)) as cam:
        twin(pictures)
        (weights,) = cam._get_weights(classes)
    answer: Tensor = weights
    return answer


@pytest.mark.parametrize(("peer", "mask"), [(pytorch_grad_cam, aligned), (torch_cam, scaled_first)])
def test_peers_take_logits_and_make_other_masks(
    peer: Callable[[nn.Module, str, Tensor, list[int]], Tensor], mask: Callable[[Tensor, torch.Size], Tensor]
) -> None:
    """With their choices put into the plain loop it gives their weights; these are far from the paper's."""
    net = seeded(Varied)
    pictures = images(2, 12)
    theirs = peer(net, "second", pictures, CLASSES)
    like_them, _ = oracle_64(net, "second", pictures, CLASSES, logit, mask)
    assert close_to(theirs, like_them.softmax(dim=1)) < 1e-5
    paper, _ = oracle_64(net, "second", pictures, CLASSES)
    uniform = 1 / theirs.shape[1]
    assert close_to(theirs - uniform, paper.softmax(dim=1) - uniform) > 0.5


class Shifted(nn.Module):
    """`Varied`, and something in the picture that raises the logits of all classes alike: no confidence changes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Varied()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x) + x[:, 0].relu().mean(dim=(1, 2))[:, None]
        return scores


def test_what_raises_all_classes_alike_is_no_evidence_for_one() -> None:
    """The paper's probability is right: logits, as the peers have them, make a map of what says nothing of a class."""
    plain, shifted = seeded(Varied), seeded(Shifted)
    pictures = STRONG * images(2, 12)
    before = ours(varied(), "second", pictures, CLASSES)
    after = ours(program_of(shifted, 12), "net.second", pictures, CLASSES)
    assert close_to(after, before) < 1e-5
    theirs = [
        pytorch_grad_cam(net, layer, pictures, CLASSES) for net, layer in ((plain, "second"), (shifted, "net.second"))
    ]
    assert close_to(theirs[1], theirs[0]) > 0.1
