"""The worker's process: loads the models, takes jobs from its pipe and answers there."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from service.errors import ModelLoadError
from service.explain import REGISTRY, Method
from service.models.layers import Layer
from service.models.repository import Entry, scan
from service.models.resident import Model, load
from service.models.spec import ModelSpec, read_spec
from service.settings import Settings
from service.workers.compute import Device
from service.workers.engine import Engine
from service.workers.messages import (
    Cancel,
    ExplainRequest,
    Hello,
    Job,
    LayerInfo,
    MethodInfo,
    ModelChanged,
    ModelInfo,
    Stop,
    ToParent,
)
from service.workers.plan import make_plan

logger = logging.getLogger(__name__)


def main(connection: Connection, device_name: str, settings: Settings, folder: Path) -> None:
    """Serve until told to stop, or until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=settings.log_level.upper(), format=f"%(levelname)s [{device_name}] %(message)s")
    lock = threading.Lock()

    def send(message: ToParent) -> None:
        with lock, contextlib.suppress(OSError):
            connection.send(message)

    engine = Engine(Device(device_name, settings.streams), settings)
    send(Hello(device_name, engine.capacity, tuple(_method_info(method) for method in REGISTRY.values())))

    def load_all() -> None:
        for entry in scan(settings.models):
            send(ModelChanged(_load(entry, engine, folder)))

    threading.Thread(target=load_all, name="load", daemon=True).start()
    try:
        while True:
            match connection.recv():
                case Job() as job:
                    engine.submit(job, send)
                case Cancel(id=job_id):
                    engine.cancel(job_id)
                case Stop():
                    engine.close()
                    break
    except (EOFError, OSError):
        pass
    # A model may still be loading: an ordinary exit would wait for it, or tear torch down under it.
    logging.shutdown()
    os._exit(0)


def _load(entry: Entry, engine: Engine, folder: Path) -> ModelInfo:
    """Load one model and prove that it explains, backward to its default layer and to the picture included."""
    spec: ModelSpec | None = None
    try:
        spec = read_spec(entry.folder)
        if spec.type != "classification":
            raise ModelLoadError(f"models of type {spec.type!r} are not supported; the type 'classification' is")
        model = load(entry.id, spec, entry.folder, engine.device.device, folder)
        info = _model_info(model)
        _prove(model, engine)
    except Exception as error:
        expected = isinstance(error, ModelLoadError)
        logger.warning("model %s cannot be served: %s", entry.id, error, exc_info=not expected)
        return ModelInfo(
            entry.id,
            state="failed",
            reason=str(error),
            type=spec.type if spec else None,
            architecture=spec.architecture if spec else None,
        )
    engine.models[entry.id] = model
    logger.info("model %s is ready", entry.id)
    return info


def _prove(model: Model, engine: Engine) -> None:
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (2, *model.spec.input.size, 3), dtype=np.uint8)
    request = ExplainRequest(model.id, pictures=(b"",) * 2, target_classes=((),) * 2, methods=("guided_grad_cam",))
    try:
        engine.device.run(model, make_plan(request, model), pictures, lambda: None, max_batch=2)
    except Exception as error:
        raise ModelLoadError(f"its first heatmap failed: {type(error).__name__}: {error}") from error


def _model_info(model: Model) -> ModelInfo:
    layers = model.layers
    return ModelInfo(
        id=model.id,
        state="ready",
        revision=model.revision,
        type=model.spec.type,
        architecture=model.spec.architecture,
        device=str(model.device),
        runtime="gpu" if model.device.type == "cuda" else "cpu",
        precision=model.spec.serving.precision,
        input=model.spec.input.model_dump(mode="json"),
        num_classes=model.program.num_classes,
        default_layer=layers.default,
        recommended_layer=layers.recommended,
        layers=tuple(_layer_info(row, model) for row in layers.rows),
        classes=model.labels,
    )


def _layer_info(row: Layer, model: Model) -> LayerInfo:
    return LayerInfo(
        name=row.name,
        type=row.type,
        output_shape=row.output_shape,
        parameters=row.parameters,
        target=row.grid is not None,
        reason=row.reason,
        default=row.name == model.layers.default,
        recommended=row.name == model.layers.recommended,
        relu=model.layers.relu(row),
    )


def _method_info(method: Method) -> MethodInfo:
    return MethodInfo(
        name=method.name,
        family=method.family,
        channels=method.channels,
        paper=method.paper,
        description=method.description,
        cost=method.cost,
        gen_params=method.Params.model_json_schema(),
    )
