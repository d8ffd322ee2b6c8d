"""How records look: whatever text is in them, nothing but the service begins a line or steers a terminal."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from typing import Any

import pytest

from service.logs import Format

HEAD = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
EVIL = 'x\n2026-11-21T20:15:52.123Z INFO    [server] request status=200\r\x1b[31m\x00\x85\u2028\u202e\udcff "y" k=v'


def logged(form: Format, code: str, level: str = "info") -> list[str]:
    """The lines on stderr of a process that logs by the helper, while it runs `code`."""
    script = f"import logging, warnings\nfrom service.logs import configure\nEVIL = {EVIL!r}\n"
    script += (
        "other = logging.getLogger('library')\nother.addHandler(logging.StreamHandler())\nother.propagate = False\n"
    )
    script += f"configure({level!r}, {form!r}, 'cpu')\nlogger = logging.getLogger('ours')\n{code}"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == ""
    return ran.stderr.removesuffix("\n").split("\n")


RECORDS = {
    "message": ("logger.info('said %s', EVIL)", "info"),
    "fields": (
        "logger.info('request', extra={'fields': {'model': EVIL, 'methods': [EVIL, 'b'], 'none': None}})",
        "info",
    ),
    "exception": ("try:\n  raise ValueError(EVIL)\nexcept ValueError:\n  logger.exception('defect')", "error"),
    "warning": ("warnings.warn(EVIL)", "warning"),
    "library": ("other.warning(EVIL)", "warning"),
}


@pytest.mark.parametrize(("code", "level"), RECORDS.values(), ids=RECORDS)
def test_text_of_others_begins_no_record(code: str, level: str) -> None:
    first, *others = logged("text", code)
    assert re.match(rf"{HEAD}{level.upper():<7} \[cpu\] \S", first)
    assert all(line.startswith("    ") for line in others)
    assert all(line.isprintable() for line in (first, *others))


@pytest.mark.parametrize(("code", "level"), RECORDS.values(), ids=RECORDS)
def test_json_is_one_object_on_one_line(code: str, level: str) -> None:
    (line,) = logged("json", code)
    assert line.isascii()
    record: dict[str, Any] = json.loads(line)
    assert re.fullmatch(HEAD.strip(), record["time"])
    assert (record["level"], record["process"]) == (level, "cpu")
    assert EVIL in (record["message"] + record.get("exception", "") + record.get("model", ""))
    if "fields" in code:
        assert (record["message"], record["methods"]) == ("request", [EVIL, "b"])
        assert "none" not in record


def test_fields_in_text() -> None:
    fields = {"status": 200, "path": "/a%20b", "name": 'tiger "cat"', "empty": "", "none": None, "methods": ["a", "b"]}
    (line,) = logged("text", f"logger.info('request', extra={{'fields': {fields!r}}})")
    assert line.endswith(r'[cpu] request status=200 path=/a%20b name="tiger \"cat\"" empty="" methods=a,b')


def test_the_level_is_the_least_that_is_logged() -> None:
    code = "for level in (10, 20, 30, 40): logging.getLogger('service.room').log(level, 'level %d', level)"
    for level, least in (("debug", 10), ("info", 20), ("warning", 30), ("error", 40)):
        assert [int(line.split()[-1]) for line in logged("text", code, level)] == [
            number for number in (10, 20, 30, 40) if number >= least
        ]
        assert least == getattr(logging, level.upper())


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_a_picture_says_of_itself_is_never_logged(form: Format) -> None:
    code = """
import io
from PIL import Image
file, tags = io.BytesIO(), Image.Exif()
tags[0x010E] = "secret place"
Image.new("RGB", (8, 8)).save(file, "TIFF", exif=tags)
assert Image.open(file).getexif()[0x010E] == "secret place"
logger.info("done")
"""
    (line,) = logged(form, code, "debug")
    assert "done" in line
