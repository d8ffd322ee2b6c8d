"""Attention rollout against numbers worked out by hand, and against torchvision's own attention weights."""

from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformer

from service.methods.attention_rollout import AttentionRollout, AttentionRolloutParams
from service.models.program import Program
from tests.nets import SMALL, close_to, deep, from_timm, images, peer_copy, program_of, seeded, trace_of, varied

Kind = Literal["fused", "softmax"]


def ours(
    program: Program, pictures: Tensor, classes: list[int], params: AttentionRolloutParams | None = None
) -> Tensor:
    trace = trace_of(program, pictures, None, classes)
    return AttentionRollout().heatmap(trace, params or AttentionRolloutParams())


class Toy(nn.Module):
    """Two layers over four pixels, whose only channel is red: a token t_j is attended to with weight exp(t_j).

    A layer adds the same number to every token, so that both layers have the same weights. Of `heads` the second
    attends to all tokens alike. The class token is 0. `pooled`: one query reads the tokens, with weights exp(2 t_j).
    """

    def __init__(self, kind: Kind, heads: int = 1, class_token: bool = False, pooled: bool = False) -> None:
        super().__init__()
        self.kind, self.heads, self.class_token, self.pooled = kind, heads, class_token, pooled
        self.red = nn.Conv2d(3, 1, 1, bias=False)
        self.red.weight = nn.Parameter(torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1))
        self.head = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.red(x).flatten(2).transpose(1, 2)
        if self.class_token:
            x = torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)
        for _ in range(2):
            x = x + self.attend(x[:, None])[:, 0]
        if self.pooled:
            x = self.pool(x[:, None])[:, 0]
        scores: Tensor = self.head(x[:, 0] if self.class_token else x.mean(dim=1))
        return scores

    def pool(self, x: Tensor) -> Tensor:
        """`x` is (N,1,T,1)."""
        query = torch.full_like(x[:, :, :1], 2)
        if self.kind == "fused":
            return F.scaled_dot_product_attention(query, x, x)
        return (query @ x.mT).softmax(dim=-1) @ x

    def attend(self, x: Tensor) -> Tensor:
        """`x` is (N,1,T,1)."""
        keys = torch.cat([x * (head == 0) for head in range(self.heads)], dim=1)
        queries, values = torch.ones_like(keys), x.expand(-1, self.heads, -1, -1)
        if self.kind == "fused":
            return F.scaled_dot_product_attention(queries, keys, values)
        return (queries @ keys.mT).softmax(dim=-1) @ values


@cache
def toy(kind: Kind, heads: int = 1, class_token: bool = False, pooled: bool = False) -> Program:
    return program_of(seeded(lambda: Toy(kind, heads, class_token, pooled)), 2)


def red(*weights: float) -> Tensor:
    """A picture of 2 x 2 whose pixels are attended to with these weights, up to scale."""
    picture = torch.zeros(1, 3, 2, 2)
    picture[0, 0] = torch.tensor(weights).log().reshape(2, 2)
    return picture


@pytest.mark.parametrize("kind", ["fused", "softmax"])
def test_equals_two_layers_on_paper(kind: Kind) -> None:
    # Every row of A is a = (1, 2, 3, 4) / 10, so A A = A, and ((A + I) / 2)^2 = (3 A + I) / 4. The mean over rows:
    expected = [[0.75 * 0.1 + 0.0625, 0.75 * 0.2 + 0.0625], [0.75 * 0.3 + 0.0625, 0.75 * 0.4 + 0.0625]]
    answer = ours(toy(kind), red(1, 2, 3, 4), [0])
    np.testing.assert_allclose(answer[0], expected, rtol=1e-5)
    assert answer.dtype == torch.float32


@pytest.mark.parametrize("kind", ["fused", "softmax"])
def test_takes_the_class_tokens_row(kind: Kind) -> None:
    # The class token's exp(0) is 1: a = (1, 1, 2, 3, 4) / 11. Its row of (3 A + I) / 4 is 3/4 a at the patches.
    answer = ours(toy(kind, class_token=True), red(1, 2, 3, 4), [0])
    np.testing.assert_allclose(answer[0], [[0.75 / 11, 1.5 / 11], [2.25 / 11, 3 / 11]], rtol=1e-5)


@pytest.mark.parametrize("kind", ["fused", "softmax"])
def test_begins_with_the_row_of_a_query_that_pools_the_tokens(kind: Kind) -> None:
    # The pool's row is b = (1, 4, 9, 16) / 30, and b (3 A + I) / 4 = (3 a + b) / 4, since b has the sum 1.
    a, b = np.array([1, 2, 3, 4]) / 10, np.array([1, 4, 9, 16]) / 30
    answer = ours(toy(kind, pooled=True), red(1, 2, 3, 4), [0])
    np.testing.assert_allclose(answer[0].flatten(), (3 * a + b) / 4, rtol=1e-5)


def test_a_vit_that_pools_by_attention_equals_its_own_modules() -> None:
    """timm's SigLIP kind: the paper's product in float64 of weights recomputed from the inputs of each attention."""
    module = seeded(
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=96, depth=2, global_pool="map", class_token=False, num_classes=5
        )
    )
    program, pictures = program_of(module, 96), images(2, 96)
    twin = peer_copy(module, torch.float64)
    rows: list[Tensor] = []

    def keep(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, heads = inputs[0], int(part.num_heads)  # type: ignore[arg-type]
        if hasattr(part, "latent"):
            q, k = part.q(part.latent.expand(len(x), -1, -1)), part.kv(x).chunk(2, dim=-1)[0]  # type: ignore[operator]
        else:
            q, k, _ = part.qkv(x).chunk(3, dim=-1)  # type: ignore[operator]
        q, k = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k))
        rows.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1))

    for part in twin.modules():
        if type(part).__name__ in ("Attention", "AttentionPoolLatent"):
            part.register_forward_pre_hook(keep)
    twin(pictures.double())
    *layers, row = rows
    for layer in reversed(layers):
        row = row @ (layer + torch.eye(36)) / 2
    assert row.std() > 1e-3 * row.max()
    assert close_to(ours(program, pictures, [0, 0]), row.reshape(2, 6, 6).detach()) < 1e-5


@pytest.mark.parametrize("kind", ["fused", "softmax"])
def test_fuses_heads_on_paper(kind: Kind) -> None:
    # The second head's weights are 1/4 each. Of rows f with the sum s: ((A + I) / (1 + s))^2 = ((2 + s) A + I) / ..
    first = np.array([[0.1, 0.2], [0.3, 0.4]])
    fusions: list[tuple[Literal["mean", "max", "min"], Callable[[np.ndarray], np.ndarray]]] = [
        ("mean", lambda a: (a + 0.25) / 2),
        ("max", lambda a: np.maximum(a, 0.25)),
        ("min", lambda a: np.minimum(a, 0.25)),
    ]
    for name, fuse in fusions:
        fused = fuse(first)
        total = fused.sum()
        expected = ((2 + total) * fused + 0.25) / (1 + total) ** 2
        answer = ours(toy(kind, heads=2), red(1, 2, 3, 4), [0], AttentionRolloutParams(head_fusion=name))
        np.testing.assert_allclose(answer[0], expected, rtol=1e-5)


def test_discards_the_smallest_weights_on_paper() -> None:
    # Half of the 16 weights: the columns 0.1 and 0.2. Rows (0, 0, 0.3, 0.4) have the sum 0.7.
    answer = ours(toy("fused"), red(1, 2, 3, 4), [0], AttentionRolloutParams(discard_ratio=0.5))
    expected = np.array([[0.25, 0.25], [2.7 * 0.3 + 0.25, 2.7 * 0.4 + 0.25]]) / 1.7**2
    np.testing.assert_allclose(answer[0], expected, rtol=1e-5)


def torchvisions(module: nn.Module, pictures: Tensor) -> np.ndarray:
    """The paper's product in NumPy, float64, of the weights that nn.MultiheadAttention itself returns."""
    twin = peer_copy(module, torch.float64)
    attentions = [part for part in twin.modules() if isinstance(part, nn.MultiheadAttention)]
    inputs: list[Tensor] = []
    handles = [part.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for part in attentions]
    twin(pictures.double())
    for handle in handles:
        handle.remove()
    product = np.eye(inputs[0].shape[1])
    for part, tokens in zip(attentions, inputs, strict=True):
        weights = part(tokens, tokens, tokens, need_weights=True)[1].detach().numpy()
        mixed = weights + np.eye(weights.shape[-1])
        product = mixed / mixed.sum(axis=-1, keepdims=True) @ product
    return np.asarray(product[:, 0, 1:].reshape(len(pictures), 3, 3))


def test_equals_numpy_with_torchvisions_own_weights() -> None:
    module, program = deep("vit_b_32")
    pictures = images(2, SMALL)
    oracle = torchvisions(module, pictures)
    assert oracle.std() > 1e-2 * oracle.max(), "the oracle should vary from place to place"
    assert close_to(ours(program, pictures, [3, 7]), oracle) < 1e-4


class Tokens(nn.Module):
    """A class token, two registers and 3 x 5 patches in two blocks of torch's own attention; `pool` is read."""

    def __init__(self, need_weights: bool = False, pool: Literal["token", "mean"] = "token") -> None:
        super().__init__()
        self.need_weights, self.pool = need_weights, pool
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.extra = nn.Parameter(torch.randn(1, 3, 8))
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.second = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)
        for part in (self.first, self.second):
            nn.init.normal_(part.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.extra.expand(x.shape[0], -1, -1), x], dim=1)
        for attention in (self.first, self.second):
            x = x + attention(x, x, x, need_weights=self.need_weights)[0]
        scores: Tensor = self.head(x[:, 0] if self.pool == "token" else x[:, 3:].mean(dim=1))
        return scores


def tokens_oracle(module: Tokens, pictures: Tensor) -> np.ndarray:
    twin = peer_copy(module, torch.float64)
    assert isinstance(twin, Tokens)
    x = twin.patches(pictures.double()).flatten(2).transpose(1, 2)
    x = torch.cat([twin.extra.expand(x.shape[0], -1, -1), x], dim=1)
    product = torch.eye(18, dtype=torch.float64)
    for attention in (twin.first, twin.second):
        added, weights = attention(x, x, x, need_weights=True)
        product = (weights + torch.eye(18)) / 2 @ product
        x = x + added
    rows = product[:, 0] if module.pool == "token" else product[:, 3:].mean(dim=1)
    return rows[:, 3:].reshape(-1, 3, 5).detach().numpy()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_the_rows_are_those_of_the_tokens_that_are_read(need_weights: bool, pool: Literal["token", "mean"]) -> None:
    """Fused or not, on a grid that is no square; with `need_weights` batch and heads share a dimension."""
    module = seeded(lambda: Tokens(need_weights, pool))
    assert isinstance(module, Tokens)
    pictures = images(3, (12, 20))
    oracle = tokens_oracle(module, pictures)
    assert oracle.std() > 0.1 * oracle.max()
    program = program_of(module, (12, 20))
    together = ours(program, pictures, [0, 1, 2])
    assert close_to(together, oracle) < 1e-5
    for index in range(3):
        assert close_to(ours(program, pictures[index : index + 1], [4]), together[index : index + 1]) < 1e-5


class Masked(nn.Module):
    """Two layers of one head with a bias for each pair of places, a scale of their own, and queries that are keys."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 2, stride=2)
        self.bias = nn.Parameter(torch.randn(1, 1, 4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for _ in range(2):
            heads = x[:, None]
            x = x + F.scaled_dot_product_attention(heads, heads, heads, attn_mask=self.bias, scale=0.7)[:, 0]
        scores: Tensor = self.head(x.mean(dim=1))
        return scores


def test_a_bias_and_a_scale_are_part_of_the_weights() -> None:
    module, pictures = seeded(Masked), images(2, 4)
    twin = peer_copy(module, torch.float64)
    x = twin.get_submodule("patches")(pictures.double()).flatten(2).transpose(1, 2)
    product = torch.eye(4, dtype=torch.float64)
    for _ in range(2):
        weights = (0.7 * x @ x.mT + twin.get_parameter("bias")[0]).softmax(dim=-1)
        product, x = (weights + torch.eye(4)) / 2 @ product, x + weights @ x
    oracle = product.mean(dim=1).reshape(2, 2, 2).detach()
    assert close_to(ours(program_of(module, 4), pictures, [0, 0]), oracle) < 1e-5


def test_is_the_same_for_every_class() -> None:
    program = deep("vit_b_32")[1]
    assert torch.equal(ours(program, images(1, SMALL), [3]), ours(program, images(1, SMALL), [7]))


def test_reads_timms_attention_on_a_grid_that_is_no_square() -> None:
    """A row sums to 1, less what reaches the class token."""
    program = from_timm("vit_tiny_patch16_224", (96, 160), resized=True)[1]
    answer = ours(program, images(1, (96, 160)), [0])
    assert answer.shape == (1, 6, 10)
    assert 0.5 < answer.sum() < 1


class Mixed(nn.Module):
    """Attention over four patches whose weights are not those of one layer after another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.patches = nn.Conv2d(3, 4, 2, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        heads = x.reshape(x.shape[0], 4, 2, 2).transpose(1, 2)
        if self.kind == "differences":
            first, second = (F.scaled_dot_product_attention(heads * by, heads, heads) for by in (1, 2))
            heads = first - second
        elif self.kind == "talking heads":
            weights = (heads @ heads.mT).softmax(dim=-1)
            heads = (weights + weights.flip(1)) @ heads
        elif self.kind == "pooled keys":
            heads = F.scaled_dot_product_attention(heads, heads[:, :, ::2], heads[:, :, ::2])
        elif self.kind == "windows":
            parts = x.reshape(-1, 1, 2, 4)
            heads = F.scaled_dot_product_attention(parts, parts, parts).reshape(x.shape[0], 2, 4, 2)
        elif self.kind == "channels":
            heads = (heads.mT @ heads).softmax(dim=-1) @ heads.mT
        scores: Tensor = self.head(heads.reshape(x.shape[0], 4, 4).mean(dim=1))
        return scores


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("differences", "do not follow one another"),
        ("talking heads", "changed before they meet the values"),
        ("pooled keys", "not always from all tokens of one grid to the same tokens"),
        ("windows", "windows"),
        ("channels", "no value before its attention has one row per token"),
        ("none", "it has no attention"),
    ],
)
def test_what_is_no_attention_over_one_grid_is_refused_with_the_reason(kind: str, reason: str) -> None:
    found = AttentionRollout().refusal(program_of(seeded(lambda: Mixed(kind)), 4), None)
    assert found is not None
    assert reason in found
    assert not found.endswith(".")


def test_convolutional_networks_and_swin_are_refused() -> None:
    swin = seeded(lambda: SwinTransformer([4, 4], 12, depths=[2, 1], num_heads=[1, 2], window_size=[4, 4]))
    assert AttentionRollout().refusal(varied(), None) == "it has no attention"
    assert "windows" in (AttentionRollout().refusal(program_of(swin, 64), None) or "")
    assert AttentionRollout().refusal(deep("vit_b_32")[1], None) is None
