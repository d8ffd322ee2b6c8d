"""What a `model.toml` says, checked and with every default filled in. No torch here: the parent process reads specs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from service.errors import ModelLoadError, nearest

FILE_NAME = "model.toml"
IMAGENET_LABELS = "imagenet-1k"
PUBLISHED_WEIGHTS = "default"
ID_PLACE = "<id>"

Precision = Literal["fp32", "bf16", "fp16"]

_SEED = re.compile(r"random:(\d{1,18})")
_IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"
_ARCHITECTURE = re.compile(
    rf"torchvision:[A-Za-z0-9_]+|timm:[A-Za-z0-9_.-]+|python:{_IDENTIFIER}(\.{_IDENTIFIER})*:{_IDENTIFIER}"
)
_WEIGHT_FILES = (".safetensors", ".pt", ".pth")

# Strict, because a quoted or boolean number in a TOML file is a slip and not a number.
_Pixels = Annotated[int, Field(strict=True, ge=1, le=4096)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputSpec(_Section):
    """`[input]`: how a picture becomes the network's input. `size` is (height, width), `resize` the shorter side."""

    size: tuple[_Pixels, _Pixels] = (224, 224)
    fit: Literal["crop", "stretch", "letterbox"] = "crop"
    resize: Annotated[int, Field(strict=True, ge=1, le=8192)] = 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[_Number, _Number, _Number] = (0.485, 0.456, 0.406)
    std: tuple[_Positive, _Positive, _Positive] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _crop_lies_inside(self) -> InputSpec:
        if self.fit == "crop" and self.resize < max(self.size):
            raise ValueError(f"resize = {self.resize} is smaller than the crop: at least max(size) = {max(self.size)}")
        return self


class OutputSpec(_Section):
    """`[output]`: what the network's graph ends in, and how confidences are made of the logits before that.

    Without `confidence` they are made by what the graph ends in, of logits by a softmax.
    """

    activation: Literal["logits", "softmax", "sigmoid"] = "logits"
    confidence: Literal["softmax", "sigmoid"] | None = None


class ServingSpec(_Section):
    """`[serving]`: how the network is computed."""

    precision: Precision = "fp32"


class ModelSpec(_Section):
    """A whole `model.toml`; key by key as "Model repository" in the contract describes it."""

    architecture: str
    weights: str
    labels: str = Field(default="class <id>", min_length=1)
    type: str = Field(default="classification", min_length=1)
    architecture_args: dict[str, Any] = {}
    input: InputSpec = InputSpec()
    output: OutputSpec = OutputSpec()
    serving: ServingSpec = ServingSpec()

    @property
    def seed(self) -> int | None:
        """The seed of `weights = "random:<seed>"`, None for weights of another origin."""
        match = _SEED.fullmatch(self.weights)
        return int(match[1]) if match else None

    @field_validator("architecture")
    @classmethod
    def _known_origin(cls, value: str) -> str:
        if not _ARCHITECTURE.fullmatch(value):
            raise ValueError("should be torchvision:<builder>, timm:<name> or python:<package.module>:<factory>")
        return value

    @field_validator("weights")
    @classmethod
    def _file_default_or_random(cls, value: str) -> str:
        if value == PUBLISHED_WEIGHTS or _SEED.fullmatch(value):
            return value
        if PurePath(value).suffix not in _WEIGHT_FILES:
            raise ValueError(
                "should be a file (.safetensors, .pt, .pth), default, or random:<seed> with at most 18 digits"
            )
        return _inside(value)

    @field_validator("labels")
    @classmethod
    def _template_set_or_file(cls, value: str) -> str:
        return value if value == IMAGENET_LABELS or ID_PLACE in value else _inside(value)


_KEYS: dict[tuple[str, ...], list[str]] = {
    (): list(ModelSpec.model_fields),
    ("input",): list(InputSpec.model_fields),
    ("output",): list(OutputSpec.model_fields),
    ("serving",): list(ServingSpec.model_fields),
}


def read_spec(folder: Path) -> ModelSpec:
    """The spec of one model folder.

    Raises ModelLoadError where `model.toml` is missing, unreadable, no TOML, or has a wrong or unknown key.
    """
    try:
        values = tomllib.loads((folder / FILE_NAME).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{FILE_NAME} is missing") from None
    except OSError as error:
        raise ModelLoadError(f"{FILE_NAME} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelLoadError(f"{FILE_NAME} is no valid TOML: {error}") from None
    try:
        return ModelSpec.model_validate(values)
    except ValidationError as error:
        raise ModelLoadError(f"{FILE_NAME}: {'; '.join(_problems(error))}") from None


def file_in(folder: Path, name: str, key: str) -> Path:
    """The file that `key` names, in the model's folder or below it, symbolic links followed.

    Raises ModelLoadError where there is no such file, or where it leads out of the folder.
    """
    try:
        path = (folder / name).resolve()
        inside = path.is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelLoadError(f"{key}: {name!r} cannot be followed: {error}") from None
    if not inside:
        raise ModelLoadError(f"{key}: {name!r} leads out of the model's folder")
    if not path.is_file():
        raise ModelLoadError(f"{key}: there is no file {name!r} in the model's folder")
    return path


def _inside(name: str) -> str:
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("should be a file in the model's folder, given relative to it")
    return name


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        yield _sentence(problem)


def _sentence(problem: ErrorDetails) -> str:
    key = _dotted(problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            return f"{key} is no key.{nearest(str(problem['loc'][-1]), _candidates(problem['loc']))}"
        case "missing":
            return f"{key} is missing"
        case "model_type" | "dict_type":
            return f"{key} should be a table"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case _:
            return f"{key}: {problem['msg']}, got {problem['input']!r}"


def _dotted(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _candidates(location: tuple[int | str, ...]) -> Iterator[str]:
    """Keys that may have been meant: those of the same table, and the same key where it belongs to another one."""
    *here, unknown = location
    for table, keys in _KEYS.items():
        if tuple(here) == table:
            yield from keys
        elif unknown in keys:
            yield ".".join((*table, str(unknown)))
