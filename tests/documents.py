"""The Markdown that people read, and what tests take out of it: blocks of code, commands, tables, headings, links."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"])
}
ANYTHING = "…"

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FILE = re.compile(r"`([\w-]+(?:/[\w-]+)*/[\w-]+\.\w+)`")


@dataclass(frozen=True)
class Command:
    """A line of a `sh` block. `answer` is the `json` block that follows it, None where none does."""

    document: str
    line: str
    answer: Any = None


def blocks(document: str, language: str) -> list[str]:
    """The texts of a document's blocks of code in one language."""
    return [text for found, text in _BLOCK.findall(DOCUMENTS[document]) if found == language]


def files(document: str) -> dict[str, str]:
    """The files that a document shows: each block whose paragraph before it names a path, by the first of these."""
    shown = {}
    for block in _BLOCK.finditer(DOCUMENTS[document]):
        paragraph = DOCUMENTS[document][: block.start()].rstrip("\n").rpartition("\n\n")[2]
        if path := _FILE.search(paragraph):
            shown[path[1]] = block[2]
    return shown


def table(document: str, *header: str) -> list[list[str]]:
    """The cells of the table that has this header."""
    lines = iter(DOCUMENTS[document].splitlines())
    assert _row(*header) in lines, f"{document} has no table of {header}"
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def marked(document: str, name: str) -> str:
    """The lines between the marks `<!-- name -->` and `<!-- /name -->`."""
    return DOCUMENTS[document].partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]


def lines_of(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table as Markdown."""
    return "\n".join([_row(*header), "|" + "---|" * len(header), *(_row(*row) for row in rows)])


def anchors(document: str) -> set[str]:
    """What a link may have behind its `#`, as forges make it of headings."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(_prose(document))
    }


def links(document: str) -> list[str]:
    """The targets of a document's links and pictures that are no URLs."""
    return [target for target in _LINK.findall(_prose(document)) if "://" not in target]


def matches(shown: Any, found: Any) -> bool:
    """Whether an answer is the one shown. `…` stands for anything, and numbers are shown with two decimals."""
    match shown:
        case dict():
            keys = shown.keys() - {ANYTHING}
            complete = keys <= found.keys() if ANYTHING in shown else keys == found.keys()
            return complete and all(matches(shown[key], found[key]) for key in keys)
        case list():
            return len(shown) == len(found) and all(map(matches, shown, found))
        case str():
            pattern = ".*".join(map(re.escape, shown.split(ANYTHING)))
            return isinstance(found, str) and re.fullmatch(pattern, found, re.DOTALL) is not None
        case float():
            return isinstance(found, int | float) and abs(shown - found) < 0.01
    return bool(shown == found)


def _commands(document: str) -> Iterator[Command]:
    command = None
    for language, text in _BLOCK.findall(DOCUMENTS[document]):
        if language == "json":
            assert command, f"{document} shows an answer before any command"
            yield Command(document, command.line, json.loads(text))
            command = None
        elif language == "sh":
            joined = text.replace("\\\n", "")
            lines = [Command(document, line) for line in joined.splitlines() if not line.startswith("#")]
            yield from [command] if command else []
            *first, command = lines
            yield from first
    yield from [command] if command else []


def _prose(document: str) -> str:
    return _BLOCK.sub("", DOCUMENTS[document])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


COMMANDS = [command for document in DOCUMENTS for command in _commands(document)]
