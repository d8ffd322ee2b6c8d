"""FastAPI with pytorch-grad-cam, as a careful user writes it.

The model is loaded once; decoding and rendering run in FastAPI's threads, and a lock guards the hooks, which two
requests must not share.
"""

from __future__ import annotations

import threading
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI, File, UploadFile
from pytorch_grad_cam import GradCAM

from benchmarks.peers.cams import tokens_to_map
from benchmarks.peers.command import Command, parse
from benchmarks.peers.pictures import answer, decode, preprocessing


def create_app(command: Command) -> FastAPI:
    net, layer = command.load(command.device)
    cam = GradCAM(net, [layer], reshape_transform=tokens_to_map if command.network.tokens else None)
    prepare = preprocessing(command.network)
    lock = threading.Lock()
    app = FastAPI()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/predict")
    def predict(image: Annotated[UploadFile, File()]) -> dict[str, Any]:
        picture = decode(image.file.read(), prepare)
        with lock:
            heatmap = cam(picture.tensor[None], None)[0]
            scores: torch.Tensor = cam.outputs.detach()[0]
        return answer(picture, heatmap, scores.softmax(0).cpu(), command.png_level)

    return app


if __name__ == "__main__":
    chosen = parse()
    uvicorn.run(create_app(chosen), host="127.0.0.1", port=chosen.port, log_level="warning")
