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


@dataclass
class _Known:
    per_picture: float
    at: float


class Costs:
    """The mean cost of a picture per model, methods, parameters and number of classes. The least recent are dropped."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Known] = OrderedDict()

    def estimate(self, request: ExplainRequest) -> float | None:
        """Seconds of device work; None where nothing like it was measured lately."""
        known = self._known.get(_key(request))
        if known is None or time.monotonic() - known.at > FORGET_S:
            return None
        return known.per_picture * len(request.pictures)

    def learn(self, request: ExplainRequest, spent: float, finished: bool) -> None:
        """The device worked `spent` seconds for a request, until it was answered or given up."""
        per_picture = spent / len(request.pictures)
        key, known = _key(request), self._known.get(_key(request))
        if finished:
            before = known.per_picture if known else per_picture
            per_picture = RECENT * per_picture + (1 - RECENT) * before
        else:
            per_picture *= UNFINISHED
            if known and known.per_picture >= per_picture:
                return
        self._known[key] = _Known(per_picture, time.monotonic())
        self._known.move_to_end(key)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)


def _key(request: ExplainRequest) -> str:
    classes = max(map(len, request.target_classes), default=0)
    return json.dumps([request.model_id, request.methods, request.gen_params, max(1, classes)], sort_keys=True)
