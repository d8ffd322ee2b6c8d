"""From a request to what has to be computed, with every name resolved and every value checked. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError

import service.methods  # noqa: F401  (registers the methods)
from service.errors import (
    MAX_ECHO,
    FieldError,
    InvalidGenParams,
    InvalidRequest,
    MethodNotSupported,
    UnknownClass,
    UnknownMethod,
    echo,
    nearest,
)
from service.explain.method import REGISTRY, CamParams, GenParams, LayerParams, Method
from service.models.layers import Target
from service.models.resident import Model
from service.workers.messages import ClassRef, ExplainRequest


@dataclass(frozen=True)
class Task:
    """One method with its parameters. `effective` are all of them, as the answer shows them."""

    method: Method
    params: GenParams
    targets: tuple[Target, ...]

    @property
    def effective(self) -> dict[str, object]:
        layers = {"target_conv_layer": [target.name for target in self.targets]} if self.targets else {}
        return {**self.params.model_dump(), **layers}


@dataclass(frozen=True)
class Plan:
    """What is computed: every task for every class of each picture; no classes stands for the top class."""

    tasks: tuple[Task, ...]
    classes: tuple[tuple[int, ...], ...]


def make_plan(request: ExplainRequest, model: Model) -> Plan:
    """Resolve a request. Raises the InvalidRequest that names the field and what would be right."""
    listed = len(request.methods) > 1  # a client may write one method without a list around it
    methods = [_method(name, f"/method/{i}" if listed else "/method") for i, name in enumerate(request.methods)]
    tasks = tuple(_task(method, request.gen_params, methods, model) for method in methods)
    classes = {  # most often all pictures have the same
        references: tuple(_class_id(reference, model) for reference in references)
        for references in dict.fromkeys(request.target_classes)
    }
    return Plan(tasks, tuple(classes[references] for references in request.target_classes))


def _method(name: str, pointer: str) -> Method:
    if name not in REGISTRY:
        detail = f"There is no method {echo(name)}; GET /methods lists them.{nearest(name, REGISTRY)}"
        raise UnknownMethod(detail, errors=(FieldError(pointer, detail),))
    return REGISTRY[name]


def _task(method: Method, gen_params: Mapping[str, object], asked: list[Method], model: Model) -> Task:
    params = _validated(method, gen_params, asked)
    try:
        targets = _targets(params, model)
    except InvalidRequest as error:
        key = "use_conv_only" if isinstance(error, InvalidGenParams) else "target_conv_layer"
        error.errors = (_blame(error.detail, *_path(method, gen_params, key)),)
        raise
    for target in targets or (None,):
        if reason := method.refusal(model.program, target):
            where = f" at {target.name!r}" if target else ""
            hint = _way_out(method, params, model)
            detail = f"{method.name} cannot explain the model {model.id!r}{where}: {reason}.{hint}"
            raise MethodNotSupported(detail, errors=(FieldError("/method", detail),))
    if method.rule(params) and (unknown := model.program.nonlinearities.unknown):
        detail = (
            f"{method.name} cannot explain the model {model.id!r} by the rule {method.rule(params)!r}: it is not known "
            f"whether {unknown} is an activation function."
        )
        raise MethodNotSupported(detail, errors=(FieldError("/method", detail),))
    return Task(method, params, targets)


def _way_out(method: Method, params: GenParams, model: Model) -> str:
    """A sentence that says so where the recommended layer would do, with all other parameters as they are."""
    try:
        targets = _targets(params.model_copy(update={"target_conv_layer": ("recommended",)}), model)
    except InvalidRequest:
        return ""
    if not targets or method.refusal(model.program, targets[0]):
        return ""
    return f" target_conv_layer 'recommended', which is {targets[0].name!r}, can be explained."


def _targets(params: GenParams, model: Model) -> tuple[Target, ...]:
    if not isinstance(params, LayerParams):
        return ()
    use_conv_only = params.use_conv_only if isinstance(params, CamParams) else True
    return tuple(model.layers.target(name, use_conv_only) for name in params.target_conv_layer or (None,))


def _own_params(method: Method, gen_params: Mapping[str, object], asked: list[Method]) -> dict[str, object]:
    """The common parameters and those under the method's own name."""
    names = {other.name for other in asked}
    common = {key: value for key, value in gen_params.items() if key not in REGISTRY}
    for key in gen_params.keys() - common.keys() - names:
        raise _wrong(f"gen_params has parameters for {key!r}, which is not among the methods asked for.", key)
    own = gen_params.get(method.name, {})
    if not isinstance(own, Mapping):
        raise _wrong(f"The parameters of {method.name!r} alone are an object, not {echo(own)}.", method.name)
    return {**common, **own}


def _validated(method: Method, gen_params: Mapping[str, object], asked: list[Method]) -> GenParams:
    try:
        return method.Params.model_validate(_own_params(method, gen_params, asked))
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0])
        path = _path(method, gen_params, key)
        if problem["type"] != "extra_forbidden":
            detail = f"{key!r} of {method.name}: {problem['msg']}, got {echo(problem['input'])}."
            raise _wrong(detail, *path) from None
        known = method.Params.model_fields
        may_be_method = len(path) == 1 and isinstance(problem["input"], Mapping)
        hint = _takers(key, asked) or nearest(key, (*known, *REGISTRY) if may_be_method else known)
        detail = f"{method.name} takes no parameter {echo(key)}, but {', '.join(known)}.{hint}"
        raise _wrong(detail, *path) from None


def _takers(key: str, asked: list[Method]) -> str:
    """A sentence that gives the parameter to those of the methods asked for that take it; empty where none does."""
    takers = [method.name for method in asked if key in method.Params.model_fields]
    example = ", ".join(f'"{name}": {{"{key}": ...}}' for name in takers)
    return f" Give it to {' and '.join(takers)} alone: {{{example}}}." if takers else ""


def _path(method: Method, gen_params: Mapping[str, object], key: str) -> tuple[str, ...]:
    """Where in gen_params a method's parameter stands: in the method's own object, if it is there."""
    own = gen_params.get(method.name)
    return (method.name, key) if isinstance(own, Mapping) and key in own else (key,)


def _blame(detail: str, *path: str) -> FieldError:
    steps = (step[:MAX_ECHO].replace("~", "~0").replace("/", "~1") for step in path)
    return FieldError("/".join(("/gen_params", *steps))[:MAX_ECHO], detail)


def _wrong(detail: str, *path: str) -> InvalidGenParams:
    return InvalidGenParams(detail, errors=(_blame(detail, *path),))


def _class_id(reference: ClassRef, model: Model) -> int:
    if isinstance(reference, int):
        if 0 <= reference < len(model.labels):
            return reference
        raise _unknown_class(f"The model's classes are 0 to {len(model.labels) - 1}; there is no class {reference}.")
    found = model.class_ids.get(reference, [])
    if len(found) == 1:
        return found[0]
    if found:
        raise _unknown_class(f"The name {echo(reference)} belongs to the classes {found}; give the id of one of them.")
    hint = nearest(reference, model.labels)
    raise _unknown_class(f"The model has no class {echo(reference)}; GET /models/<id>/classes lists them.{hint}")


def _unknown_class(detail: str) -> UnknownClass:
    return UnknownClass(detail, errors=(FieldError("/target_classes", detail),))
