"""What requests cost, in seconds of device work, learned from those that were answered."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from service.workers.messages import ExplainRequest, MethodInfo

MAX_KNOWN = 1024
FORGET_S = 600.0
"""An estimate older than this is none, so that what was refused for it is tried again."""
RECENT = 0.3
"""The weight of the latest request in the mean."""
UNFINISHED = 1.25
"""What was given up is taken to cost so many times what was spent on it."""
RAISE = 8
"""A request counts for so many times of what is known at most: the device may only have stalled."""
HOLD_S, LONGEST_HOLD_S = 10.0, 300.0
"""So long one that was given up counts at first and at most: four times as long whenever another try is given up."""


@dataclass
class _Known:
    """Seconds per picture."""

    mean: float | None = None
    at: float = 0.0
    unfinished: float = 0.0
    given_up: float = 0.0
    hold: float = 0.0

    def is_held(self) -> bool:
        return time.monotonic() < self.given_up + self.hold

    def estimate(self) -> float | None:
        return max(self.unfinished, self.mean or 0.0) if self.is_held() else self.mean

    def finish(self, per_picture: float) -> _Known:
        if self.mean:
            per_picture = RECENT * min(per_picture, RAISE * self.mean) + (1 - RECENT) * self.mean
        return _Known(per_picture, time.monotonic())

    def give_up(self, per_picture: float, spent: float) -> _Known:
        now = time.monotonic()
        if per_picture <= (self.estimate() or 0.0):  # one who left early tells nothing new
            return self
        if self.is_held() and now - spent < self.given_up:  # nor does another that was there when the device stalled
            return self
        if self.mean:
            per_picture = min(per_picture, RAISE * max(self.mean, self.unfinished))
        hold = min(4 * self.hold or HOLD_S, LONGEST_HOLD_S)
        return _Known(self.mean, now, per_picture, given_up=now, hold=hold)


class Costs:
    """The mean cost of a picture per model, methods, number of classes and those parameters that change the cost.

    The least recent are dropped.
    """

    def __init__(self, methods: Callable[[], Iterable[MethodInfo]]) -> None:
        """`methods`: those that are known by now."""
        self._methods = methods
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def estimate(self, request: ExplainRequest) -> float | None:
        """Seconds of device work; None where nothing like it was measured lately."""
        per_picture = self._lately(self._key(request)).estimate()
        return None if per_picture is None else per_picture * len(request.pictures)

    def learn(self, request: ExplainRequest, spent: float, finished: bool) -> None:
        """The device worked `spent` seconds for a request, until it was answered or given up."""
        per_picture = spent / len(request.pictures)
        key = self._key(request)
        known = self._lately(key)
        self._known[key] = known.finish(per_picture) if finished else known.give_up(UNFINISHED * per_picture, spent)
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def _key(self, request: ExplainRequest) -> str:
        known = {method.name: method for method in self._methods()}
        asked = {name: _costly_params(known[name], request.gen_params) for name in request.methods if name in known}
        classes = max(map(len, request.target_classes), default=0)
        return json.dumps([request.model_id, asked, max(1, classes)], sort_keys=True)

    def _lately(self, key: str) -> _Known:
        known = self._known.get(key)
        return known if known and time.monotonic() - known.at <= FORGET_S else _Known()


def _costly_params(method: MethodInfo, given: Mapping[str, object]) -> dict[str, object]:
    """What the method will use, defaults included, of all parameters whose schema does not say that none of their
    values takes longer than another. Seeds, for one: a request with another seed costs the same."""
    own = given.get(method.name)
    values = {**given, **own} if isinstance(own, Mapping) else given
    schemas = cast(Mapping[str, Mapping[str, object]], method.gen_params.get("properties", {}))
    return {
        name: _plain(values.get(name, schema.get("default")))
        for name, schema in schemas.items()
        if schema.get("x-changes-cost", True)
    }


def _plain(value: object) -> object:
    """The same for each way to write a value: a boolean may be a string, and one layer may stand in a list."""
    if isinstance(value, list | tuple) and len(value) == 1:
        return value[0]
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
