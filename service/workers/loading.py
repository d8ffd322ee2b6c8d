"""From a folder of the repository to a model that the engine serves, proven by a first heatmap, or the reason."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from service.errors import ModelLoadError
from service.models.layers import Layer
from service.models.repository import Entry
from service.models.resident import Model, load
from service.models.spec import ModelSpec, read_spec
from service.workers.engine import Engine
from service.workers.messages import SERVED_TYPE, ExplainRequest, LayerInfo, ModelInfo
from service.workers.plan import make_plan

logger = logging.getLogger(__name__)


def load_into(engine: Engine, entry: Entry, captured: Path | None = None) -> ModelInfo:
    """Load one model; the engine serves it afterwards unless the state is `failed`.

    `captured` is a folder in which captured programs are kept.
    """
    spec: ModelSpec | None = None
    try:
        spec = read_spec(entry.folder)
        if spec.type != SERVED_TYPE:
            raise ModelLoadError(f"models of type {spec.type!r} are not supported, only {SERVED_TYPE!r}")
        model = load(entry.id, spec, entry.folder, engine.device.device, captured, engine.activations)
        info = describe(model)
        _prove(model, engine)
    except BaseException as error:  # a builder may raise anything, SystemExit too
        expected = isinstance(error, ModelLoadError)
        logger.warning("model %s cannot be served: %s", entry.id, error, exc_info=not expected)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        return ModelInfo(
            entry.id,
            state="failed",
            reason=reason,
            type=spec.type if spec else None,
            architecture=spec.architecture if spec else None,
        )
    engine.models[entry.id] = model
    logger.info("model %s is ready", entry.id)
    return info


def _prove(model: Model, engine: Engine) -> None:
    """Explain two random pictures, backward to the default layer, if there is one, and to the picture."""
    size = (2, *model.spec.input.size, 3)
    pictures = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    methods = ("grad_cam", "saliency") if model.cut else ("saliency",)
    request = ExplainRequest(model.id, pictures=(b"",) * 2, target_classes=((),) * 2, methods=methods)
    try:
        engine.device.run(model, make_plan(request, model), pictures)
    except Exception as error:
        raise ModelLoadError(f"its first heatmap failed: {type(error).__name__}: {error}") from error


def describe(model: Model) -> ModelInfo:
    """What `GET /models/{id}` tells of a model that serves."""
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
        num_classes=len(model.labels),
        default_layer=layers.default,
        recommended_layer=layers.recommended,
        compiled_layers=model.heads.compiled_layers,
        compiled_bytes=model.heads.compiled_bytes,
        layers=tuple(_describe_layer(row, model) for row in layers.rows),
        classes=model.labels,
    )


def _describe_layer(row: Layer, model: Model) -> LayerInfo:
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
