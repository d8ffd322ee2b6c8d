"""The command line of both HTTP peers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from benchmarks.networks import NETWORKS, Network


@dataclass(frozen=True)
class Command:
    network: Network
    weights: Path
    device: str
    port: int
    png_level: int

    def load(self, device: str) -> tuple[nn.Module, nn.Module]:
        """The network, and the module in it that pytorch-grad-cam is given."""
        net = self.network.load(self.weights, device)
        parent, _, _ = self.network.layer.rpartition(".")
        # What its README names for ResNets, the last block: one addition and one ReLU behind our default layer.
        layer = parent if self.network.name == "resnet50" else self.network.layer
        return net, net.get_submodule(layer)


def parse() -> Command:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--png-level", type=int, required=True)
    given = parser.parse_args()
    return Command(NETWORKS[given.network], given.weights, given.device, given.port, given.png_level)
