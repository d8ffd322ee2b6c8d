"""Whether an answer says what the oracle's says: the one to the same request, alone, while the server was quiet."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TOLERANCE = 1e-4
CORRELATION = 0.999
LEVELS, SHARE = 2, 0.01
"""A picture's pixels may differ by so many levels of 255, and a share of them by more."""

ARRAY = "application/x-npy"
VOLATILE = frozenset({"request_id"})
HEADERS = ("content-type", "x-class-id", "x-class-name")


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; the names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Difference(Exception):
    """Two answers to one request say different things; the message says where."""


def check_same(reply: Reply, oracle: Reply, chaotic: bool) -> None:
    """Raise Difference unless both say the same."""
    if reply.body == oracle.body:
        return
    for name in HEADERS:
        if reply.headers.get(name) != oracle.headers.get(name):
            raise Difference(f"{name}: {reply.headers.get(name)} for {oracle.headers.get(name)}")
    media_type = oracle.headers["content-type"]
    if media_type == "application/json":
        _check("", json.loads(reply.body), json.loads(oracle.body), chaotic)
    else:
        _check_number("x-confidence", *(float(one.headers["x-confidence"]) for one in (reply, oracle)))
        _check_data("body", media_type, reply.body, oracle.body, chaotic)


def _check(where: str, one: Any, other: Any, chaotic: bool) -> None:
    match one, other:
        case dict(), dict():
            _check_object(where, one, other, chaotic)
        case [float(), float()], [float(), float()]:  # a range of values
            if not chaotic:
                _check_array(where, np.array(one), np.array(other), chaotic)
        case list(), list() if len(one) == len(other):
            for index, pair in enumerate(zip(one, other, strict=True)):
                _check(f"{where}/{index}", *pair, chaotic)
        case float(), float():
            _check_number(where, one, other)
        case _ if one != other:
            raise Difference(f"{where}: {one!r:.100} for {other!r:.100}")


def _check_object(where: str, one: dict[str, Any], other: dict[str, Any], chaotic: bool) -> None:
    if one.keys() != other.keys():
        raise Difference(f"{where}: the keys {sorted(one)} for {sorted(other)}")
    for key in one.keys() - VOLATILE - {"data"}:
        _check(f"{where}/{key}", one[key], other[key], chaotic)
    if "data" in one:
        file, expected = (base64.b64decode(each["data"], validate=True) for each in (one, other))
        _check_data(f"{where}/data", one["media_type"], file, expected, chaotic)


def _check_number(where: str, one: float, other: float) -> None:
    if not abs(one - other) <= TOLERANCE:
        raise Difference(f"{where}: {one} for {other}")


def _check_data(where: str, media_type: str, one: bytes, other: bytes, chaotic: bool) -> None:
    if media_type == ARRAY:
        array, expected = (np.load(io.BytesIO(data), allow_pickle=False) for data in (one, other))
        _check_array(where, array, expected, chaotic)
    else:
        _check_pixels(where, _pixels(one), _pixels(other))


def _check_array(where: str, one: NDArray[Any], other: NDArray[Any], chaotic: bool) -> None:
    if one.shape != other.shape:
        raise Difference(f"{where}: the shape {one.shape} for {other.shape}")
    if chaotic:
        correlation = float(np.corrcoef(one.ravel(), other.ravel())[0, 1])
        if not correlation >= CORRELATION:
            raise Difference(f"{where}: the maps correlate {correlation:.5f}")
        return
    difference, largest = float(np.abs(one - other).max()), float(np.abs(other).max())
    if not difference <= TOLERANCE * largest:
        raise Difference(f"{where}: differs by {difference:.2g} where the largest value is {largest:.2g}")


def _pixels(file: bytes) -> NDArray[np.float32]:
    image = Image.open(io.BytesIO(file))
    return np.asarray(image).astype(np.float32) / np.float32(257 if image.mode.startswith("I") else 1)


def _check_pixels(where: str, one: NDArray[np.float32], other: NDArray[np.float32]) -> None:
    if one.shape != other.shape:
        raise Difference(f"{where}: the shape {one.shape} for {other.shape}")
    off = np.abs(one - other) > LEVELS
    share = float((off.any(axis=2) if off.ndim == 3 else off).mean())
    if share > SHARE:
        raise Difference(f"{where}: {100 * share:.1f} % of the pixels differ by more than {LEVELS} levels")
