"""Multipart forms into text fields and picture files, in memory and within limits; what they mean is not said here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from service.api.fields import wrong
from service.errors import MAX_ECHO, BodyTooLarge, MalformedBody, TooManyPictures, echo

MAX_FIELD_BYTES = 64 * 1024
TURN_BYTES = 32 * 1024  # parsed before other connections have a turn: small parts are slow to parse
MAX_OPTIONS = 32  # semicolons of the Content-Type: ten thousand of them take ten milliseconds
MAX_BOUNDARY = 256  # characters; RFC 2046 allows 70
PICTURE_PARTS = ("image", "images")

Texts = list[tuple[str, str]]


@dataclass
class _Part:
    name: str
    filename: str | None
    chunks: list[bytes] = field(default_factory=list)
    size: int = 0


class _Form:
    """Collects the parts, and refuses each as early as it can."""

    def __init__(self, max_pictures: int, max_parts: int) -> None:
        self._max_pictures = max_pictures
        self._max_parts = max_parts
        self.parts: list[_Part] = []

    def begin(self, segment: MultipartSegment) -> None:
        """A part begins; the parser has read its headers as latin-1, for a filename may be in any encoding."""
        if len(self.parts) == self._max_parts:
            raise BodyTooLarge(f"The form has more than {self._max_parts} parts; write a long list as one JSON array.")
        if not segment.name:
            raise MalformedBody("A part of the form has no name in its Content-Disposition.")
        part = _Part(segment.name.encode("latin-1").decode(), segment.filename)
        if part.filename is not None and part.name not in PICTURE_PARTS:
            raise wrong(
                f"/{part.name}"[:MAX_ECHO], "The part is a file; a file is a picture, in a part image or images."
            )
        self.parts.append(part)
        if sum(part.filename is not None for part in self.parts) > self._max_pictures:
            raise too_many_pictures(self._max_pictures)

    def add(self, data: bytes) -> None:
        """More of the part that began last."""
        part = self.parts[-1]
        if part.filename is None and part.name in PICTURE_PARTS:
            raise wrong(f"/{part.name}", "A picture is a file part: give the part a filename.")
        part.chunks.append(data)
        part.size += len(data)
        if part.filename is None and part.size > MAX_FIELD_BYTES:
            raise BodyTooLarge(f"The form field {echo(part.name)} has more than {MAX_FIELD_BYTES} bytes.")


def too_many_pictures(limit: int) -> TooManyPictures:
    """The error of a request with more pictures than `limit`."""
    return TooManyPictures(f"One request may bring at most {limit} pictures.")


async def read_form(
    content_type: str, chunks: AsyncIterator[bytes], max_pictures: int, max_parts: int
) -> tuple[Texts, list[bytes]]:
    """The text parts, and the contents of the parts `image` and `images`, whose declared types are not trusted."""
    form = _Form(max_pictures, max_parts)
    parser = PushMultipartParser(_boundary(content_type), header_charset="latin-1")
    try:
        await _parse(parser, form, chunks)
        texts = [
            (part.name, b"".join(part.chunks).decode())
            for part in form.parts
            if part.filename is None and part.name not in PICTURE_PARTS  # an empty text there is no picture
        ]
    except (MultipartError, UnicodeDecodeError) as error:
        raise MalformedBody(f"The form cannot be read: {error}.") from None
    # a browser sends an empty file input as an empty part without a filename
    files = [part for part in form.parts if part.filename or (part.filename is not None and part.size)]
    return texts, [b"".join(part.chunks) for part in files]


def _boundary(content_type: str) -> bytes:
    if content_type.count(";") > MAX_OPTIONS:
        raise MalformedBody(f"The Content-Type of the form has more than {MAX_OPTIONS} parameters.")
    boundary: str = parse_options_header(content_type)[1].get("boundary", "")
    if not 0 < len(boundary) <= MAX_BOUNDARY:
        raise MalformedBody(f"The Content-Type of the form names no boundary of 1 to {MAX_BOUNDARY} characters.")
    return boundary.encode("latin-1")


async def _parse(parser: PushMultipartParser, form: _Form, chunks: AsyncIterator[bytes]) -> None:
    async for chunk in chunks:
        for start in range(0, len(chunk), TURN_BYTES):
            for event in parser.parse(chunk[start : start + TURN_BYTES]):
                if isinstance(event, MultipartSegment):
                    form.begin(event)
                elif event:  # None ends a part
                    form.add(event)
            await asyncio.sleep(0)
    parser.close()
