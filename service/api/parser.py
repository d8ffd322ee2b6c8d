"""uvicorn's parser of HTTP/1.1 (h11), within bounds: a head is checked before it is parsed, and all bytes count."""

from __future__ import annotations

import re

import h11

from service.errors import HeadersTooLarge, MalformedRequest, ServiceError

MAX_HEADERS = 256
MAX_FRAMING = 8192  # bytes of chunk sizes, chunk extensions and trailers, beside those that each byte of body may bring
FRAMING_PER_BYTE = 5  # a chunk of one byte has so many around it
ORIGIN = re.compile(rb"https?://[^/?#]+", re.IGNORECASE)


class Parser(h11.Connection):
    """Raises h11.RemoteProtocolError for what is refused; `error` is then the problem to answer.

    `budget` is the number of events that may still be parsed; without any, next_event tells NEED_DATA.
    `remaining` is the rest of a body of known length, in bytes, and 0 in one that comes in chunks. `in_body` tells
    whether the latest event belongs to a body.
    """

    def __init__(self, max_header_bytes: int) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self._max_header_bytes = max_header_bytes
        self._framing = 0
        self.remaining = 0
        self.budget = 0
        self.in_body = False
        self.error: ServiceError = MalformedRequest("The bytes on the connection are not a valid HTTP/1.1 request.")

    def receive_data(self, data: bytes) -> None:
        """Take bytes; an empty `data` stands for the end of the connection."""
        self._framing += len(data)
        super().receive_data(data)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next event, as h11 has it."""
        if self.budget == 0:
            return h11.NEED_DATA
        self.budget -= 1
        self.in_body = self.their_state is h11.SEND_BODY
        if self.their_state is h11.IDLE:
            self._skip_empty_lines()
            self._check_head()
        event = super().next_event()
        if isinstance(event, h11.Request):
            return self._begin(event)
        if isinstance(event, h11.Data):
            self.remaining = max(0, self.remaining - len(event.data))
            self._framing -= len(event.data) * (1 + FRAMING_PER_BYTE)
        elif self.in_body and self._framing - self._behind(event) > MAX_FRAMING:
            raise self._refused(HeadersTooLarge(f"The body's chunks and trailers bring more than {MAX_FRAMING} bytes."))
        return event

    def _behind(self, event: h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]) -> int:
        """The bytes that came behind the body: while more of it is needed, what waits to be parsed is still its own."""
        return 0 if event is h11.NEED_DATA else len(self.trailing_data[0])

    def _skip_empty_lines(self) -> None:
        """Some clients send one behind a body (RFC 9112, 2.2); h11 takes it for a request."""
        head, _ = self.trailing_data
        self._receive_buffer.maybe_extract_at_most(len(head) - len(head.lstrip(b"\r\n")))

    def _check_head(self) -> None:
        head, _ = self.trailing_data
        end = head.find(b"\r\n\r\n")
        head = head if end < 0 else head[: end + 4]
        lines = head.count(b"\n")
        if len(head) > self._max_header_bytes or lines > MAX_HEADERS + 2:
            raise self._refused(headers_too_large(self._max_header_bytes))
        if lines != head.count(b"\r\n") or b"\n " in head or b"\n\t" in head:
            raise h11.RemoteProtocolError("a folded header, or a line feed alone")

    def _begin(self, request: h11.Request) -> h11.Request:
        headers = dict(request.headers)
        length = headers.get(b"content-length")
        if length is not None and b"transfer-encoding" in headers:
            raise h11.RemoteProtocolError("two lengths")
        target = ORIGIN.sub(b"", request.target, count=1) or b"/"
        if request.method == b"CONNECT" or target[:1] not in b"/?*" or request.http_version not in (b"1.0", b"1.1"):
            raise h11.RemoteProtocolError("not for this server")
        self.remaining = int(length or 0)
        self._framing = len(self.trailing_data[0])
        if target == request.target:
            return request
        return h11.Request(
            method=request.method, headers=request.headers, target=target, http_version=request.http_version
        )

    def _refused(self, error: ServiceError) -> h11.RemoteProtocolError:
        self.error = error
        return h11.RemoteProtocolError(error.detail)


def headers_too_large(limit: int) -> HeadersTooLarge:
    """The error of a request whose line and headers have more than `limit` bytes, or too many lines."""
    return HeadersTooLarge(
        f"The request's line and headers have more than {limit} bytes, or there are more than {MAX_HEADERS} headers."
    )
