"""Heads compiled for real, in a process of their own, and swapped in under traffic; one tiny network for all tests."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.models import kept
from service.models.packages import DIGEST, PackageStore, _digest
from service.models.repository import Entry
from service.models.resident import Model
from service.settings import Settings
from service.workers import compiler
from service.workers.compiler import COMPILE_AFTER, Compiler
from service.workers.device import Device
from service.workers.engine import Engine
from service.workers.loading import describe, load_into
from service.workers.messages import ExplainRequest
from tests.conftest import write_tiny
from tests.nets import close_to, pictures
from tests.server import wait_until
from tests.threads import repeating

pytestmark = [
    pytest.mark.alone,  # a package that others disturb may seem slower than eager
    pytest.mark.timeout(550),  # several compilations, each of which may take `COMPILE_S`
]

COMPILE_S = 240.0
DEFAULT, EARLIER = "2", "0"  # the two convolutions of the tiny network


class Serve(Protocol):
    def __call__(self, heads: int = 4, cache: str = "cache") -> AbstractContextManager[Served]: ...


class Served:
    """The tiny model in an engine of this process, with a compiler."""

    def __init__(self, models: Path, cache: Path, folder: Path, heads: int) -> None:
        settings = Settings(compiled_heads=heads, activation_cache=0, max_batch=2)  # one package less
        folder.mkdir(exist_ok=True)
        self.engine = Engine(Device("cpu", None, settings.max_batch), settings)
        self.told: list[tuple[str, ...]] = []
        store = PackageStore(cache, 2**30)
        self.compiler = Compiler(settings, store, self.engine.device, folder, self._changed)
        self.entry = Entry("tiny", models / "tiny")
        assert load_into(self.engine, self.entry, folder).state == "ready"
        self.model = self.engine.models["tiny"]

    def _changed(self, model: Model) -> None:
        self.told.append(describe(model).compiled_layers)

    def map_of(self, picture: bytes, class_id: int, layer: str = DEFAULT) -> NDArray[np.float32]:
        """The raw map, as float32."""
        request = ExplainRequest(
            "tiny",
            (picture,),
            ((class_id,),),
            ("grad_cam",),
            gen_params={"target_conv_layer": layer, "scaling": "none"},
            format="npy",
            size="model",
            as_base64=False,
        )
        (heatmap,) = self.engine.explain(request).results[0].heatmaps
        values: NDArray[np.float32] = np.load(io.BytesIO(heatmap.data))
        return values


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiler")
    write_tiny(folder / "models" / "tiny")
    return folder


@pytest.fixture(scope="module")
def serve(root: Path) -> Serve:
    """Open a `Served` over one store for all tests: what the first test compiles is found by the others."""

    @contextmanager
    def opened(heads: int = 4, cache: str = "cache") -> Iterator[Served]:
        one = Served(root / "models", root / cache, root / "captured", heads)
        try:
            yield one
        finally:
            one.compiler.close()
            one.engine.close()

    return opened


@pytest.fixture(scope="module")
def shown() -> list[bytes]:
    files = []
    for pixels in pictures(4, 32):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return files


@pytest.mark.slow
def test_a_head_is_swapped_in_under_traffic_and_no_answer_changes(
    serve: Serve, shown: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as served:
        eager = [served.map_of(picture, 1) for picture in shown]
        with repeating(lambda: [served.map_of(picture, 1) for picture in shown], 4) as answers:
            served.compiler.add(served.model, served.entry)
            wait_until(lambda: (DEFAULT,) in served.told, COMPILE_S)
            before = len(answers)
            wait_until(lambda: len(answers) > before + 8, 60)
        assert before > 4
        for answer in answers:
            assert all(close_to(ours, oracle) < 1e-4 for ours, oracle in zip(answer, eager, strict=True))
        assert describe(served.model).compiled_layers == (DEFAULT,)
        assert describe(served.model).compiled_bytes > 0
        ended: list[tuple[int, int]] = []
        monkeypatch.setattr(os, "killpg", lambda *process: ended.append(process))
        served.compiler.close()
        assert not ended, "the id of the process that compiled may be another's by now"


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_has_made(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "COMPILER", "no-such-compiler")  # none is needed
    with serve() as served:
        served.compiler.add(served.model, served.entry)
        wait_until(lambda: (DEFAULT,) in served.told, 60)


def crashing(package: Path) -> None:
    """Let the library of a package abort when it is loaded, as one may whose own libraries have changed."""
    source, library = package.with_suffix(".cpp"), package.with_suffix(".so")
    source.write_text("#include <cstdlib>\n__attribute__((constructor)) static void crash() { std::abort(); }")
    subprocess.run([compiler.COMPILER, "-shared", "-fPIC", "-o", library, source], check=True)
    with zipfile.ZipFile(package) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(package, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, library.read_bytes() if name.endswith(".so") else data)


def _serve(models: Path, cache: Path, folder: Path) -> None:
    served = Served(models, cache, folder, heads=4)
    served.compiler.add(served.model, served.entry)
    wait_until(lambda: (DEFAULT,) in served.told, 60)


@pytest.mark.slow
def test_a_package_that_crashes_one_process_is_dropped_by_the_next(
    root: Path, serve: Serve, shown: list[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = root / "crashing"
    shutil.copytree(root / "cache", cache)
    for package in cache.glob("*/*.pt2"):
        crashing(package)
        kept.write(package.parent / DIGEST, _digest(package.parent))  # it was whole when it was made
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(root / "models", cache, root / "captured")
    )
    process.start()
    try:
        process.join(120)
    finally:
        process.kill()  # which does nothing where it has ended
    assert process.exitcode == -signal.SIGABRT
    monkeypatch.setattr(compiler, "COMPILER", "no-such-compiler")
    with serve(cache="crashing") as served, caplog.at_level(logging.WARNING):
        served.compiler.add(served.model, served.entry)
        wait_until(lambda: "no-such-compiler" in caplog.text, 60)
        assert "is dropped" in caplog.text
        assert served.map_of(shown[0], 1).any()
    assert {file.name for file in cache.iterdir()} == {"lock"}


@pytest.mark.slow
def test_a_layer_that_is_used_often_is_compiled_too_and_the_least_recently_used_head_leaves(
    serve: Serve, shown: list[bytes]
) -> None:
    with serve(heads=1) as served:
        served.compiler.add(served.model, served.entry)
        wait_until(lambda: (DEFAULT,) in served.told, 60)
        eager = served.map_of(shown[0], 2, EARLIER)
        for _ in range(COMPILE_AFTER - 2):
            served.map_of(shown[0], 2, EARLIER)
        assert served.told == [(DEFAULT,)]
        served.map_of(shown[0], 2, EARLIER)
        wait_until(lambda: (EARLIER,) in served.told, COMPILE_S)
        assert served.told == [(DEFAULT,), (EARLIER,)]
        assert close_to(served.map_of(shown[0], 2, EARLIER), eager) < 1e-4
        for _ in range(COMPILE_AFTER):
            served.map_of(shown[0], 2, DEFAULT)
        wait_until(lambda: served.told[-1] == (DEFAULT,), 60)


def test_without_a_compiler_the_model_serves_eagerly_and_the_log_says_so(
    serve: Serve,
    shown: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(compiler, "COMPILER", "no-such-compiler")
    with serve(cache="empty") as served, caplog.at_level(logging.WARNING):
        served.compiler.add(served.model, served.entry)
        wait_until(lambda: "no-such-compiler" in caplog.text, 60)
        assert served.map_of(shown[0], 1).any()
        assert served.told == []


def test_without_room_models_serve_eagerly_and_that_is_said_once(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiler, "ROOM", 2**50)
    with serve(cache="full") as served, caplog.at_level(logging.WARNING):
        for layer in (EARLIER, DEFAULT):
            served.compiler.add(served.model, served.entry)
            head = served.model.heads.at(served.model.layers.target(layer, True))
            for _ in range(COMPILE_AFTER):
                served.model.heads.on_use(head)
        served.compiler._wanted.put(None)
        served.compiler._thread.join(60)
        said = [record.getMessage() for record in caplog.records if record.name == compiler.__name__]
        assert [message.partition(" in ")[0] for message in said] == ["there is too little room for compiled heads"]
        assert served.told == []


def test_a_head_needs_six_times_its_networks_weights_in_both_folders(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    free: dict[Path, int] = {}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    with serve(cache="empty") as served:
        weights = served.model.program.source.state_dict().values()
        enough = 6 * sum(weight.numel() * weight.element_size() for weight in weights)
        places = (served.compiler._store.folder, served.compiler._folder)
        free.update(dict.fromkeys(places, enough))
        assert served.compiler._obstacle(served.model) is None
        for place in places:
            free[place] = enough - 1
            assert served.compiler._obstacle(served.model) == f"there is too little room for compiled heads in {place}"
            free[place] = enough


def test_closing_ends_the_process_that_compiles(serve: Serve) -> None:
    others = set(psutil.Process().children(recursive=True))  # a server that other tests share

    def compiling() -> set[psutil.Process]:
        """The compiling process and what it runs."""
        return {child for child in psutil.Process().children(recursive=True) if child not in others and runs(child)}

    with serve(cache="closed") as served:
        served.compiler.add(served.model, served.entry)
        wait_until(compiling, 60)
        processes = compiling()
        served.compiler.close()
        wait_until(lambda: not any(runs(process) for process in processes) and not compiling(), 60)
        assert served.told == []


def runs(process: psutil.Process) -> bool:
    """Whether it is alive, and not multiprocessing's resource tracker, which stays."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
