"""Methods that run the network once per channel, ours and pytorch-grad-cam's: from a fitted picture to its raw map."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import others
from benchmarks.engine import correlation
from benchmarks.networks import SIDE, Network, Pixels
from benchmarks.options import Options
from benchmarks.ours import Bare, Mode, compiles
from benchmarks.peers.cams import Maps, prepare
from benchmarks.pictures import Pictures
from benchmarks.table import Report, Spread, Table, Target, Unavailable, ratios, rounded
from service.workers.messages import ExplainRequest
from service.workers.plan import make_plan

LAYERS = {"resnet50": "layer4"}
"""Networks that are measured, and where: behind a ReLU, since elsewhere the peer's Ablation-CAM is no Ablation-CAM."""
ROUNDS = 1
"""The peer takes minutes for one map."""
WARM = 10_000
"""Number of a picture that no round comes to."""
PEER = "pytorch-grad-cam"
ALIKE = 0.999
"""The correlation that the maps of Ablation-CAM must have; the peer's Score-CAM is another by design."""
PRECISIONS = {"ablation_cam": ("fp32",), "score_cam": ("fp32", "bf16")}
LEAST = {("ablation_cam", "fp32"): 100.0, ("score_cam", "bf16"): 4.0}
"""How many times faster than the peer ours shall be."""


@dataclass
class Measured:
    """Seconds of one map, per round and variant; cores that others took; why a variant is missing."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


class Slow(Bare):
    """One model in an engine in this process, explained by any method at any layer."""

    def map_of(self, method: str, layer: str, pixels: Pixels, class_id: int) -> Tensor:
        """The raw map (1,h,w) of one class of one fitted picture (1,H,W,3)."""
        params = {"target_conv_layer": layer}
        request = ExplainRequest(self._model.id, (b"",), ((class_id,),), (method,), gen_params=params)
        (explained,) = self._engine.device.run(self._model, make_plan(request, self._model), pixels)
        return torch.from_numpy(explained.maps[0].values)[None]


def run(options: Options) -> Report:
    report = Report()
    for network in options.networks:
        if network.name not in LAYERS:
            continue
        for method in PRECISIONS:
            measured = measure(network, method, options)
            report.tables.append(_table(network, method, measured))
            report.tables.append(others.table(f"{network.name}, {method}", measured.shares))
            report.targets += others.judged(_targets(network, method, measured), measured.shares)
            report.data[f"{network.name}, {method}"] = vars(measured)
    return report


def measure(network: Network, method: str, options: Options) -> Measured:
    """Every variant once per round, in turn, all of a round on one new picture. Ablation-CAM's maps must be alike."""
    measured = Measured()
    layer = LAYERS[network.name]
    pictures = Pictures()
    with ExitStack() as stack:
        net = network.load(options.workplace.weights(network), options.device)
        theirs = _peer(method, net, layer)
        engines = _engines(network, method, options, measured, stack)
        for _ in range(ROUNDS):
            pixels = pictures.fitted(1, SIDE)
            images = network.normalise(pixels).to(options.device)
            with torch.no_grad():
                top = int(net(images).argmax())  # another class may have a map without a positive place
            with others.watched(measured.shares):
                maps = {PEER: _timed(PEER, measured, partial(theirs, images, [top]))}
                for name, engine in engines.items():
                    maps[name] = _timed(name, measured, partial(engine.map_of, method, layer, pixels, top))
            options.say(f"slow_methods: {network.name}, {method}")
            for name in engines if method == "ablation_cam" else ():
                alike = correlation(maps[name].relu(), maps[PEER])
                assert alike >= ALIKE, f"{network.name}: {name} and {PEER} correlate {alike:.4f}"
    return measured


def _engines(network: Network, method: str, options: Options, measured: Measured, stack: ExitStack) -> dict[str, Slow]:
    """Ours by the name of the variant, compiled where that can be, and warm."""
    engines = {}
    for precision in PRECISIONS[method]:
        name = f"ours, {precision}"
        try:
            mode = Mode(options.device, compiles(), options.cache)
            engine = Slow(options.workplace.repository(network, precision), mode)
        except Unavailable as error:
            measured.missing[name] = str(error)
            continue
        stack.callback(engine.close)
        engine.map_of("grad_cam", LAYERS[network.name], Pictures(WARM).fitted(1, SIDE), 0)
        engines[name] = engine
    return engines


def _timed(name: str, measured: Measured, run: Callable[[], Tensor]) -> Tensor:
    """The map, on the host; the seconds that it took are noted."""
    started = time.perf_counter()
    found = run()
    measured.seconds.setdefault(name, []).append(time.perf_counter() - started)
    return found


def _peer(method: str, net: nn.Module, layer: str) -> Maps:
    """Its maps come at the network's input size, scaled to [0,1]. Batches are its own: 32 and 16."""
    from pytorch_grad_cam import AblationCAM, ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    twin, name = prepare(net, layer)
    cam = {"ablation_cam": AblationCAM, "score_cam": ScoreCAM}[method](twin, [twin.get_submodule(name)])
    return lambda images, classes: torch.from_numpy(cam(images, [ClassifierOutputTarget(one) for one in classes]))


def _table(network: Network, method: str, measured: Measured) -> Table:
    rows = []
    for name, seconds in measured.seconds.items():
        faster = Spread.of(ratios(measured.seconds[PEER], seconds))
        rows.append([name, rounded(float(np.median(seconds))), str(faster)])
    rows += [[name, reason, ""] for name, reason in measured.missing.items()]
    columns = ["variant", "seconds per picture", f"times faster than {PEER}"]
    return Table(f"Once per channel: {network.name}, {method} at {LAYERS[network.name]}", columns, rows)


def _targets(network: Network, method: str, measured: Measured) -> list[Target]:
    targets = []
    for precision in PRECISIONS[method]:
        if (method, precision) not in LEAST:
            continue
        name = f"ours, {precision}"
        seconds = measured.seconds.get(name)
        faster = Spread.of(ratios(measured.seconds[PEER], seconds)) if seconds else None
        what = f"{network.name}, {method}: {name}, times faster than {PEER}"
        targets.append(Target(what, LEAST[method, precision], faster, True, measured.missing.get(name, "")))
    return targets
