"""A request is resolved, or refused with the error, the pointer and the nearest names that the contract promises."""

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from service.errors import InvalidGenParams, InvalidRequest, UnknownClass, UnknownLayer, UnknownMethod
from service.models.resident import Model
from service.workers.plan import make_plan
from tests.nets import Residual, hand, model_of, program_of, request, seeded, varied
from tests.server import OPTIONS_OFF

LABELS = ("ant", "bee", "cat", "dog", "cat", "7", "eel")


@cache
def model() -> Model:
    return model_of(varied(), LABELS)


def refusal(kind: type[InvalidRequest], pointer: str, *classes: tuple[int | str, ...], **fields: Any) -> str:
    """The detail of the refusal, whose class and pointer are as given."""
    with pytest.raises(InvalidRequest) as caught:
        make_plan(request(1, *classes, **{"methods": ("grad_cam",), **fields}), model())
    assert type(caught.value) is kind
    assert [problem.pointer for problem in caught.value.errors] == [pointer]
    assert caught.value.errors[0].detail == caught.value.detail
    assert caught.value.status == 422
    return caught.value.detail


def test_an_unknown_method_names_the_nearest() -> None:
    assert "'grad_cam'" in refusal(UnknownMethod, "/method", methods=("grad_cm",))
    assert "'guided_grad_cam'" in refusal(UnknownMethod, "/method/1", methods=("grad_cam", "guided_gradcam"))


def test_an_unknown_layer_names_the_nearest() -> None:
    detail = refusal(UnknownLayer, "/gen_params/target_conv_layer", gen_params={"target_conv_layer": "thrid"})
    assert "no layer 'thrid'" in detail
    assert "'third'" in detail


def test_an_empty_layer_name_is_refused_at_its_key() -> None:
    refusal(UnknownLayer, "/gen_params/target_conv_layer", gen_params={"target_conv_layer": ""})


def test_a_layer_that_is_no_map_says_why() -> None:
    detail = refusal(UnknownLayer, "/gen_params/target_conv_layer", gen_params={"target_conv_layer": "head"})
    assert "2 dimensions" in detail


@pytest.mark.parametrize("wrong", [7, -1, 10**9])
def test_an_id_out_of_range_names_the_range(wrong: int) -> None:
    assert "0 to 6" in refusal(UnknownClass, "/target_classes", (wrong,))


def test_an_unknown_class_name_names_the_nearest() -> None:
    assert "'bee'" in refusal(UnknownClass, "/target_classes", ("beee",))
    refusal(UnknownClass, "/target_classes", ("Ant",))  # names match exactly


def test_a_name_that_two_classes_bear_is_refused_with_their_ids() -> None:
    assert "[2, 4]" in refusal(UnknownClass, "/target_classes", ("cat",))


def test_integers_are_ids_and_strings_are_names() -> None:
    plan = make_plan(request(2, ("7", 3, "ant"), (), methods=("grad_cam",)), model())
    assert plan.classes == ((5, 3, 0), ())


class Searched(tuple[str, ...]):
    """Labels that count how often they are gone through."""

    times = 0

    def __iter__(self) -> Iterator[str]:
        Searched.times += 1
        return super().__iter__()


def test_many_names_of_many_pictures_are_one_search_through_the_labels() -> None:
    labels = Searched(f"class {number}" for number in range(1000))
    lists = (labels[-400:], labels[:400])  # the same for half of the pictures
    Searched.times = 0
    net = dataclasses.replace(model(), labels=labels)
    plans = [make_plan(request(64, *lists * 32, methods=("grad_cam",)), net) for _ in range(2)]
    assert [plan.classes for plan in plans] == [(tuple(range(600, 1000)), tuple(range(400))) * 32] * 2
    assert Searched.times == 1


def test_an_unknown_parameter_names_the_nearest() -> None:
    detail = refusal(InvalidGenParams, "/gen_params/scalling", gen_params={"scalling": "none"})
    assert "takes no parameter 'scalling'" in detail
    assert "Did you mean 'scaling'" in detail


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scaling", "relu"),
        ("scaling", 1),
        ("scaling", None),
        ("use_conv_only", "yes"),
        ("use_conv_only", "True"),
        ("use_conv_only", ""),
        ("use_conv_only", 1),
        ("use_conv_only", None),
        ("target_conv_layer", 3),
    ],
)
def test_a_value_of_another_kind_is_refused_at_its_key(key: str, value: object) -> None:
    assert repr(key) in refusal(InvalidGenParams, f"/gen_params/{key}", gen_params={key: value})


def test_a_key_is_escaped_in_its_pointer() -> None:
    refusal(InvalidGenParams, "/gen_params/a~1b~0c", gen_params={"a/b~c": 1})


@pytest.mark.parametrize("key", ["scaling", "use_conv_only"])
def test_a_method_of_three_channels_refuses_the_cam_familys_parameters(key: str) -> None:
    values = {"scaling": "none", "use_conv_only": True}
    methods = ("guided_grad_cam",)
    assert "guided_grad_cam takes no" in refusal(
        InvalidGenParams, f"/gen_params/{key}", methods=methods, gen_params={key: values[key]}
    )
    # A key must suit every method asked for.
    several = ("grad_cam", "guided_grad_cam", "cam")
    detail = refusal(InvalidGenParams, f"/gen_params/{key}", methods=several, gen_params={key: values[key]})
    example = f'{{"grad_cam": {{"{key}": ...}}, "cam": {{"{key}": ...}}}}'
    assert detail.endswith(f"but target_conv_layer. Give it to grad_cam and cam alone: {example}.")


@pytest.mark.parametrize(
    ("path", "gen_params", "hint"),
    [
        ("gradcam", {"gradcam": {}}, " Did you mean 'grad_cam'"),
        ("gradcam", {"gradcam": 1}, None),
        ("grad_cam/gradcam", {"grad_cam": {"gradcam": {}}}, None),
        ("grad_cam/grad_cam", {"grad_cam": {"grad_cam": {}}}, None),
    ],
)
def test_a_method_is_meant_only_where_its_object_may_stand(path: str, gen_params: object, hint: str | None) -> None:
    detail = refusal(InvalidGenParams, f"/gen_params/{path}", gen_params=gen_params)
    assert hint in detail if hint else "'grad_cam'" not in detail.partition("Did you mean")[2]


def test_parameters_under_a_methods_name_are_for_it_alone() -> None:
    own = {"target_conv_layer": "second", "grad_cam": {"scaling": "none", "target_conv_layer": "first"}}
    plan = make_plan(request(1, methods=("grad_cam", "guided_grad_cam"), gen_params=own), model())
    assert [task.effective for task in plan.tasks] == [
        {"target_conv_layer": ["first"], "use_conv_only": True, "scaling": "none", **OPTIONS_OFF},
        {"target_conv_layer": ["second"]},
    ]


def test_parameters_of_a_method_that_was_not_asked_for_are_refused() -> None:
    detail = refusal(InvalidGenParams, "/gen_params/guided_grad_cam", gen_params={"guided_grad_cam": {}})
    assert "not among the methods asked for" in detail


def test_a_methods_own_parameters_are_an_object() -> None:
    refusal(InvalidGenParams, "/gen_params/grad_cam", gen_params={"grad_cam": "none"})


def test_a_problem_in_a_methods_own_object_points_into_it() -> None:
    refusal(InvalidGenParams, "/gen_params/grad_cam/scaling", gen_params={"grad_cam": {"scaling": "relu"}})
    refusal(UnknownLayer, "/gen_params/grad_cam/target_conv_layer", gen_params={"grad_cam": {"target_conv_layer": "x"}})


def test_effective_parameters_show_every_default() -> None:
    (task,) = make_plan(request(1, methods=("grad_cam",)), model()).tasks
    assert task.effective == {
        "target_conv_layer": ["third"],
        "use_conv_only": True,
        "scaling": "scale_after_relu",
        **OPTIONS_OFF,
    }


def test_effective_parameters_name_the_layer_behind_recommended() -> None:
    plan = make_plan(request(1, methods=("guided_grad_cam",), gen_params={"target_conv_layer": "recommended"}), model())
    assert plan.tasks[0].effective == {"target_conv_layer": [model().layers.recommended]}


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False)])
def test_booleans_are_taken_as_halcon_writes_them(text: str, value: bool) -> None:
    for given in (text, value):
        (task,) = make_plan(request(1, methods=("grad_cam",), gen_params={"use_conv_only": given}), model()).tasks
        assert task.effective["use_conv_only"] is value
    assert (task.targets[0].node.target is torch.ops.aten.relu.default) is not value


@pytest.mark.parametrize(
    ("net", "layer", "why"),
    [
        (hand(), None, "no ReLU or ReLU6"),  # a linear follows
        (hand(nn.Hardswish()), None, "no ReLU or ReLU6"),
        (hand(nn.Hardtanh(-1, 6)), None, "no ReLU or ReLU6"),
        (hand(nn.ReLU()), "act", "is no convolution"),
        (model_of(program_of(seeded(Residual), 12)), "conv", "no ReLU or ReLU6"),  # a shortcut is added first
        (model_of(program_of(seeded(Residual), 12)), "norm", "is no convolution"),
    ],
)
def test_use_conv_only_false_wants_a_fused_relu(net: Model, layer: str | None, why: str) -> None:
    params = {"use_conv_only": False, **({"target_conv_layer": layer} if layer else {})}
    with pytest.raises(InvalidGenParams, match=why) as caught:
        make_plan(request(1, methods=("grad_cam",), gen_params=params), net)
    assert [problem.pointer for problem in caught.value.errors] == ["/gen_params/use_conv_only"]
