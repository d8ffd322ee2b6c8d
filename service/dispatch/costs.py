"""What requests cost, in seconds of device work, learned from those that were answered."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from dataclasses import dataclass

from service.workers.messages import ExplainRequest

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
    """The mean cost of a picture per model, methods, parameters and number of classes. The least recent are dropped."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def estimate(self, request: ExplainRequest) -> float | None:
        """Seconds of device work; None where nothing like it was measured lately."""
        per_picture = self._lately(_key(request)).estimate()
        return None if per_picture is None else per_picture * len(request.pictures)

    def learn(self, request: ExplainRequest, spent: float, finished: bool) -> None:
        """The device worked `spent` seconds for a request, until it was answered or given up."""
        per_picture = spent / len(request.pictures)
        key = _key(request)
        known = self._lately(key)
        self._known[key] = known.finish(per_picture) if finished else known.give_up(UNFINISHED * per_picture, spent)
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def _lately(self, key: str) -> _Known:
        known = self._known.get(key)
        return known if known and time.monotonic() - known.at <= FORGET_S else _Known()


def _key(request: ExplainRequest) -> str:
    classes = max(map(len, request.target_classes), default=0)
    return json.dumps([request.model_id, request.methods, request.gen_params, max(1, classes)], sort_keys=True)
