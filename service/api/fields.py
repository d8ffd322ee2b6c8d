"""From what a client wrote to checked fields: text of forms and queries is read here, and every mistake is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from pydantic_core import from_json

from service.api.schemas import HeatmapFields, InferFields
from service.errors import MAX_ECHO, FieldError, InvalidRequest, echo, nearest

MAX_ERRORS = 10
MAX_DIGITS = 15
MAX_JSON_VALUES = 50_000
MAX_JSON_ESCAPES = 1_000_000
MAX_JSON_WIDE_BYTES = 8 * 1024 * 1024
MAX_DEPTH = 200  # pydantic's JSON reader goes no deeper

# What else might be taken for a field: the parameters of grad_cam, HALCON's among them, each with a value.
PARAMETERS: dict[str, object] = {
    "target_conv_layer": "recommended",
    "use_conv_only": False,
    "scaling": "none",
    "aug_smooth": True,
    "eigen_smooth": True,
    "grad_modifier": "relu",
    "backprop_modifier": "guided",
}

Fields = TypeVar("Fields", bound=InferFields)


def wrong(pointer: str, detail: str) -> InvalidRequest:
    """The error that blames one place of the request."""
    return InvalidRequest(f"{pointer}: {detail}", errors=(FieldError(pointer, detail),))


def invalid(problems: Sequence[Mapping[str, Any]], values: object) -> InvalidRequest:
    """Pydantic's findings about `values` as one error with JSON pointers."""
    found = tuple(
        FieldError(_pointer(problem["loc"], values), f"{problem['msg']}; got {echo(problem['input'])}.")
        for problem in problems[:MAX_ERRORS]
    )
    return InvalidRequest(_summary(found), errors=found)


def validate(kind: type[Fields], values: Mapping[str, object], beside: tuple[str, ...] = ()) -> Fields:
    """Check values of JSON types strictly. `beside` are the names that the encoding takes besides the fields."""
    if unknown := [name for name in values if name not in kind.model_fields]:
        raise _unknown_fields(unknown, (*kind.model_fields, *beside))
    try:
        return kind.model_validate(dict(values), strict=True)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False), values) from None


def from_text(items: Iterable[tuple[str, str]]) -> dict[str, object]:
    """Values of a form or query as JSON types. An empty one counts as not given; unknown names stay, to be refused."""
    texts: dict[str, list[str]] = {}
    for name, text in items:
        texts.setdefault(name, []).extend([text] if text else [])
    return {
        name: READERS[name](name, given) if name in READERS else None
        for name, given in texts.items()
        if given or name not in READERS
    }


def check_names(query: Iterable[tuple[str, str]], known: Sequence[str]) -> None:
    """Refuse what is not known in the query of a path without a body, and a name that is given twice."""
    texts: dict[str, list[str]] = {}
    for name, text in query:
        texts.setdefault(name, []).append(text)
    unknown = [name for name in texts if name not in known]
    if unknown and not known:
        raise wrong(_pointer(unknown[:1], texts), "There is no such field; the path takes none.")
    if unknown:
        raise _unknown_fields(unknown, known)
    for name, given in texts.items():
        _single(name, given)


def merge(query: Mapping[str, object], body: Mapping[str, object]) -> dict[str, object]:
    """Fields of query and body together; none may be in both."""
    for name in sorted(query.keys() & body.keys()):
        raise wrong(_pointer((name,), query), "The field is given twice, in query and body.")
    return {**query, **body}


def _unknown_fields(unknown: Sequence[str], known: Sequence[str]) -> InvalidRequest:
    found = tuple(
        FieldError(_pointer((name,), {name: None}), f"There is no such field.{_meant(name, known)}")
        for name in unknown[:MAX_ERRORS]
    )
    return InvalidRequest(f"{_summary(found)} The fields are {', '.join(known)}.", errors=found)


def _summary(found: Sequence[FieldError]) -> str:
    """The first error, and where the others are."""
    more = f" {len(found) - 1} more: see errors." if len(found) > 1 else ""
    return f"{found[0].pointer}: {found[0].detail}{more}"


def _meant(name: str, known: Sequence[str]) -> str:
    if name in PARAMETERS and "gen_params" in known:
        return f" It is a member of the field gen_params, such as {json.dumps({name: PARAMETERS[name]})}."
    return nearest(name, known)


def _pointer(location: Iterable[int | str], values: object) -> str:
    """A JSON pointer into `values`. Pydantic's names of union branches are no keys there and fall out.

    It is cut to MAX_ECHO characters.
    """
    pointer, here = "", values
    for step in location:
        keys: Any = here if isinstance(here, Mapping) else range(len(here)) if isinstance(here, list) else ()
        if step in keys:
            here = cast(Any, here)[step]
            pointer += "/" + str(step)[:MAX_ECHO].replace("~", "~0").replace("/", "~1")
    return pointer[:MAX_ECHO]


def _single(name: str, texts: list[str]) -> str:
    if len(texts) > 1:
        raise wrong(f"/{name}", "The field is given twice.")
    return texts[0]


def _number(name: str, texts: list[str]) -> object:
    text = _single(name, texts)
    if not text.isascii() or "_" in text:  # Python reads more digits than JSON has
        return text
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _object(name: str, texts: list[str]) -> Any:
    return _json(name, _single(name, texts), "an object, such as {}")


def _names(name: str, texts: list[str]) -> Any:
    if len(texts) == 1 and texts[0].lstrip().startswith("["):
        return _json(name, texts[0], "an array; or repeat the field")
    return texts


def _classes(name: str, texts: list[str]) -> Any:
    given = _names(name, texts)
    return [_class_of(text) for text in texts] if given is texts else given


def _class_of(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else text


class Shape:
    """Counts what makes JSON slow to parse while it arrives, for the parser holds the event loop.

    Every value follows a comma, a colon or an opening bracket. Base64 has none of them, and no backslash; but some
    clients write its slashes as two characters, which are one in 64 of its characters. A text is wide if a character
    is not ASCII: one such character makes Python keep the whole text in up to four bytes for each character.
    """

    def __init__(self) -> None:
        self._values = self._escapes = self._wide = 0
        self._held = b""  # a backslash at the end, so that no escape is cut in two
        self._length = 0  # bytes since the last quotation mark
        self._is_wide = False

    def add(self, chunk: bytes) -> None:
        """Raises InvalidRequest where there are too many."""
        chunk = self._held + chunk
        self._held = chunk[-1:] if chunk.endswith(b"\\") else b""
        chunk = chunk.removesuffix(b"\\")
        self._values += sum(map(chunk.count, b",:[{")) + chunk.count(b'"') // 2
        self._escapes += chunk.count(b"\\")
        if self._values > MAX_JSON_VALUES:
            limit = f"{MAX_JSON_VALUES} commas, colons, opening brackets and pairs of quotation marks"
            raise InvalidRequest(f"The JSON has more than {limit}; send fewer values.")
        if self._escapes > MAX_JSON_ESCAPES:
            raise InvalidRequest(f"The JSON has more than {MAX_JSON_ESCAPES} backslashes; send its texts unescaped.")
        self._add_texts(chunk.split(b'"'))
        if self._wide > MAX_JSON_WIDE_BYTES:
            limit = f"{MAX_JSON_WIDE_BYTES} bytes of texts that are not ASCII"
            raise InvalidRequest(f"The JSON has more than {limit}; a picture is base64, which is.")

    def _add_texts(self, parts: list[bytes]) -> None:
        """Count the bytes of wide texts. An escaped quotation mark ends none."""
        for before, part in pairwise([b"\\", *parts]):
            if not before.endswith(b"\\"):
                self._length, self._is_wide = 0, False
            self._length += len(part)
            if self._is_wide:
                self._wide += len(part)
            elif not part.isascii() or b"\\u" in part:
                self._is_wide = True
                self._wide += self._length


def read_json(text: str | bytes) -> Any:
    """The value that a JSON text has. Raises ValueError, which says where it breaks off, or how deep it may be."""
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(str(error).replace("recursion limit", f"nesting limit of {MAX_DEPTH} levels")) from None


def _json(name: str, text: str, hint: str) -> Any:
    Shape().add(text.encode(errors="replace"))
    try:
        return read_json(text)
    except ValueError as error:
        raise wrong(f"/{name}", f"The text is no JSON ({error}); it must be {hint}.") from None


Reader = Callable[[str, list[str]], object]
READERS: dict[str, Reader] = {
    **dict.fromkeys(HeatmapFields.model_fields, _single),
    "method": _names,
    "target_classes": _classes,
    "gen_params": _object,
    "top_k": _number,
    "alpha": _number,
    "timeout_s": _number,
}
