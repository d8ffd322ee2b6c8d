"""Activations of pictures seen lately: another class of the same picture then costs the tail alone."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = tuple[Tensor, ...]
Key = tuple[str, ...]


class ActivationCache:
    """The values at a cut, picture by picture, within a number of bytes; the least recently used leave."""

    def __init__(self, max_bytes: int) -> None:
        """0 bytes keep nothing."""
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Key, tuple[Values, torch.cuda.Event | None]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def values(self, key: Key, pictures: NDArray[np.uint8], images: Tensor, head: Callable[[Tensor], Values]) -> Values:
        """What `head` makes of `images` (N,3,H,W), run on those alone whose values are not kept yet.

        `pictures` (N,H,W,3) are what the images were made of; `key` stands for everything else that the values depend
        on. Dimension 0 of each value is the batch.
        """
        if self._max_bytes == 0:
            return head(images)
        keys = [(*key, hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()) for picture in pictures]
        found = [self._get(each) for each in keys]
        missing = [index for index, values in enumerate(found) if values is None]
        if len(missing) == len(keys):
            fresh = head(images)
            self._put_all(keys, fresh)
            return fresh
        if missing:
            fresh = head(images[missing])
            self._put_all([keys[index] for index in missing], fresh)
            for place, index in enumerate(missing):
                found[index] = tuple(value[place : place + 1] for value in fresh)
        return tuple(torch.cat(column) for column in zip(*(values for values in found if values), strict=True))

    def _get(self, key: Key) -> Values | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            values, ready = self._kept[key]
            _hold(values, ready)
            return values

    def _put_all(self, keys: Sequence[Key], values: Values) -> None:
        for place, key in enumerate(keys):
            # A copy, or one picture would keep the memory of its whole batch.
            self._put(key, tuple(value[place : place + 1].clone() for value in values))

    def _put(self, key: Key, values: Values) -> None:
        if _size(values) > self._max_bytes:
            return
        with self._lock:
            replaced, _ = self._kept.pop(key, ((), None))
            self._bytes += _size(values) - _size(replaced)
            self._kept[key] = values, _ready(values)
            while self._bytes > self._max_bytes:
                _, (dropped, _) = self._kept.popitem(last=False)
                self._bytes -= _size(dropped)


def _size(values: Values) -> int:
    return sum(value.nbytes for value in values)


def _ready(values: Values) -> torch.cuda.Event | None:
    """When the current stream will have computed the values; other streams must wait for it."""
    return torch.cuda.current_stream(values[0].device).record_event() if values[0].is_cuda else None


def _hold(values: Values, ready: torch.cuda.Event | None) -> None:
    """Wait for the stream that makes the values, and tell the allocator, which frees for that stream, of this one."""
    if ready is not None:
        torch.cuda.current_stream(values[0].device).wait_event(ready)
    for value in values:
        if value.is_cuda:
            value.record_stream(torch.cuda.current_stream(value.device))
