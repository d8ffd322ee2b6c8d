from __future__ import annotations

import logging

import numpy as np
import pytest

from service.errors import InvalidRequest
from service.imaging.colormaps import COLORMAPS, colour_table


def test_every_name_has_a_table_and_none_is_ambiguous(caplog: pytest.LogCaptureFixture) -> None:
    colour_table.cache_clear()
    with caplog.at_level(logging.DEBUG):
        tables = [colour_table(name) for name in COLORMAPS]
    assert not caplog.records
    for table in tables:
        assert (table.shape, table.dtype) == ((256, 3), np.dtype(np.uint8))
        assert not table.flags.writeable
    assert len({table.tobytes() for table in tables}) == len(COLORMAPS)


def test_jet_and_gray_are_what_everybody_means() -> None:
    assert COLORMAPS[0] == "jet"
    jet = colour_table("jet")
    assert jet[0].tolist() == [0, 0, 128]
    assert jet[255].tolist() == [128, 0, 0]
    # The textbook's jet, from which the published tables differ by a few levels.
    ramps = 1.5 - np.abs(4 * np.linspace(0, 1, 256)[:, None] - [3, 2, 1])
    assert np.abs(jet - 255 * np.clip(ramps, 0, 1)).max() < 40
    assert (colour_table("gray") == np.arange(256)[:, None]).all()


def test_an_unknown_name_gets_its_nearest() -> None:
    with pytest.raises(InvalidRequest, match=r"'virdis'.*Did you mean 'viridis'"):
        colour_table("virdis")
