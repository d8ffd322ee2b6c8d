"""Which errors the steps of a request raise; a route tells OpenAPI those of the steps that it takes.

Its test compares these lists with what the code of each step raises.
"""

from __future__ import annotations

from service.errors import (
    AnswersUnread,
    BodyTimeout,
    BodyTooLarge,
    DeadlineExceeded,
    DeadlineTooShort,
    Draining,
    HeadersTooLarge,
    HostNotAllowed,
    InvalidGenParams,
    InvalidRequest,
    KeyLacksRight,
    KeyMissing,
    KeyWrong,
    MalformedBody,
    MethodNotSupported,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    ModelTypeNotSupported,
    ModelUnloaded,
    NotAcceptable,
    NoWorker,
    OutOfDeviceMemory,
    PictureQuarantined,
    PictureTooSlow,
    QueueFull,
    RateLimited,
    ServiceError,
    TooManyConnections,
    TooManyPictures,
    TooManyPixels,
    UndecodablePicture,
    UnknownClass,
    UnknownLayer,
    UnknownMethod,
    UnsupportedMediaType,
    WorkerLost,
)

Kinds = tuple[type[ServiceError], ...]

FRAME: Kinds = (HeadersTooLarge, InvalidRequest, ServiceError)
"""Around every route."""
DOOR: Kinds = (HostNotAllowed, KeyMissing, KeyWrong, KeyLacksRight, TooManyConnections)
"""Before every route but probes."""
LOADED: Kinds = (ModelNotFound, ModelTypeNotSupported, ModelLoading, ModelFailed, ModelUnloaded)
"""A model is looked up that must be loaded."""
READ: Kinds = (
    MalformedBody,
    BodyTimeout,
    BodyTooLarge,
    TooManyPictures,
    UnsupportedMediaType,
    UndecodablePicture,
    QueueFull,
)
"""The body of a request for work is read and checked."""
QUEUE: Kinds = (*LOADED, NoWorker, RateLimited, QueueFull, BodyTooLarge, TooManyPictures, DeadlineTooShort, Draining)
"""Work is accepted or refused."""
WORK: Kinds = (
    UndecodablePicture,
    TooManyPixels,
    PictureTooSlow,
    PictureQuarantined,
    WorkerLost,
    DeadlineExceeded,
    OutOfDeviceMemory,
)
"""Workers decode the pictures and run the network."""
EXPLAIN: Kinds = (UnknownMethod, UnknownLayer, UnknownClass, InvalidGenParams, MethodNotSupported)
"""Workers make heatmaps."""
ANSWER: Kinds = (NotAcceptable, AnswersUnread)
"""The answer is written as Accept asks for it."""
INFER: Kinds = (*READ, *QUEUE, *WORK, *ANSWER)
HEATMAP: Kinds = (*INFER, *EXPLAIN)
