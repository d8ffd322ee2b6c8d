"""What is done in processes of their own, so that it stalls nobody: a head is compiled, a network captured."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from service import logs
from service.models.compiled import Form, compile_head
from service.models.packages import PackageStore
from service.models.repository import Entry
from service.models.resident import load
from service.models.spec import read_spec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileJob:
    """One head to be compiled into `store` under `key`. `targets` are (layer, use_conv_only)."""

    key: str
    entry: Entry
    revision: str
    targets: tuple[tuple[str, bool], ...]
    form: Form
    threads: int
    folder: Path
    store: PackageStore
    log_level: str
    log_format: logs.Format


def compile_in_background(job: CompileJob) -> None:
    """Compile as the main function of a process. What goes wrong is logged; the store then has no such package."""
    logs.configure(job.log_level, job.log_format, "compile")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of CUDA on every CPU host
    torch.set_num_threads(job.threads)
    with tempfile.TemporaryDirectory(prefix="compile-") as scratch:
        cache = str(job.folder / "inductor")  # of the worker: the next head's compiler finds its headers prepared
        os.environ.update(TMPDIR=scratch, TORCHINDUCTOR_CACHE_DIR=cache, TORCHINDUCTOR_COMPILE_THREADS="1")
        try:
            _compile(job)
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            logger.warning(
                "model %s stays eager at %s: %s: %s", job.entry.id, job.targets, type(error).__name__, reason
            )


def capture_in_background(entry: Entry, device: str, folder: Path | None) -> None:
    """Capture a model into `folder` as the main function of a process. What goes wrong is for its load to say."""
    with contextlib.suppress(BaseException):
        load(entry.id, read_spec(entry.folder), entry.folder, torch.device(device), folder)


def kill(process: SpawnProcess) -> None:
    """End a compiling process, and the compiler that it runs."""
    with contextlib.suppress(OSError):
        if process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _compile(job: CompileJob) -> None:
    with job.store.making(job.key) as folder:
        if job.store.find(job.key):  # another worker was faster
            return
        model = load(job.entry.id, read_spec(job.entry.folder), job.entry.folder, job.form.device, job.folder)
        if model.revision != job.revision:
            logger.warning("model %s has changed on disk; its compiled head would be another's", job.entry.id)
            return
        targets = [model.layers.target(name, use_conv_only) for name, use_conv_only in job.targets]
        compile_head(model.heads.at(*targets).eager, job.form, folder)
