"""The file of keys: what is a line, and what a wrong one is told without being shown."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from service.keys import find_key, read_keys
from service.settings import SettingsError

SECRET = "a-key-that-somebody-put-into-the-file"
GOOD = hashlib.sha256(b"key one").hexdigest()
OTHER = hashlib.sha256("schlüssel".encode()).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_lines_comments_and_empty_lines(file: Path) -> None:
    file.write_text(
        f"\ufeff# keys of the laboratory\n\n  ann.b-c_1\tpredict sha256:{GOOD.upper()}  # until May\n"
        f"   \n#x admin sha256:{GOOD}\r\nroot predict,admin sha256:{OTHER}"
    )
    keys = read_keys(file)
    assert [(key.name, set(key.rights)) for key in keys] == [
        ("ann.b-c_1", {"predict"}),
        ("root", {"predict", "admin"}),
    ]
    assert find_key(keys, "key one") is keys[0]
    assert find_key(keys, "schlüssel") is keys[1]
    for wrong in ("", "key on", "key one ", GOOD, f"sha256:{GOOD}", "ann.b-c_1", "\x00"):
        assert find_key(keys, wrong) is None
    assert GOOD not in repr(keys)


@pytest.mark.parametrize(
    ("line", "right"),
    [
        (SECRET, "<name> <rights> sha256:<hex>"),
        (f"ann predict {SECRET}", "64 hexadecimal digits"),
        (f"ann predict sha256:{SECRET}", "64 hexadecimal digits"),
        (f"ann predict sha256:{GOOD[:-1]}", "64 hexadecimal digits"),
        (f"ann predict md5:{GOOD}", "sha256:"),
        (f"ann predict {GOOD}", "sha256:"),
        (f"ann sha256:{GOOD}", "three words"),
        (f"ann predict admin sha256:{GOOD}", "three words"),
        (f"ann root sha256:{GOOD}", "predict, admin or predict,admin"),
        (f"ann predict, sha256:{GOOD}", "predict, admin or predict,admin"),
        (f"{SECRET}/ predict sha256:{GOOD}", "letters"),
        (f"-ann predict sha256:{GOOD}", "begin with a letter"),
        (f"{'a' * 65} predict sha256:{GOOD}", "1 to 64"),
        (f"än predict sha256:{GOOD}", "letters"),
        (f"first admin sha256:{GOOD}", "name stands on a line above"),
        (f"second admin sha256:{OTHER}", "same key stands on a line above"),
    ],
)
def test_a_bad_line_is_told_by_its_number_and_never_shown(file: Path, line: str, right: str) -> None:
    file.write_text(f"# keys\nfirst predict sha256:{OTHER}\n\n{line}\n")
    with pytest.raises(SettingsError) as refused:
        read_keys(file)
    said = str(refused.value)
    assert said.startswith(f"--api-keys-file: line 4 of {file}: ")
    assert right in said
    assert not any(part in said for part in (SECRET, GOOD[:-1], OTHER))


def test_files_without_a_key(file: Path) -> None:
    for content, said in ((b"# none\n", "no key"), (b"", "no key"), (b"\xff\xfe\x00", "UTF-8")):
        file.write_bytes(content)
        with pytest.raises(SettingsError, match=said):
            read_keys(file)
    with pytest.raises(SettingsError, match="No such file"):
        read_keys(file.with_name("nowhere"))
    with pytest.raises(SettingsError, match="cannot be read"):
        read_keys(file.parent)
