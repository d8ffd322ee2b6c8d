"""How every process of the service logs: records on stderr, as text or JSON, that nobody outside can forge."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

Format = Literal["text", "json"]

PLAIN = re.compile(r"[!#-~]+")


def configure(level: str, form: Format, process: str = "server") -> None:
    """Log this process's records from `level` on. A record's `extra={"fields": {...}}` are columns of its own."""
    handler = logging.StreamHandler()
    handler.setFormatter(Json(process) if form == "json" else Text(process))
    logging.basicConfig(level="INFO" if level == "debug" else level.upper(), handlers=[handler])
    logging.getLogger("service").setLevel(level.upper())  # of libraries no debug: Pillow's tells what is in a picture
    logging.captureWarnings(True)
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and logger.handlers:  # torch's: its lines would have another form
            logger.handlers.clear()
            logger.propagate = True


class Text(logging.Formatter):
    """Time, level, process, message, fields. A record's other lines begin with blanks: none can pose as a record."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        words = [record.getMessage(), *(f"{name}={_word(value)}" for name, value in _fields(record).items())]
        lines = [" ".join(words)]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        body = _printable("\n".join(lines)).replace("\n", "\n    ")
        return f"{_time(record)} {record.levelname:<7} [{self._process}] {body}"


class Json(logging.Formatter):
    """One object per record, in ASCII."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    """The fields that say something."""
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return {name: value for name, value in fields.items() if value is not None}


def _word(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)


def _printable(text: str) -> str:
    """The text with escapes for all that would steer a terminal or begin a line, but for ordinary line ends."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)
