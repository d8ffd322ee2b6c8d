"""Networks of many families, and an oracle of places: input gradients tell where in the picture a place looks.

The oracle runs the network backward from single places; it shares nothing with the layer table but the captured graph.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision.models
from torch import Tensor, fx, nn
from torch.nn import functional as F

from service.models.grids import Grid
from service.models.layers import Layer, LayerTable
from service.models.program import Program
from tests.nets import close_to, images, program_of, trace_of

aten = torch.ops.aten

CLASSES = 10
PLACES = (1, 4, 7, 2, 5, 0, 3, 6)
"""Column by row of the places on an 8 x 8 board: no two in a line, rows and columns correlate by 0.14 only."""
FEW, MORE = 1, 4
"""Base noises of a first look, and of a second one at a layer that the first does not show to be right."""
CORRELATION, HITS = 0.8, 0.75
SILENT = 1e-6
LATE = 0.5
"""Share of the weighted operations on places that come before a default layer, or are it."""
LEAST = 0.1
"""Share of the layers that must be targets: refusing all would be right about each."""
ALONE = 1e-4
WEIGHTED = {
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.convolution.default,
    aten.linear.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.scaled_dot_product_attention.default,
}


@dataclass(frozen=True)
class Network:
    """A small variant of a family, for square pictures of `side` pixels."""

    family: str
    architecture: str
    side: int = 64
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network in eval mode with seeded weights and a normal(0.02) head."""
        kind, _, name = self.architecture.partition(":")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            create = timm.create_model if kind == "timm" else torchvision.models.get_model
            module: nn.Module = create(name, num_classes=CLASSES, **self.arguments)
            for part in module.modules():
                outputs = getattr(part, "out_features", getattr(part, "out_channels", None))
                if outputs == CLASSES and isinstance(part, nn.Linear | nn.Conv2d):
                    nn.init.normal_(part.weight, std=0.02)
        return module.eval().requires_grad_(False)


@dataclass(frozen=True)
class Verdict:
    """What the gradients of single places say of a fold.

    `rows` and `columns` are the correlations between a place's index and the centre of mass of its gradient, `hits` is
    the share of places whose gradient stands out most at their own place. A silent fold has the same gradient, or
    none, at every place.
    """

    rows: float
    columns: float
    hits: float
    silent: bool = False

    @property
    def right(self) -> bool:
        return min(self.rows, self.columns) >= CORRELATION or self.hits >= HITS


def places_of(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of up to eight places that are spread over a grid, no two the same."""
    count = len(PLACES)
    pairs = {(row * height // count, column * width // count): None for row, column in enumerate(PLACES)}
    rows, columns = zip(*pairs, strict=True)
    return torch.tensor(rows), torch.tensor(columns)


def softmax_beside_itself(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A softmax; where it is an attention of tokens to one another, each also attends to itself alone."""
    probabilities: Tensor = torch.softmax(scores, *args, **kwargs)
    tokens = scores.shape[-1]
    return probabilities + torch.eye(tokens) if scores.ndim > 2 and scores.shape[-2] == tokens else probabilities


def attention_beside_itself(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Scaled dot-product attention, the same way."""
    attended = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    return attended + value if attended.shape == value.shape else attended


def localise(module: fx.GraphModule) -> None:
    """Change the network so that places show where they look: how a value is laid out does not depend on this.

    Vectors that are all zero (the last norm of a branch) become random, and kernels of convolutions are narrowed
    around their centre: one of 7 x 7 sees the whole of a 4 x 4 grid from everywhere. Tokens attend to themselves: with
    random weights an attention is nearly the same mean for all.
    """
    sharper = {
        aten.softmax.int: softmax_beside_itself,
        aten.scaled_dot_product_attention.default: attention_beside_itself,
    }
    for node in module.graph.nodes:
        node.target = sharper.get(node.target, node.target)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1 and not parameter.count_nonzero():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim == 4 and max(parameter.shape[2:]) > 1:
                parameter.mul_(_window(parameter.shape[2])[:, None] * _window(parameter.shape[3]))


def _window(size: int) -> Tensor:
    """A bell of standard deviation 0.7 over a kernel's rows or columns; no narrower than a tenth of its size."""
    distance = torch.arange(size) - (size - 1) / 2
    return torch.exp(-(distance**2) / (2 * max(0.7, size / 10) ** 2))


def judge(program: Program, layers: Sequence[tuple[fx.Node, Grid]]) -> list[Verdict]:
    """A verdict for each fold; those that one base noise does not show to be right are looked at again with more."""
    verdicts = _judge(program, layers, range(FEW))
    doubtful = [index for index, verdict in enumerate(verdicts) if not verdict.right]
    again = _judge(program, [layers[index] for index in doubtful], range(FEW, FEW + MORE)) if doubtful else []
    for index, verdict in zip(doubtful, again, strict=True):
        verdicts[index] = verdict
    return verdicts


def _judge(program: Program, layers: Sequence[tuple[fx.Node, Grid]], seeds: Sequence[int]) -> list[Verdict]:
    sums = [torch.zeros(()) for _ in layers]
    nodes = list(dict.fromkeys(node for node, _ in layers))
    for seed in seeds:
        side = program.images.meta["val"].shape[2:]
        shown = images(1, tuple(side), 100 + seed).expand(len(PLACES), -1, -1, -1).contiguous().requires_grad_()
        with torch.enable_grad():
            values = dict(zip(nodes, program.observed(*nodes)(shown)[1:], strict=True))
        for index, (node, grid) in enumerate(layers):
            sums[index] = sums[index] + single_places(grid.fold(values[node]), shown, seed)
    return [
        verdict_of(total / len(seeds), grid.height, grid.width) for total, (_, grid) in zip(sums, layers, strict=True)
    ]


def single_places(folded: Tensor, shown: Tensor, seed: int) -> Tensor:
    """Where in the picture each place looks, (P,H,W) of sum 1 each, or 0 where nothing stands out.

    Picture p of the batch, all the same, gives the gradient of a random projection of place p. What all places have
    in common (the values that attention averages) is linear in the projection and is subtracted with its sign.
    """
    rows, columns = places_of(*folded.shape[2:])
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(folded.shape[1], generator=generator)
    total = (folded[torch.arange(len(rows)), :, rows, columns] * projection).sum()
    if not total.requires_grad:
        return torch.zeros(len(rows), *shown.shape[2:])
    (gradient,) = torch.autograd.grad(total, shown, retain_graph=True)
    gradient = gradient[: len(rows)].double()
    own = (gradient - gradient.mean(dim=0)).abs().sum(dim=1)
    size = own.sum(dim=(1, 2), keepdim=True)
    common = gradient.abs().sum(dim=(1, 2, 3))[:, None, None].amax()
    return torch.where(size > SILENT * common, own / size, 0).float()


def verdict_of(looks: Tensor, height: int, width: int) -> Verdict:
    """The verdict on a fold of `height` x `width` whose places look at `looks`, (P,H,W)."""
    rows, columns = places_of(height, width)
    if not looks.count_nonzero():
        return Verdict(0, 0, 0, silent=True)
    area = F.adaptive_avg_pool2d(looks[:, None], (height, width))[:, 0]
    relative = area / area.mean(dim=0).clamp(min=area.max() * 1e-6)
    hits = (relative[:, rows, columns].argmax(dim=1) == torch.arange(len(rows))).float().mean()
    excess = (relative - 1).clamp(min=0)
    mass = excess.sum(dim=(1, 2)).clamp(min=1e-12)
    centre_rows = (excess.sum(dim=2) * torch.arange(height)).sum(dim=1) / mass
    centre_columns = (excess.sum(dim=1) * torch.arange(width)).sum(dim=1) / mass
    return Verdict(_correlation(rows, centre_rows), _correlation(columns, centre_columns), float(hits))


def _correlation(index: Tensor, centre: Tensor) -> float:
    """The correlation of both; 1 where the axis has one place only, 0 where all centres are the same."""
    if len(set(index.tolist())) == 1:
        return 1.0
    found = torch.corrcoef(torch.stack([index.float(), centre]))[0, 1]
    return float(found.nan_to_num())


@dataclass
class Findings:
    """What the matrix says of one network. `crossing` counts the values that pass the default, such as shortcuts;
    `beside` the weighted operations on their way that the default does not depend on."""

    network: Network
    layers: int = 0
    targets: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    default: str | None = None
    lateness: float = 1.0
    crossing: int = 0
    beside: int = 0
    recommended: str | None = None
    alone: float = 0.0
    wrong: dict[str, Verdict] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    failure: str | None = None
    seconds: float = 0.0

    def line(self) -> str:
        """One row of the table."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.refused.items()))
        cells = [self.network.family, self.network.architecture, self.layers, self.targets, reasons, self.default]
        cells += [f"{self.lateness:.2f}", f"{self.crossing}/{self.beside}", f"{self.alone:.0e}", len(self.wrong)]
        cells += [len(self.silent), f"{self.seconds:.0f}", self.failure or ""]
        return "| " + " | ".join(str(cell) for cell in cells) + " |"


def faults(found: Findings) -> list[str]:
    """What must not be: wrong targets, an early default or one with parallel paths, a batch that differs from one."""
    said = [f"{name} is folded wrongly: {verdict}" for name, verdict in found.wrong.items()]
    said += (
        [f"only {found.targets} of {found.layers} layers are targets"] if found.targets < LEAST * found.layers else []
    )
    if found.default is None:
        return said
    said += [f"the default {found.default} is early: {found.lateness:.2f}"] if found.lateness < LATE else []
    said += [f"{found.beside} weighted operations run parallel to {found.default}"] if found.beside else []
    return said + ([f"alone differs from in a batch by {found.alone:.0e}"] if found.alone > ALONE else [])


HEADER = (
    "| family | network | layers | targets | refused | default | late | crossing/parallel | alone | wrong | silent "
    "| s | failure |\n" + "|---" * 13 + "|"
)


def examine(network: Network, sample: int | None = None) -> Findings:
    """Everything about one network; with `sample` the oracle looks at that many of its targets, evenly spread."""
    started = time.monotonic()
    found = Findings(network)
    program = program_of(network.build(), network.side)
    of = LayerTable(program)
    targets = [row for row in of.rows if row.grid is not None]
    found.layers, found.targets = len(of.rows), len(targets)
    for row in of.rows:
        if row.reason is not None:
            kind = "".join("#" if letter.isdigit() else letter for letter in row.reason)
            found.refused[kind] = found.refused.get(kind, 0) + 1
    try:
        found.recommended = of.recommended
        found.default = of.default
    except Exception as error:
        found.failure = f"{type(error).__name__}: {error}"
    if found.default is not None:
        _examine_default(found, program, of)
    localise(program.source)
    _examine_targets(found, program, targets[:: max(1, len(targets) // sample)] if sample else targets)
    found.seconds = time.monotonic() - started
    return found


def _examine_default(found: Findings, program: Program, of: LayerTable) -> None:
    target = of.target(None, use_conv_only=True)
    order = {node: index for index, node in enumerate(program.nodes)}
    spatial = [node for node in program.tainted if node.target in WEIGHTED and node.meta["val"].ndim >= 3]
    found.lateness = sum(order[node] <= order[target.node] for node in spatial) / len(spatial)
    crossing = program.crossing(target.node)
    found.crossing = len(crossing)
    parallel = program.ancestors(crossing) - program.ancestors([target.node])
    found.beside = sum(node.target in WEIGHTED for node in parallel)
    shown = images(3, network_side(program))
    together = pass_at_default(program, of, shown)
    alone = [pass_at_default(program, of, shown[i : i + 1]) for i in range(3)]
    found.alone = max(
        close_to(torch.cat([one[part] for one in alone]), whole)
        for part, whole in enumerate(together)
        if whole.count_nonzero()
    )


def network_side(program: Program) -> tuple[int, int]:
    """Height and width of the network's pictures."""
    height, width = program.images.meta["val"].shape[2:]
    return int(height), int(width)


def pass_at_default(program: Program, of: LayerTable, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Activation and gradient of class 1 at the default layer, both (N,C,h,w)."""
    trace = trace_of(program, shown, of.target(None, use_conv_only=True), [1] * len(shown))
    return trace.activation, trace.gradient


def _examine_targets(found: Findings, program: Program, targets: Sequence[Layer]) -> None:
    folds: dict[tuple[fx.Node, Grid], list[str]] = {}
    for row in targets:
        assert row.node is not None
        assert row.grid is not None
        folds.setdefault((row.node, row.grid), []).append(row.name)
    if not folds:
        return
    for names, verdict in zip(folds.values(), judge(program, list(folds)), strict=True):
        if verdict.silent:
            found.silent.extend(names)
        elif not verdict.right:
            found.wrong.update(dict.fromkeys(names, verdict))


def of_timm(family: str, name: str, side: int = 64, **arguments: Any) -> Network:
    return Network(family, f"timm:{name}", side, arguments)


def of_torchvision(family: str, name: str, side: int = 64, **arguments: Any) -> Network:
    return Network(family, f"torchvision:{name}", side, arguments)


NETWORKS: tuple[Network, ...] = (
    of_torchvision("ResNet", "resnet18", 96),
    of_timm("ViT", "vit_tiny_patch16_224", 96, img_size=96, depth=4),
    of_timm("MobileViTv2", "mobilevitv2_050", 96),
    of_timm("CaiT", "cait_xxs24_224", 96, img_size=96, depth=4),
    of_timm("EfficientFormerV2", "efficientformerv2_s0", 128, img_size=128),
    of_timm("Hiera", "hiera_tiny_224", 96, img_size=(96, 96)),
    of_timm("RepVGG", "repvgg_a0"),
    of_timm("TNT", "tnt_s_patch16_224", 96, img_size=96, depth=3),
    of_timm("CrossViT", "crossvit_tiny_240", 240),
    of_timm("EfficientViT", "efficientvit_b0"),
    of_timm("EfficientViT (MSRA)", "efficientvit_m0", 96, img_size=96),
    of_timm("Visformer", "visformer_tiny", 96, img_size=96),
    of_timm("LeViT", "levit_128s", 128, img_size=128),
    of_timm("Swin", "swin_tiny_patch4_window7_224", 64, img_size=64, window_size=4, depths=(1, 2, 2)),
    of_timm("DeiT, distilled", "deit_tiny_distilled_patch16_224", 96, img_size=96, depth=3),
    of_torchvision("ResNeXt", "resnext50_32x4d"),
    of_torchvision("RegNet", "regnet_y_400mf"),
    of_torchvision("DenseNet", "densenet121"),
    of_torchvision("MobileNetV3", "mobilenet_v3_small", 96),
    of_torchvision("MNASNet", "mnasnet0_5", 96),
    of_torchvision("EfficientNet", "efficientnet_b0"),
    of_timm("EfficientNet-lite", "efficientnet_lite0", 96),
    of_timm("ConvNeXt", "convnext_atto"),
    of_timm("ConvNeXtV2", "convnextv2_atto"),
    of_torchvision("ShuffleNetV2", "shufflenet_v2_x0_5", 96),
    of_torchvision("SqueezeNet", "squeezenet1_1"),
    of_torchvision("GoogLeNet", "googlenet", 96, aux_logits=False, init_weights=False),
    of_torchvision("Inception v3", "inception_v3", 128, aux_logits=False, init_weights=False),
    of_torchvision("VGG", "vgg11_bn"),
    of_timm("HRNet", "hrnet_w18_small"),
    of_timm("DLA", "dla46_c"),
    of_timm("GhostNet", "ghostnet_050", 96),
    of_timm("SwinV2", "swinv2_tiny_window8_256", 64, img_size=64, depths=(1, 1, 1), num_heads=(3, 6, 12)),
    of_timm("MaxViT", "maxvit_pico_rw_256", 64, img_size=64, depths=(1, 1, 1, 1)),
    of_timm("MViTv2", "mvitv2_tiny", 96, img_size=(96, 96)),
    of_timm("EVA-02", "eva02_tiny_patch14_224", 84, img_size=84, depth=3),
    of_timm("BEiT", "beit_base_patch16_224", 96, img_size=96, depth=3, embed_dim=192, num_heads=3),
    of_timm("XCiT", "xcit_nano_12_p16_224", 96, img_size=96, depth=4),
    of_timm("MobileViT", "mobilevit_xxs", 96),
    of_timm("EfficientFormer", "efficientformer_l1", 224),
    of_timm("EdgeNeXt", "edgenext_xx_small", 96),
    of_timm("FastViT", "fastvit_t8"),
    of_timm("PoolFormer", "poolformer_s12"),
    of_timm("PVTv2", "pvt_v2_b0", 96),
    of_timm("Twins", "twins_svt_small", 128, img_size=128),
    of_timm("CoaT", "coat_lite_tiny", 96, img_size=96),
    of_timm("MLP-Mixer", "mixer_s32_224", 128, img_size=128),
    of_timm("gMLP", "gmlp_ti16_224", 96, img_size=96),
    of_timm("ResMLP", "resmlp_12_224", 96, img_size=96),
    of_timm("ConvMixer", "convmixer_768_32", 70),
    of_timm("NFNet", "nf_regnet_b0"),
    of_timm("VOLO", "volo_d1_224", 96, img_size=96),
    of_timm("NesT", "nest_tiny", 112, img_size=112),
    of_timm("PiT", "pit_ti_224", 112, img_size=112),
    of_timm("ConViT", "convit_tiny", 96, img_size=96, depth=12),
    of_timm("TinyViT", "tiny_vit_5m_224", 224),
    of_timm("RepViT", "repvit_m0_9"),
    of_timm("InceptionNeXt", "inception_next_atto"),
    of_timm("StarNet", "starnet_s050"),
    of_timm("MambaOut", "mambaout_femto"),
    of_timm("FocalNet", "focalnet_tiny_srf", 96),
    of_timm("DaViT", "davit_tiny", 96),
    of_timm("SHViT", "shvit_s1", 96),
    of_timm("CoAtNet", "coatnet_nano_rw_224", 128, img_size=128, depths=(1, 1, 1, 1)),
)


def main() -> None:
    """Print the table, and what is wrong below each row; arguments choose networks by a part of their name."""
    chosen = [one for one in NETWORKS if not sys.argv[1:] or any(part in one.architecture for part in sys.argv[1:])]
    print(HEADER, flush=True)
    wrong = 0
    for network in chosen:
        try:
            found = examine(network)
        except Exception as error:
            found = Findings(network, failure=f"{type(error).__name__}: {str(error)[:200]}")
        said = [found.failure] if found.failure else faults(found)
        wrong += bool(said)
        print("\n".join([found.line(), *(f"    {fault}" for fault in said)]), flush=True)
        print("".join(f"    {name} is silent\n" for name in found.silent), end="", flush=True)
    sys.exit(f"{wrong} of {len(chosen)} networks are wrong" if wrong else 0)


if __name__ == "__main__":
    main()
