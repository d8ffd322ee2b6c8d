"""The benchmarks' arithmetic and command line; what they measure is no matter of tests."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from benchmarks import others
from benchmarks.__main__ import SECTIONS, parse
from benchmarks.engine import correlation
from benchmarks.networks import NETWORKS
from benchmarks.peers.cams import captum, pytorch_grad_cam
from benchmarks.pictures import SIZE, Pictures
from benchmarks.table import Spread, Table, Target, percentile, ratios, rounded
from tests.nets import Residual, images, seeded


def test_ratios_are_taken_within_a_round() -> None:
    # The machine was half as fast in the second round: that cancels out.
    assert ratios([3.0, 6.0, 4.0], [1.0, 2.0, 2.0]) == [3.0, 3.0, 2.0]
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_a_spread_is_the_median_between_lowest_and_highest() -> None:
    assert Spread.of([0.5, 9.0, 0.6]) == Spread(0.6, 0.5, 9.0)
    assert str(Spread.of([0.5, 12.34, 0.6])) == "0.60 (0.50..12.3)"


@pytest.mark.parametrize(("value", "shown"), [(0.0382, "0.038"), (0.62, "0.62"), (12.34, "12.3"), (468.2, "468")])
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert rounded(value) == shown


def test_percentiles_are_values_that_were_seen() -> None:
    hundred = [float(number) for number in range(100, 0, -1)]
    assert (percentile(hundred, 50), percentile(hundred, 99), percentile([7.0], 99)) == (50.0, 99.0, 7.0)


@pytest.mark.parametrize(("at_least", "value", "met"), [(False, 0.75, True), (False, 0.76, False), (True, 0.75, True)])
def test_a_target_is_reached_by_the_median(at_least: bool, value: float, met: bool) -> None:
    assert Target("what", 0.75, Spread(value, 0.0, 9.0), at_least).met is met


def test_a_target_without_a_measurement_says_why_and_is_not_reached() -> None:
    target = Target("what", 0.75, None, missing="no compiler")
    assert target.met is None
    assert target.row() == ["what", "<= 0.75", "", "no compiler"]


def test_a_target_is_not_judged_while_others_are_busy() -> None:
    target = Target("what", 0.75, Spread(0.1, 0.1, 0.1))
    quiet, busy = (others.judged([target], shares)[0] for shares in ([0.0, 0.05, 1.0], [0.0, 0.9, 1.0]))
    assert (quiet.met, busy.met) == (True, None)
    assert "busy" in busy.row()[-1]


def test_a_table_is_markdown() -> None:
    assert Table("T", ["a", "b"], [["1", "2"]]).markdown() == "### T\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_quick_moves_defaults_and_leaves_what_is_given() -> None:
    assert parse([]).sections == list(SECTIONS)
    assert parse([]).models == list(NETWORKS)
    quick = parse(["engine", "--quick", "--rounds", "9"])
    assert (quick.sections, quick.models, quick.rounds) == (["engine"], ["resnet50"], 9)


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["engines"])
    assert "engine, second_class, service" in capsys.readouterr().err


def test_no_picture_comes_twice() -> None:
    pictures = Pictures()
    jpegs = pictures.jpegs(60) + pictures.jpegs(60)
    assert len(set(jpegs)) == 120
    with Image.open(io.BytesIO(jpegs[0])) as first:
        assert (first.format, first.size) == ("JPEG", SIZE)


def test_the_peers_agree_where_the_sum_after_the_layer_is_in_place() -> None:
    net = seeded(Residual).requires_grad_(True)
    maps = [make(net, "norm", False)(images(2, 12), [1, 3]) for make in (captum, pytorch_grad_cam)]
    assert maps[0].amax(dim=(1, 2)).min() > 0, "a map of zeros proves nothing"
    assert correlation(*maps) > 0.999
    assert correlation(maps[0], torch.flip(maps[1], dims=[2])) < 0.9
