"""Pictures that crash their worker, which are refused for a while."""

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
    """Counts the crashes of workers that had one request alone; its pictures are what the request is known by.

    Which of several pictures is guilty is not known: they are quarantined together, and each alone is free.
    """

    def __init__(self) -> None:
        self._records: dict[bytes, _Record] = {}

    def blame(self, request: ExplainRequest) -> None:
        """A worker crashed while it had this request alone."""
        record = self._records.setdefault(_digest(request.pictures), _Record(0, 0.0))
        record.crashes += 1
        record.last = time.monotonic()

    def check(self, request: ExplainRequest) -> None:
        """Raise PictureQuarantined where the request brings pictures that crashed a worker twice."""
        now = time.monotonic()
        self._records = {key: record for key, record in self._records.items() if now - record.last < FORGET_S}
        if not self._records:
            return
        for index, picture in enumerate(request.pictures):
            if self._is_kept((picture,)):
                raise _quarantined(f"/images/{index}", f"Picture {index}")
        if self._is_kept(request.pictures):
            raise _quarantined("/images", "These pictures together")

    def _is_kept(self, pictures: tuple[bytes | str, ...]) -> bool:
        record = self._records.get(_digest(pictures))
        return record is not None and record.crashes >= MAX_CRASHES


def _digest(pictures: tuple[bytes | str, ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        data = picture.encode(errors="surrogatepass") if isinstance(picture, str) else picture
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def _quarantined(pointer: str, what: str) -> PictureQuarantined:
    detail = f"{what} crashed a worker {MAX_CRASHES} times when nothing else ran there; try again in ten minutes."
    return PictureQuarantined(detail, errors=(FieldError(pointer, detail),))
