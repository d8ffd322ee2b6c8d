"""Pictures that crash or hang their worker, which are refused for a while."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from service.errors import FieldError, PictureQuarantined
from service.workers.messages import ExplainRequest

MAX_CRASHES = 2
FORGET_S = 600.0


@dataclass
class _Record:
    crashes: int
    last: float


class Quarantine:
    """Counts the crashes and hangs of workers that had one request alone, which is known by its pictures.

    Which of several pictures is guilty is not known: they are quarantined together, and each alone is free.
    """

    def __init__(self) -> None:
        self._records: dict[tuple[int, bytes], _Record] = {}  # by length and digest

    def blame(self, request: ExplainRequest) -> None:
        """A worker crashed or hung while it had this request alone."""
        key = _length(request.pictures), _digest(request.pictures)
        record = self._records.setdefault(key, _Record(0, 0.0))
        record.crashes += 1
        record.last = time.monotonic()

    def check(self, request: ExplainRequest) -> None:
        """Raise PictureQuarantined where the request brings pictures that crashed a worker twice."""
        now = time.monotonic()
        self._records = {key: record for key, record in self._records.items() if now - record.last < FORGET_S}
        for index, picture in enumerate(request.pictures):
            if self._is_kept((picture,)):
                raise _quarantined(f"/images/{index}", f"Picture {index}")
        if len(request.pictures) > 1 and self._is_kept(request.pictures):
            raise _quarantined("/images", "These pictures together")

    def _is_kept(self, pictures: tuple[bytes | str, ...]) -> bool:
        """Only what is as long as something kept is read: that takes milliseconds, in which the server does nothing."""
        length = _length(pictures)
        kept = [
            digest
            for (size, digest), record in self._records.items()
            if size == length and record.crashes >= MAX_CRASHES
        ]
        return bool(kept) and _digest(pictures) in kept


def _length(pictures: tuple[bytes | str, ...]) -> int:
    return sum(map(len, pictures))


def _digest(pictures: tuple[bytes | str, ...]) -> bytes:
    digest = hashlib.sha256()  # for which processors have instructions
    for picture in pictures:
        data = picture.encode(errors="surrogatepass") if isinstance(picture, str) else picture
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.digest()


def _quarantined(pointer: str, what: str) -> PictureQuarantined:
    detail = (
        f"{what} crashed or hung a worker {MAX_CRASHES} times when nothing else ran there; try again in ten minutes."
    )
    return PictureQuarantined(detail, errors=(FieldError(pointer, detail),))
