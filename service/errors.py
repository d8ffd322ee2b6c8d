"""The error tree: a class has a status, a stable code and a title; an instance says what was wrong and what is right.

Errors cross the process border, so they pickle; HTTP turns them into problem+json.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass

MAX_ECHO = 200
"""An error or a log line shows at most this many characters of any one value that a client sent."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3  # six levels of six entries would be megabytes

FORM = str.maketrans({"_": "", "-": "", " ": "", "+": "plus"})


@dataclass(frozen=True)
class FieldError:
    """One place in the input that is to blame: a JSON pointer (RFC 6901) into the request's fields."""

    pointer: str
    detail: str


class ServiceError(Exception):
    """A problem that a client may see. `retry_after` is in seconds; None where trying again is of no use."""

    status = 500
    code = "internal_error"
    title = "Internal error"

    def __init__(self, detail: str, *, errors: tuple[FieldError, ...] = (), retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.detail, self.errors, self.retry_after)


def _rebuild(
    kind: type[ServiceError], detail: str, errors: tuple[FieldError, ...], retry_after: float | None
) -> ServiceError:
    return kind(detail, errors=errors, retry_after=retry_after)


class MalformedRequest(ServiceError):
    status, code, title = 400, "malformed_request", "The request is not valid HTTP"


class MalformedBody(ServiceError):
    status, code, title = 400, "malformed_body", "The body cannot be read"


class KeyMissing(ServiceError):
    status, code, title = 401, "key_missing", "A key is needed"


class KeyWrong(ServiceError):
    status, code, title = 401, "key_wrong", "The key is not known"


class KeyLacksRight(ServiceError):
    status, code, title = 403, "key_lacks_right", "The key lacks the right"


class ModelNotFound(ServiceError):
    status, code, title = 404, "model_not_found", "No such model"


class PathNotFound(ServiceError):
    status, code, title = 404, "path_not_found", "No such path"


class MethodNotAllowed(ServiceError):
    status, code, title = 405, "method_not_allowed", "The path does not take this verb"


class BodyTimeout(ServiceError):
    status, code, title = 408, "body_timeout", "The body came too slowly"


class NotAcceptable(ServiceError):
    status, code, title = 406, "not_acceptable", "No acceptable answer format"


class BodyTooLarge(ServiceError):
    status, code, title = 413, "body_too_large", "The body is over the limit"


class TooManyPictures(ServiceError):
    status, code, title = 413, "too_many_pictures", "More pictures than the limit"


class TooManyPixels(ServiceError):
    status, code, title = 413, "too_many_pixels", "A picture has more pixels than the limit"


class PictureTooSlow(ServiceError):
    status, code, title = 413, "picture_too_slow", "A picture takes longer to decode than the limit"


class UnsupportedMediaType(ServiceError):
    status, code, title = 415, "unsupported_media_type", "The media type of the body is not supported"


class HostNotAllowed(ServiceError):
    status, code, title = 421, "host_not_allowed", "The server does not answer for this host"


class InvalidRequest(ServiceError):
    """A field is unknown or has a wrong value."""

    status, code, title = 422, "invalid_request", "A value of the request is wrong"


class UnknownMethod(InvalidRequest):
    code, title = "unknown_method", "No such heatmap method"


class UnknownLayer(InvalidRequest):
    code, title = "unknown_layer", "No such target layer"


class UnknownClass(InvalidRequest):
    code, title = "unknown_class", "No such class"


class InvalidGenParams(InvalidRequest):
    code, title = "invalid_gen_params", "A parameter of the heatmap method is wrong"


class MethodNotSupported(InvalidRequest):
    code, title = "method_not_supported", "The method cannot explain this network"


class UndecodablePicture(InvalidRequest):
    code, title = "undecodable_picture", "A picture cannot be decoded"


class PictureQuarantined(InvalidRequest):
    code, title = "picture_quarantined", "The picture crashed or hung a worker twice"


class ModelTypeNotSupported(InvalidRequest):
    code, title = "model_type_not_supported", "The model is no classifier"


class HeadersTooLarge(ServiceError):
    status, code, title = 431, "headers_too_large", "The headers are over the limit"


class HeadersTimeout(ServiceError):
    status, code, title = 408, "headers_timeout", "The headers came too slowly"


class QueueFull(ServiceError):
    status, code, title = 429, "queue_full", "The queue is full"


class RateLimited(ServiceError):
    status, code, title = 429, "rate_limited", "Too many requests in a short time"


class Unavailable(ServiceError):
    status, code, title = 503, "unavailable", "The service cannot take the request now"


class AnswersUnread(Unavailable):
    code, title = "answers_unread", "Too many answers wait to be read"


class ModelLoading(Unavailable):
    code, title = "model_loading", "The model is in its first load"


class ModelFailed(Unavailable):
    code, title = "model_failed", "The model could not be loaded"


class ModelUnloaded(Unavailable):
    code, title = "model_unloaded", "The model was unloaded"


class NoWorker(Unavailable):
    code, title = "no_worker", "No worker serves now"


class TooManyConnections(Unavailable):
    code, title = "too_many_connections", "Too many connections are open"


class WorkerLost(Unavailable):
    code, title = "worker_lost", "The worker died twice under this request"


class Draining(Unavailable):
    code, title = "draining", "The service is shutting down"


class DeadlineExceeded(ServiceError):
    status, code, title = 504, "deadline_exceeded", "The deadline of the request passed"


class DeadlineTooShort(DeadlineExceeded):
    code, title = "deadline_too_short", "The request takes longer than it has"


class OutOfDeviceMemory(ServiceError):
    status, code, title = 507, "out_of_device_memory", "The device has no memory for one picture"


class ModelLoadError(Exception):
    """A model folder cannot be served; the message is the model's `reason`."""


def echo(value: object) -> str:
    """The repr of what a client sent, with at most MAX_ECHO characters."""
    return (repr(value[:MAX_ECHO]) if isinstance(value, str) else _SHORT.repr(value))[:MAX_ECHO]


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence that names the closest of `names`, or the empty string where none is close.

    Neither case counts nor how words are joined, and a plus may be a sign or a word.
    """
    name = name[:MAX_ECHO]
    forms: dict[str, list[str]] = {}
    for known in dict.fromkeys(names):
        forms.setdefault(_form(known), []).append(known)
    matches = [one for form in difflib.get_close_matches(_form(name), forms, n=3, cutoff=0.5) for one in forms[form]]
    return f" Did you mean {' or '.join(repr(match) for match in matches[:3])}?" if matches else ""


def _form(name: str) -> str:
    return name.casefold().translate(FORM)
