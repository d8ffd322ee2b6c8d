"""LitServe with pytorch-grad-cam in batches of 8: decode, predict and encode are its documented steps."""

# No postponed annotations here: LitServe reads that of `decode_request` as it is.
from typing import Any

import litserve
import torch
from fastapi import Request
from pytorch_grad_cam import GradCAM

from benchmarks.peers.cams import tokens_to_map
from benchmarks.peers.command import Command, parse
from benchmarks.peers.pictures import Picture, answer, decode, preprocessing

BATCH = 8
BATCH_TIMEOUT_S = 0.01


class Heatmaps(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, command: Command) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=BATCH_TIMEOUT_S)
        self.command = command

    def setup(self, device: str) -> None:
        net, layer = self.command.load(device)
        self.cam = GradCAM(net, [layer], reshape_transform=tokens_to_map if self.command.network.tokens else None)
        self.prepare = preprocessing(self.command.network)

    def decode_request(self, request: Request) -> Picture:
        upload: Any = request["image"]
        return decode(upload.file.read(), self.prepare)

    def batch(self, inputs: list[Picture]) -> list[Picture]:
        return inputs

    def predict(self, pictures: list[Picture]) -> list[tuple[Picture, Any, torch.Tensor]]:
        heatmaps = self.cam(torch.stack([picture.tensor for picture in pictures]), None)
        scores: torch.Tensor = self.cam.outputs.detach()
        return list(zip(pictures, heatmaps, scores.softmax(1).cpu(), strict=True))

    def encode_response(self, output: tuple[Picture, Any, torch.Tensor]) -> dict[str, Any]:
        picture, heatmap, confidences = output
        return answer(picture, heatmap, confidences, self.command.png_level)


if __name__ == "__main__":
    chosen = parse()
    server = litserve.LitServer(
        Heatmaps(chosen), accelerator="cuda" if chosen.device.startswith("cuda") else "cpu", devices=1, timeout=120
    )
    server.run(host="127.0.0.1", port=chosen.port, num_api_servers=1, log_level="warning", generate_client_file=False)
