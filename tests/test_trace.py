"""Reruns with other activations and other images, in chunks that fit; and the grids that activations are folded by."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import Permute

import service.explain.trace as module
from service.explain.means import Means, is_out_of_memory
from service.explain.trace import Pass, Trace
from service.models.grids import Grid
from service.models.program import Program
from tests.nets import (
    SMALL,
    Dense,
    close_to,
    deep,
    hand,
    hand_picture,
    images,
    program_of,
    residual,
    seeded,
    table,
    trace_of,
    varied,
)

CLASSES = [1, 4]


class Windows(nn.Module):
    """Pictures are cut into windows beside the batch; these cross a cut at `second`, whose value is cut likewise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        both = self.cut(x).relu() * self.cut(self.second(x))
        scores: Tensor = self.head(both.reshape(-1, 4, 4 * 16).mean(dim=1))
        return scores

    def cut(self, value: Tensor) -> Tensor:
        """Four windows of 4 x 4 for each picture of 8 x 8, (4N,C,4,4)."""
        parts = value.reshape(-1, 4, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5)
        return parts.reshape(-1, 4, 4, 4)


def traced(program: Program, layer: str, pictures: Tensor, means: Means | None = None) -> Trace:
    target = table(program).target(layer, True)
    return Pass(program, pictures, [target], means=means).backward(torch.tensor(CLASSES)).trace(target)


def repeated(trace: Trace, picture: int) -> Callable[[slice], Tensor]:
    """The layer's own activation of one picture, for every row."""
    own = trace.activation[picture]
    return lambda rows: own.expand(rows.stop - rows.start, *own.shape)


def own_scores(trace: Trace, count: int = 3) -> Tensor:
    """The scores (N,count) with the layer's own activations."""
    return torch.stack([trace.scores_with(index, count, repeated(trace, index)) for index in range(len(CLASSES))])


def eager_scores(net: nn.Module, pictures: Tensor, count: int = 3) -> Tensor:
    with torch.no_grad():
        scores: Tensor = net(pictures)[range(len(CLASSES)), CLASSES]
    return scores[:, None].expand(-1, count)


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        ("resnet18", "layer4.1.conv2"),  # the shortcut crosses
        ("densenet121", "features.denseblock4.denselayer15.conv2"),  # and all layers before
        ("swin_t", "features.5.0"),  # channels last
        ("swin_t", "features.5.0.mlp.0"),
        ("vit_b_32", "encoder.layers.encoder_layer_10"),  # tokens with a prefix
        ("vit_b_32", "encoder.layers.encoder_layer_10.mlp.0"),
    ],
)
def test_the_layer_s_own_activation_gives_the_score(network: str, layer: str) -> None:
    net, program = deep(network)
    pictures = images(2, SMALL)
    assert close_to(own_scores(traced(program, layer, pictures)), eager_scores(net, pictures)) < 1e-5


@pytest.mark.parametrize("layer", ["first", "second", "third"])
def test_the_same_where_earlier_layers_are_concatenated(layer: str) -> None:
    net, pictures = seeded(Dense), images(2, 12)
    program = program_of(net, 12)
    crossing = program.split(table(program).target(layer, True).node).crossing
    assert len(crossing) == ["first", "second", "third"].index(layer), "this is about values that cross the cut"
    assert close_to(own_scores(traced(program, layer, pictures)), eager_scores(net, pictures)) < 1e-5


def test_the_same_where_what_crosses_the_cut_is_not_separable_by_picture() -> None:
    net, pictures = seeded(Windows), images(2, 8)
    program = program_of(net, 8)
    trace = traced(program, "second", pictures)
    (crossing,) = program.split(trace.target.node).crossing
    assert not program.is_batched(crossing)
    assert close_to(own_scores(trace, 7), eager_scores(net, pictures, 7)) < 1e-5


class Flattened(nn.Module):
    """Views merge the batch with the places of a value whose channels are last, in memory too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1))
        x = self.linear(x.reshape(-1, 4)).relu().reshape(-1, 64, 4)
        scores: Tensor = self.head(x.amax(dim=1))
        return scores


class Permuted(nn.Module):
    """The channels are last, but not in memory: what permutes them back may be viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Permute([0, 2, 3, 1]))
        self.head = nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.last(x).permute(0, 3, 1, 2).reshape(-1, 4 * 64))
        return scores


@pytest.mark.parametrize(("build", "layer"), [(Flattened, "norm"), (Permuted, "last")])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_same_however_the_activations_lie_in_memory(
    build: type[nn.Module], layer: str, layout: torch.memory_format
) -> None:
    net, pictures = seeded(build), images(2, 8)
    trace = traced(program_of(net, 8), layer, pictures)
    own = trace.activation[:1].expand(3, -1, -1, -1)
    scores = trace.scores_with(0, 3, lambda rows: own[rows].contiguous(memory_format=layout))
    assert close_to(scores, eager_scores(net, pictures)[0]) < 1e-5


def test_the_same_beside_other_layers() -> None:
    pictures = images(2, 12)
    first, last = (table(residual()).target(name, True) for name in ("conv", "last"))
    backward = Pass(residual(), pictures, [first, last]).backward(torch.tensor(CLASSES))
    oracle = eager_scores(residual().network(), pictures)
    for target in (first, last):
        assert close_to(own_scores(backward.trace(target)), oracle) < 1e-5


def test_other_activations_give_the_scores_on_paper() -> None:
    # The first channel adds 1 + 4 to the score of class 0, the second 36; twice the first and nothing else adds 10.
    model = hand()
    pictures = model.normalise(hand_picture())
    trace = trace_of(model.program, pictures, model.layers.target(None, True), [0])
    own = trace.activation[0]
    factors = torch.tensor([[1.0, 1], [0, 1], [1, 0], [2, 0], [0, 0]])[:, :, None, None]
    assert (
        close_to(trace.scores_with(0, 5, lambda rows: factors[rows] * own), torch.tensor([41.0, 36, 5, 10, 0])) < 1e-6
    )


def altered(count: int, like: Tensor) -> Tensor:
    """Activations that are all different, (count,C,h,w)."""
    return like * torch.arange(1, count + 1)[:, None, None, None]


def test_rows_come_in_order_and_in_chunks_of_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traced(varied(), "second", images(2, 12))
    made = altered(7, trace.activation[1])
    asked: list[slice] = []

    def activations(rows: slice) -> Tensor:
        asked.append(rows)
        return made[rows]

    at_once = trace.scores_with(1, 7, activations)
    monkeypatch.setattr(module, "TAIL_BYTES", 3 * trace.activation[1].nbytes)
    in_threes = trace.scores_with(1, 7, activations)
    assert asked == [slice(0, 7), slice(0, 3), slice(3, 6), slice(6, 7)]
    assert len(set(at_once.tolist())) == 7
    assert close_to(in_threes, at_once) < 1e-6
    monkeypatch.setattr(module, "TAIL_BYTES", 1)
    assert close_to(trace.scores_with(1, 7, activations), at_once) < 1e-6


def test_too_little_memory_for_a_chunk_changes_no_score() -> None:
    trace = traced(varied(), "second", images(2, 12))
    made = altered(7, trace.activation[0])

    def activations(rows: slice) -> Tensor:
        if rows.stop - rows.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made[rows]

    scores = trace.scores_with(0, 7, activations)
    assert close_to(scores, trace.scores_with(0, 7, lambda rows: made[rows])) < 1e-6


def test_scores_with_other_activations_build_no_graph() -> None:
    trace = traced(varied(), "second", images(2, 12))
    assert not trace.scores_with(0, 2, repeated(trace, 0)).requires_grad


def test_other_images_of_a_picture_have_its_class_and_run_by_the_fastest_means() -> None:
    asked: list[int] = []

    def predict(shown: Tensor) -> Tensor:
        asked.append(len(shown))
        return shown.flatten(1)[:, :7]

    trace = traced(varied(), "second", images(2, 12), Means(predict))
    others = images(5, 12, seed=1)
    assert torch.equal(trace.at(others, picture=1).score, others.flatten(1)[:, CLASSES[1]])
    assert torch.equal(trace.at(others[:2]).score, others[:2].flatten(1)[range(2), CLASSES])
    assert asked == [5, 2]


def sizes(rows: list[slice]) -> list[tuple[int, int]]:
    return [(one.start, one.stop) for one in rows]


def test_chunks_are_halved_where_memory_is_too_small_and_stay_small() -> None:
    tried: list[slice] = []

    def run(rows: slice) -> list[int]:
        tried.append(rows)
        if rows.stop - rows.start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(rows.start, rows.stop))

    done = Means(chunk=8).in_chunks(10, run)
    assert [number for part in done for number in part] == list(range(10))
    assert sizes(tried) == [(0, 8), (0, 4), (0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]


def test_a_chunk_s_own_size_counts_before_the_common_one() -> None:
    assert sizes(Means(chunk=2).in_chunks(5, lambda rows: rows, chunk=4)) == [(0, 4), (4, 5)]
    assert sizes(Means(chunk=2).in_chunks(3, lambda rows: rows)) == [(0, 2), (2, 3)]
    assert Means().in_chunks(0, lambda rows: rows) == []


def test_one_row_for_which_there_is_no_memory_is_an_error() -> None:
    tried: list[slice] = []

    def run(rows: slice) -> None:
        tried.append(rows)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Means(chunk=3).in_chunks(3, run)
    assert sizes(tried) == [(0, 3), (0, 1)]


def test_other_errors_are_not_tried_again() -> None:
    tried: list[slice] = []

    def run(rows: slice) -> None:
        tried.append(rows)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        Means(chunk=4).in_chunks(4, run)
    assert len(tried) == 1


def test_what_a_failed_chunk_had_made_is_free_before_the_next() -> None:
    made: list[weakref.ref[Tensor]] = []

    def run(rows: slice) -> None:
        assert all(one() is None for one in made), "the halves would find no memory either"
        tensor = torch.zeros(3)
        made.append(weakref.ref(tensor))
        if rows.stop - rows.start > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    Means(chunk=4).in_chunks(4, run)
    assert len(made) == 6


class Cancelled(Exception):
    pass


def test_a_cancellation_is_noticed_between_chunks() -> None:
    done: list[slice] = []

    def check() -> None:
        if len(done) == 2:
            raise Cancelled

    trace = traced(varied(), "second", images(2, 12), Means(chunk=1, check=check))
    with pytest.raises(Cancelled):
        trace.in_chunks(9, done.append)
    assert sizes(done) == [(0, 1), (1, 2)]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_counts_as_too_little_memory(error: RuntimeError, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_host_s_own_refusal_counts() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("grid", "shape"),
    [
        (Grid(3, 4, channel_axis=1), (2, 5, 3, 4)),
        (Grid(3, 4, channel_axis=3), (2, 3, 4, 5)),
        (Grid(3, 4, channel_axis=2, prefix=0), (2, 12, 5)),
        (Grid(3, 4, channel_axis=2, prefix=2), (2, 14, 5)),
    ],
)
def test_unfolding_is_the_inverse_of_folding(grid: Grid, shape: tuple[int, ...]) -> None:
    value = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    folded = grid.fold(value)
    assert folded.shape == (2, 5, 3, 4)
    assert torch.equal(grid.unfold(folded, value), value)
    # The channel stays the channel, and a place its place.
    changed = folded.clone()
    changed[1, 4, 2, 1] = -1
    place: dict[int | None, tuple[Any, ...]] = {1: (1, 4, 2, 1), 3: (1, 2, 1, 4)}
    token = (1, (grid.prefix or 0) + 2 * 4 + 1, 4)
    expected = value.clone()
    expected[token if grid.prefix is not None else place[grid.channel_axis]] = -1
    assert torch.equal(grid.unfold(changed, value), expected)
