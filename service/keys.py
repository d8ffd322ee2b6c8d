"""The operator's file of API keys, one line `<name> <rights> sha256:<hex>` each, and how a key and its line are made.

Keys are random and long, so that nobody can guess the one behind a hash, however fast it is computed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from service.settings import SettingsError, option_of

RIGHTS = ("predict", "admin")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HASH = re.compile(r"sha256:([0-9A-Fa-f]{64})")
KEY_BYTES = 32
LOOK_S = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """A key of which only the digest is known. `name` is who has it, as logs say it."""

    name: str
    rights: frozenset[str]
    digest: bytes = field(repr=False)


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of the operator's file. Raises SettingsError, which names the line but shows nothing of it."""
    option = option_of("api_keys_file")
    try:
        lines = path.expanduser().read_text("utf-8-sig").splitlines()
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        reason = "it is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise SettingsError(f"{option}: {path} cannot be read: {reason}") from None
    found: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        try:
            if text:
                key = _parse(text)
                _check_new(key, found.values())
                found[key.name] = key
        except SettingsError as error:
            raise SettingsError(f"{option}: line {number} of {path}: {error}") from None
    if not found:
        raise SettingsError(f"{option}: {path} has no key in it; `heatmap-service key NAME` makes one")
    return tuple(found.values())


class KeyFile:
    """The keys of the operator's file, kept current. Raises SettingsError where they cannot be read at first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._look()
        self.keys = read_keys(path)

    async def follow(self) -> None:
        """Look after the file until cancelled, in a thread, since a disk may be slow."""
        while True:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the file again if it has changed. Where it is broken, the keys stay and the log says why, once."""
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.keys = read_keys(self._path)
        except SettingsError as error:
            logger.warning("The keys stay as they were: %s", error)
        else:
            logger.info("%s has changed: its keys, %d now, are in force.", self._path, len(self.keys))

    def _look(self) -> tuple[int, ...] | None:
        """What changes with the file: an edit, a file put in its place, or whether it may be read."""
        try:
            status = self._path.expanduser().stat()
        except (OSError, RuntimeError):
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def make_key(name: str, rights: str) -> tuple[str, str]:
    """A fresh random key, and its line for the file. Raises SettingsError for a bad name or right."""
    key = secrets.token_urlsafe(KEY_BYTES)
    line = f"{name} {rights} sha256:{_digest(key).hex()}"
    _parse(line)
    return key, line


def find_key(keys: Iterable[Key], sent: str) -> Key | None:
    """The key that a client sent, if it is one of `keys`. How long it takes says nothing about them."""
    digest = _digest(sent)
    found = None
    for key in keys:  # all of them, whichever it is
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _parse(line: str) -> Key:
    """One line's key. The messages say what is right and never what was there: it may be a secret."""
    parts = line.split()
    if len(parts) != 3:
        raise SettingsError(f"a line has three words, <name> <rights> sha256:<hex>, and here are {len(parts)}")
    name, rights, digest = parts
    if not NAME.fullmatch(name):
        raise SettingsError(
            "the name must be 1 to 64 letters, digits, '.', '_' or '-', and begin with a letter or digit"
        )
    given = frozenset(rights.split(","))
    if not given <= frozenset(RIGHTS):
        raise SettingsError("the rights must be predict, admin or predict,admin")
    match = HASH.fullmatch(digest)
    if match is None:
        raise SettingsError("the hash must be sha256: and the 64 hexadecimal digits of the key's SHA-256")
    return Key(name, given, bytes.fromhex(match[1]))


def _check_new(key: Key, others: Iterable[Key]) -> None:
    if any(key.name == other.name for other in others):
        raise SettingsError("the name stands on a line above already; every key needs its own")
    if any(key.digest == other.digest for other in others):
        raise SettingsError("the same key stands on a line above already; every line needs its own")
