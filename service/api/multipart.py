"""Multipart forms into text fields and picture files, in memory and within limits; what they mean is not said here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.api.fields import wrong
from service.errors import MAX_ECHO, BodyTooLarge, MalformedBody, TooManyPictures, echo

MAX_FIELD_BYTES = 64 * 1024
TURN_BYTES = 32 * 1024  # parsed before other connections have a turn: small parts are slow to parse
MAX_OPTIONS = 32  # semicolons of one header: ten thousand of them take tens of milliseconds
PICTURE_PARTS = ("image", "images")

Texts = list[tuple[str, str]]


@dataclass
class _Part:
    name: str = ""
    filename: str | None = None
    chunks: list[bytes] = field(default_factory=list)
    size: int = 0


class _Form:
    """Collects the parts; its methods are the parser's callbacks, and each of them refuses as early as it can."""

    def __init__(self, max_pictures: int, max_parts: int) -> None:
        self._max_pictures = max_pictures
        self._max_parts = max_parts
        self._header = self._value = self._disposition = b""
        self.parts: list[_Part] = []
        self.ended = False

    def on_part_begin(self) -> None:
        self._disposition = b""
        if len(self.parts) == self._max_parts:
            raise BodyTooLarge(f"The form has more than {self._max_parts} parts; write a long list as one JSON array.")
        self.parts.append(_Part())

    def on_header_begin(self) -> None:
        self._header = self._value = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value

    def on_headers_finished(self) -> None:
        options = _options(self._disposition)
        if b"name" not in options:
            raise MalformedBody("A part of the form has no name in its Content-Disposition.")
        part = self.parts[-1]
        part.name = options[b"name"].decode()
        part.filename = options[b"filename"].decode(errors="replace") if b"filename" in options else None
        if part.filename is not None and part.name not in PICTURE_PARTS:
            raise wrong(
                f"/{part.name}"[:MAX_ECHO], "The part is a file; a file is a picture, in a part image or images."
            )
        if sum(part.filename is not None for part in self.parts) > self._max_pictures:
            raise too_many_pictures(self._max_pictures)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self.parts[-1]
        if part.filename is None and part.name in PICTURE_PARTS:
            raise wrong(f"/{part.name}", "A picture is a file part: give the part a filename.")
        part.chunks.append(data[start:end])
        part.size += end - start
        if part.filename is None and part.size > MAX_FIELD_BYTES:
            raise BodyTooLarge(f"The form field {echo(part.name)} has more than {MAX_FIELD_BYTES} bytes.")

    def on_end(self) -> None:
        self.ended = True


def too_many_pictures(limit: int) -> TooManyPictures:
    """The error of a request with more pictures than `limit`."""
    return TooManyPictures(f"One request may bring at most {limit} pictures.")


async def read_form(
    content_type: str, chunks: AsyncIterator[bytes], max_pictures: int, max_parts: int
) -> tuple[Texts, list[bytes]]:
    """The text parts, and the contents of the parts `image` and `images`, whose declared types are not trusted."""
    form = _Form(max_pictures, max_parts)
    try:
        await _parse(form, content_type, chunks)
        texts = [
            (part.name, b"".join(part.chunks).decode())
            for part in form.parts
            if part.filename is None and part.name not in PICTURE_PARTS  # an empty text there is no picture
        ]
    except (FormParserError, UnicodeDecodeError) as error:
        raise MalformedBody(f"The form cannot be read: {error}.") from None
    if not form.ended:
        raise MalformedBody("The form ends before its closing boundary.")
    # a browser sends an empty file input as an empty part without a filename
    files = [part for part in form.parts if part.filename or (part.filename is not None and part.size)]
    return texts, [b"".join(part.chunks) for part in files]


def _options(header: bytes) -> dict[bytes, bytes]:
    """What stands behind the semicolons of a header."""
    if header.count(b";") > MAX_OPTIONS:
        raise MalformedBody(f"A header of the form has more than {MAX_OPTIONS} parameters.")
    return parse_options_header(header)[1]


async def _parse(form: _Form, content_type: str, chunks: AsyncIterator[bytes]) -> None:
    options = _options(content_type.encode("latin-1"))
    if not options.get(b"boundary"):
        raise MalformedBody("The Content-Type of the form names no boundary.")
    parser = MultipartParser(
        options[b"boundary"],
        {
            "on_part_begin": form.on_part_begin,
            "on_header_begin": form.on_header_begin,
            "on_header_field": form.on_header_field,
            "on_header_value": form.on_header_value,
            "on_header_end": form.on_header_end,
            "on_headers_finished": form.on_headers_finished,
            "on_part_data": form.on_part_data,
            "on_end": form.on_end,
        },
    )
    async for chunk in chunks:
        for start in range(0, len(chunk), TURN_BYTES):
            parser.write(chunk[start : start + TURN_BYTES])
            await asyncio.sleep(0)
