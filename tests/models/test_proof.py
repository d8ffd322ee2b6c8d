"""What is proven of a network is kept, taken again, and made anew where it cannot be kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.models import kept, proof
from service.models.program import Program
from service.models.proof import proven_layers
from tests.nets import Varied, program_of, seeded


@pytest.fixture
def program() -> Program:
    return program_of(seeded(Varied), 12)


def test_what_was_proven_is_not_proven_again(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = proven_layers(program, tmp_path / "net.json")
    monkeypatch.setattr(proof, "check_isolation", None)
    again = proven_layers(program, tmp_path / "net.json")
    assert again.rows == first.rows
    assert again.default == first.default
    (tmp_path / "net.json").write_bytes(b"damaged")
    with pytest.raises(TypeError):
        proven_layers(program, tmp_path / "net.json")


def test_where_no_proof_can_be_kept_it_is_made_and_that_is_said_once(
    program: Program, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept.say_not_kept.cache_clear()
    expected = proven_layers(program).rows
    for name in ("one", "other"):
        assert proven_layers(program, tmp_path / "missing" / name).rows == expected
    (message,) = [record.getMessage() for record in caplog.records if record.name == kept.__name__]
    assert message.endswith(
        f" are not kept, and models load more slowly: {tmp_path / 'missing'}: No such file or directory"
    )
