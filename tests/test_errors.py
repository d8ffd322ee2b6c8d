"""The error tree: statuses and codes as the contract's table has them, and the way across the process border."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator

import pytest

from service.errors import FieldError, ServiceError, nearest

# The contract's section "Errors", and the code of each row's cases.
TABLE = {
    400: {"malformed_body", "malformed_request"},
    401: {"key_missing", "key_wrong"},
    403: {"key_lacks_right"},
    404: {"model_not_found", "path_not_found"},
    405: {"method_not_allowed"},
    406: {"not_acceptable"},
    408: {"body_timeout", "headers_timeout"},
    413: {"body_too_large", "too_many_pictures", "too_many_pixels", "picture_too_slow"},
    415: {"unsupported_media_type"},
    421: {"host_not_allowed"},
    422: {
        "invalid_request",
        "unknown_method",
        "unknown_layer",
        "unknown_class",
        "invalid_gen_params",
        "undecodable_picture",
        "model_type_not_supported",
        "method_not_supported",
        "picture_quarantined",
    },
    429: {"queue_full", "rate_limited"},
    431: {"headers_too_large"},
    500: {"internal_error"},
    503: {
        "unavailable",
        "model_loading",
        "model_failed",
        "model_unloaded",
        "no_worker",
        "worker_lost",
        "draining",
        "answers_unread",
        "too_many_connections",
    },
    504: {"deadline_exceeded", "deadline_too_short"},
    507: {"out_of_device_memory"},
}


def family(kind: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    """The service's error classes, without those that other tests make."""
    if kind.__module__ == "service.errors":
        yield kind
    for child in kind.__subclasses__():
        yield from family(child)


KINDS = sorted(family(), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_pickles_with_all_its_fields(kind: type[ServiceError]) -> None:
    error = kind("what was wrong", errors=(FieldError("/images/1", "cut short"),), retry_after=1.5)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert (copy.status, copy.code, copy.title) == (kind.status, kind.code, kind.title)
    assert str(copy) == "what was wrong"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_an_error_does_not_say_is_empty(kind: type[ServiceError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what was wrong")))
    assert (error.detail, error.errors, error.retry_after) == ("what was wrong", (), None)


def test_statuses_and_codes_are_those_of_the_contract() -> None:
    told: dict[int, set[str]] = {}
    for kind in KINDS:
        told.setdefault(kind.status, set()).add(kind.code)
    assert told == TABLE


def test_a_code_belongs_to_one_class_and_is_snake_case() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


def test_every_class_has_a_title_of_its_own() -> None:
    titles = [kind.title for kind in KINDS]
    assert all(titles)
    assert len(titles) == len(set(titles))


def test_nearest_names_what_may_have_been_meant() -> None:
    names = ["grad_cam", "guided_grad_cam", "score_cam", "saliency"]
    assert nearest("grad_cm", names).startswith(" Did you mean 'grad_cam'")
    assert nearest("grad_cam_guided", iter(names)).count("' or '") <= 2
    assert nearest("xyzzy", names) == ""
    assert nearest("grad_cam", []) == ""


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GradCAM", "grad_cam"),
        ("gradcam++", "grad_cam_plus_plus"),
        ("Grad-CAM++", "grad_cam_plus_plus"),
        ("HiResCAM", "hires_cam"),
        ("ScoreCAM", "score_cam"),
        ("TABBY", "tabby"),
        ("tiger-cat", "Tiger cat"),
        ("EFFICIENTNET", "efficientnet_lite0"),
    ],
)
def test_nearest_looks_neither_at_case_nor_at_how_words_are_joined(name: str, meant: str) -> None:
    names = ["hires_cam", "score_cam", "grad_cam", "grad_cam_plus_plus", "tabby", "Tiger cat", "efficientnet_lite0"]
    assert nearest(name, names).startswith(f" Did you mean {meant!r}")


def test_nearest_names_all_that_differ_in_case_alone_and_none_twice() -> None:
    assert nearest("CRANE", ["crane", "Crane", "crane"]) == " Did you mean 'crane' or 'Crane'?"
