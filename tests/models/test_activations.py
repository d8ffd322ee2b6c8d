"""Kept activations: what runs again, what is dropped, and that nobody sees another's values."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from service.models.activations import ActivationCache, Values
from service.models.heads import Heads
from service.models.layers import LayerTable
from service.models.program import Program
from service.models.resident import Model
from service.workers.messages import ExplainRequest
from tests.nets import IMAGENET, Dense, explain, model_of, pictures, program_of, request, seeded, varied

KEY = ("net", "conv", "fp32")
A, B, C, D = range(4)


class Counting:
    """A head of two values, of 12 and 4 bytes: three times the picture's first pixel, and its red."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self._lock = threading.Lock()

    def __call__(self, images: Tensor) -> Values:
        with self._lock:
            self.runs.append(images[:, 0, 0, 0].int().tolist())
        return 3 * images[:, :, 0, 0], images[:, 0, 0, 0].clone()


BYTES = 16


def shown(*names: int) -> tuple[NDArray[np.uint8], Tensor]:
    """Pictures of one pixel, (10 n, 10 n + 1, 10 n + 2), and the images that are made of them."""
    fitted = np.array([[[[10 * name, 10 * name + 1, 10 * name + 2]]] for name in names], np.uint8)
    return fitted, torch.from_numpy(fitted).movedim(3, 1).float()


def ask(cache: ActivationCache, head: Callable[[Tensor], Values], *names: int, key: tuple[str, ...] = KEY) -> None:
    """Ask for pictures, and compare what comes with the numbers."""
    triple, red = cache.values(key, *shown(*names), head)
    assert triple.tolist() == [[30 * name, 30 * name + 3, 30 * name + 6] for name in names]
    assert red.tolist() == [10 * name for name in names]


def test_a_picture_is_run_once() -> None:
    cache, head = ActivationCache(1000), Counting()
    ask(cache, head, A)
    ask(cache, head, A)
    ask(cache, head, A, A)
    assert head.runs == [[0]]


def test_only_what_is_missing_is_run_and_the_order_is_kept() -> None:
    cache, head = ActivationCache(1000), Counting()
    ask(cache, head, B, D)
    ask(cache, head, A, B, C, D)
    ask(cache, head, D, C, B, A, B)
    ask(cache, head, D, 5, A, 6)
    assert head.runs == [[10, 30], [0, 20], [50, 60]]


@pytest.mark.parametrize("other", [("net", "conv", "bf16"), ("net", "conv2", "fp32"), ("net2", "conv", "fp32")])
def test_another_key_has_values_of_its_own(other: tuple[str, ...]) -> None:
    cache, head, negative = ActivationCache(1000), Counting(), Counting()
    ask(cache, head, A, B)
    (triple,) = cache.values(other, *shown(A, B), lambda images: (-negative(images)[0],))
    assert triple.tolist() == [[0, -3, -6], [-30, -33, -36]]
    assert negative.runs == head.runs == [[0, 10]]
    ask(cache, head, A, B)
    assert head.runs == [[0, 10]]


@pytest.mark.parametrize("differing", [(0, 0, 0), (1, 2, 1), (2, 0, 2)])
def test_pictures_that_differ_in_one_level_are_different(differing: tuple[int, int, int]) -> None:
    cache, head = ActivationCache(10_000), Counting()
    one = pictures(1, 3)
    other = one.copy()
    other[0][differing] ^= 1
    for picture in (one, other, one, other):
        cache.values(KEY, picture, torch.from_numpy(picture).movedim(3, 1).float(), head)
    assert len(head.runs) == 2


def test_zero_bytes_keep_nothing() -> None:
    cache, head = ActivationCache(0), Counting()
    ask(cache, head, A)
    ask(cache, head, A, B)
    assert head.runs == [[0], [0, 10]]


def test_the_least_recently_used_leave_first_and_the_bound_is_exact() -> None:
    cache, head = ActivationCache(3 * BYTES), Counting()
    ask(cache, head, A, B, C)
    ask(cache, head, A, B, C)
    assert head.runs == [[0, 10, 20]], "three have room"
    ask(cache, head, A)  # B is now the oldest
    ask(cache, head, D)
    ask(cache, head, C, A, D)
    assert head.runs == [[0, 10, 20], [30]]
    ask(cache, head, B)
    assert head.runs[2:] == [[10]]
    ask(cache, head, A, D, B)
    ask(cache, head, C)
    assert head.runs[3:] == [[20]], "it was the oldest when B came"


def test_one_byte_less_has_room_for_one_picture_less() -> None:
    cache, head = ActivationCache(3 * BYTES - 1), Counting()
    ask(cache, head, A, B, C)
    ask(cache, head, B, C)
    assert head.runs == [[0, 10, 20]]
    ask(cache, head, A)
    assert head.runs[1:] == [[0]]


def test_a_picture_that_comes_twice_at_once_is_counted_once() -> None:
    cache, head = ActivationCache(2 * BYTES), Counting()
    for _ in range(3):
        ask(cache, head, A, A, A)
    ask(cache, head, B)
    ask(cache, head, A, B)
    assert head.runs == [[0, 0, 0], [10]]


def test_values_that_have_no_room_are_given_and_not_kept() -> None:
    cache, head = ActivationCache(BYTES - 1), Counting()
    ask(cache, head, A, B)
    ask(cache, head, A)
    assert head.runs == [[0, 10], [0]]


def test_what_is_kept_is_a_copy() -> None:
    """Nobody who writes into what came, or into the picture, changes what comes next; no batch is held in memory."""
    cache, head = ActivationCache(1000), Counting()
    fitted, images = shown(A, B, C)
    batch: list[Tensor] = []

    def views(shown: Tensor) -> Values:
        batch.extend(head(shown))
        return batch[0], batch[1]

    fresh = cache.values(KEY, fitted, images, views)
    assert fresh[0] is batch[0]
    for tensor in (*batch, images):
        tensor.fill_(-1)
    kept = cache.values(KEY, *shown(B), head)
    assert kept[0].untyped_storage().nbytes() == 12, "the picture's own, not the batch's"
    assert kept[1].untyped_storage().nbytes() == 4
    for value in kept:
        value.fill_(-1)
    for value in cache.values(KEY, *shown(B, C), head):
        value.fill_(-1)
    ask(cache, head, A, B, C)
    assert head.runs == [[0, 10, 20]]


def test_a_head_that_fails_leaves_nothing() -> None:
    cache, head = ActivationCache(1000), Counting()

    def fails(_images: Tensor) -> Values:
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError):
        cache.values(KEY, *shown(A), fails)
    ask(cache, head, A, B)
    with pytest.raises(torch.OutOfMemoryError):
        cache.values(KEY, *shown(A, C), fails)
    ask(cache, head, C, A)
    assert head.runs == [[0, 10], [20]]


def test_eight_threads_get_their_own_pictures() -> None:
    """With room for five of twelve pictures, so that values leave while others are read."""
    cache, head = ActivationCache(5 * BYTES), Counting()
    ready = threading.Barrier(8, timeout=60)

    def client(number: int) -> None:
        choose = np.random.default_rng(number)
        ready.wait()
        for _ in range(100):
            ask(cache, head, *choose.integers(0, 12, size=choose.integers(1, 5)).tolist())

    with ThreadPoolExecutor(8) as clients:
        for done in [clients.submit(client, number) for number in range(8)]:
            done.result()
    fresh = Counting()
    for number in range(12):
        ask(cache, fresh, number)
    assert len(fresh.runs) >= 7, "never more than five are kept"
    ask(cache, fresh, 9, 10, 11)
    assert len(fresh.runs) <= 12


def with_cache(program: Program, cache: ActivationCache) -> Model:
    model = model_of(program, values=IMAGENET)
    return replace(model, heads=Heads(program, activations=cache))


def runs_of(module: nn.Module) -> list[int]:
    """The sizes of the batches that a network is run on from now on."""
    sizes: list[int] = []
    module.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.parametrize("methods", [("grad_cam",), ("grad_cam", "guided_grad_cam")])
def test_another_class_of_the_same_picture_costs_the_tail_alone_and_has_the_map_of_a_fresh_model(
    methods: tuple[str, ...],
) -> None:
    program, cache = program_of(seeded(Dense), 12), ActivationCache(1 << 20)
    model, fitted = with_cache(program, cache), pictures(1, 12)
    sizes = runs_of(model.heads.at(model.layers.target(None, True)).eager)
    for number in (1, 4, 1):
        (answer,) = explain(model, request(1, (number,), methods=methods), fitted)
        (fresh,) = explain(model_of(program, values=IMAGENET), request(1, (number,), methods=methods), fitted)
        np.testing.assert_array_equal(answer.confidences, fresh.confidences)
        for raw, same in zip(answer.maps, fresh.maps, strict=True):
            assert raw.values.any()
            np.testing.assert_array_equal(raw.values, same.values)
    # A fresh model cuts the same program, whose head is one and the same: it ran once for the cache, thrice for them.
    assert sizes == [1, 1, 1, 1]


def test_a_batch_that_is_partly_known_has_the_maps_of_each_picture_alone() -> None:
    program = program_of(seeded(Dense), 12)
    model, fitted = with_cache(program, ActivationCache(1 << 20)), pictures(4, 12)
    alone = [explain(model_of(program, values=IMAGENET), asked(1), fitted[each : each + 1])[0] for each in range(4)]
    sizes = runs_of(model.heads.at(model.layers.target(None, True)).eager)
    explain(model, asked(2), fitted[[1, 3]])
    for order in ([3, 0, 1, 2], [0, 1, 2, 3]):
        for index, answer in zip(order, explain(model, asked(4), fitted[order]), strict=True):
            np.testing.assert_allclose(answer.confidences, alone[index].confidences, rtol=1e-5)
            for raw, same in zip(answer.maps, alone[index].maps, strict=True):
                np.testing.assert_allclose(raw.values, same.values, rtol=0, atol=1e-5 * np.abs(same.values).max())
    assert sizes == [2, 2]


def asked(count: int) -> ExplainRequest:
    return request(count, *[(2,)] * count, methods=("grad_cam", "guided_grad_cam"))


def test_layers_don_t_share_values() -> None:
    model, fitted = with_cache(varied(), ActivationCache(1 << 20)), pictures(1, 12)
    for _ in range(2):
        for layer in ("first", "second", "third"):
            wanted = request(1, (2,), methods=("grad_cam",), gen_params={"target_conv_layer": layer})
            (answer,) = explain(model, wanted, fitted)
            (fresh,) = explain(model_of(varied(), values=IMAGENET), wanted, fitted)
            np.testing.assert_array_equal(answer.maps[0].values, fresh.maps[0].values)


def test_the_convolution_and_its_relu_don_t_share_values() -> None:
    model, fitted = with_cache(varied(), ActivationCache(1 << 20)), pictures(1, 12)
    found = []
    for use_conv_only in (True, False, True, False):
        params = {"use_conv_only": use_conv_only}
        (answer,) = explain(model, request(1, (2,), methods=("grad_cam",), gen_params=params), fitted)
        (fresh,) = explain(
            model_of(varied(), values=IMAGENET), request(1, (2,), methods=("grad_cam",), gen_params=params), fitted
        )
        np.testing.assert_array_equal(answer.maps[0].values, fresh.maps[0].values)
        found.append(hashlib.sha256(answer.maps[0].values.tobytes()).digest())
    assert len(set(found)) == 2


class Windows(nn.Module):
    """Beside the layer crosses a value whose dimension 0 is not the batch: each half of the picture is a row of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        stem = F.relu(self.stem(x))
        halves = stem.reshape(-1, 4, 3, 6) * 2
        last = F.relu(self.last(stem)).reshape(-1, 4, 3, 6) + halves
        scores: Tensor = self.head(last.reshape(-1, 4 * 36))
        return scores


def test_values_that_are_not_per_picture_are_not_kept() -> None:
    program = program_of(seeded(Windows), 6)
    model, fitted = with_cache(program, ActivationCache(1 << 20)), pictures(3, 6)
    head = model.heads.at(model.layers.target("last", True))
    crossing = program.split(model.layers.target("last", True).node).crossing
    assert [program.is_batched(node) for node in crossing] == [False], "what this test is about"
    assert not head.separable
    sizes = runs_of(head.eager)
    for _ in range(2):
        together = explain(model, asked(3), fitted)
        for index, answer in enumerate(together):
            (alone,) = explain(model_of(program, values=IMAGENET), asked(1), fitted[index : index + 1])
            np.testing.assert_allclose(
                answer.maps[0].values, alone.maps[0].values, rtol=0, atol=1e-5 * np.abs(alone.maps[0].values).max()
            )
    assert sizes == [3, 1, 1, 1] * 2


def test_revisions_share_a_cache_and_no_values() -> None:
    """A reload drops the old revision; what was kept of it serves the same revision, and never another one."""
    cache, fitted = ActivationCache(1 << 20), pictures(1, 12)
    images = torch.from_numpy(fitted).movedim(3, 1).float()
    networks = [program_of(seeded(Dense, seed), 12) for seed in (0, 1)]
    targets = [LayerTable(program).target("third", True) for program in networks]
    expected = [Heads(program).at(target)(images) for program, target in zip(networks, targets, strict=True)]
    assert not torch.equal(expected[0][0], expected[1][0])
    sizes: list[list[int]] = []
    for turn in range(50):  # so that some lie where others lay in memory
        which = turn % 2
        heads = Heads(networks[which], activations=cache, revision=f"sha256:{which}")
        sizes.append(runs_of(heads.at(targets[which]).eager))
        values = heads.values(heads.at(targets[which]), images, fitted)
        assert all(torch.equal(value, right) for value, right in zip(values, expected[which], strict=True))
    assert [len(one) for one in sizes] == [1, 1] + [0] * 48


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_of_another_stream_are_waited_for() -> None:
    """One stream keeps what it has not computed yet, another one reads it at once."""
    cache, device = ActivationCache(1 << 30), torch.device("cuda:0")
    fitted, images = shown(A, B)
    images = images.to(device)

    def slow(shown: Tensor) -> Values:
        torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call]
        return (shown.expand(-1, -1, 512, 512) + 1,)

    first, second = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    with torch.cuda.stream(first):
        cache.values(KEY, fitted, images, slow)
    with torch.cuda.stream(second):
        (value,) = cache.values(KEY, fitted, images, slow)
        found = value.cpu()
    torch.cuda.synchronize(device)
    assert torch.equal(found, (images.cpu() + 1).expand(-1, -1, 512, 512))
