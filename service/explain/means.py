"""By what means a pass is computed: how much at a time, and what is done where memory is too small for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

STICKY = (
    "device-side assert",
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "misaligned address",
    "hardware stack error",
    "unspecified launch failure",
    "launch timed out",
    "uncorrectable ECC",
)
"""CUDA errors after which every later call in the process fails: the context is lost."""
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "_ALLOC_FAILED")


@dataclass(frozen=True)
class Means:
    """How a pass is computed. `check` is called between chunks and may raise; `chunk` is how many images fit in one.

    `predict`: logits of images without a gradient, by the fastest means there are; None: by the captured network.
    """

    predict: Callable[[Tensor], Tensor] | None = None
    chunk: int = 8
    check: Callable[[], None] = lambda: None

    def in_chunks(self, count: int, run: Callable[[slice], T], chunk: int | None = None) -> list[T]:
        """`run` on slices of 0 to `count`, one after the other; where memory is too small for one, on its halves."""
        size = chunk or self.chunk
        done: list[T] = []
        start = 0
        while start < count:
            self.check()
            stop = min(start + size, count)
            try:
                done.append(run(slice(start, stop)))
            except RuntimeError as error:
                if stop - start == 1 or not is_out_of_memory(error):
                    raise
            else:
                start = stop
                continue
            size = (stop - start) // 2  # only here are the failed tensors free: the exception's traceback held them
        return done


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device, or the host, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)


def is_poisoned(error: BaseException) -> bool:
    """Whether the device is lost to this process: only a new one can use it."""
    return isinstance(error, RuntimeError) and "CUDA" in str(error) and any(sign in str(error) for sign in STICKY)
