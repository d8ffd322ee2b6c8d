"""Load and unload of models: by which worker, in which order, and what requests see meanwhile."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from service.errors import ModelFailed, ModelLoading, ModelNotFound, ModelUnloaded
from service.workers.messages import Answer, Load, ModelInfo, Unload
from tests.dispatch.support import Bench, on_loop, settle


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("other", "tiny"):
        (tmp_path / name).mkdir()
    return tmp_path


async def asked(bench: Bench) -> None:
    """Wait until each worker has been sent something: the repository is read in a thread."""
    for worker in bench.workers:
        await worker.told.wait()


async def loading(bench: Bench, model_id: str) -> asyncio.Task[ModelInfo]:
    """A load of which every worker has been told."""
    load = asyncio.create_task(bench.dispatcher.load(model_id))
    await asked(bench)
    return load


@on_loop
async def test_a_reload_serves_the_old_revision_until_every_worker_has_the_new_one(models: Path) -> None:
    async with Bench(devices=2, models=models) as bench:
        for worker in bench.workers:
            worker.serve("tiny")
        load = await loading(bench, "tiny")
        assert [type(message) for worker in bench.workers for message in worker.sent] == [Load, Load]
        during = await bench.ask()
        assert not bench.dispatcher.not_ready()
        for worker in bench.workers:
            worker.tell(ModelInfo("tiny", "ready", revision="sha256:new"))
            assert not load.done()
            worker.loaded("tiny")
        assert (await load).revision == "sha256:new"
        bench.worker.finish(1)
        assert isinstance(await during, Answer)


@on_loop
async def test_a_failed_reload_says_why_and_changes_nothing(models: Path) -> None:
    async with Bench(models=models) as bench:
        bench.worker.serve("tiny")
        load = await loading(bench, "tiny")
        bench.worker.loaded("tiny", "weights are missing")
        with pytest.raises(ModelFailed, match=r"weights are missing; it is served as before"):
            await load
        served = await bench.ask()
        bench.worker.finish(1)
        await served


@on_loop
async def test_a_new_folder_becomes_a_model_and_readiness_does_not_dip(models: Path) -> None:
    async with Bench(models=models) as bench:
        bench.worker.serve("tiny")
        load = await loading(bench, "other")
        assert list(bench.dispatcher.models()) == ["other", "tiny"]
        with pytest.raises(ModelLoading):
            await (await bench.ask("other"))
        assert not bench.dispatcher.not_ready()
        bench.worker.tell(ModelInfo("other", "ready"))
        bench.worker.loaded("other")
        assert (await load).state == "ready"
        bench.worker.die()
        fresh = await bench.started()
        fresh.serve("tiny")
        assert not fresh.serves, "the new one is the replaced worker's too"
        fresh.tell(ModelInfo("other", "ready"))
        assert fresh.serves


@on_loop
async def test_a_folder_that_is_not_there_is_no_model(models: Path) -> None:
    async with Bench(models=models) as bench:
        bench.worker.serve("tiny")
        with pytest.raises(ModelNotFound, match="Did you mean 'other'"):
            await bench.dispatcher.load("ohter")
        with pytest.raises(ModelNotFound):
            await bench.dispatcher.unload("ohter")


@on_loop
async def test_an_unload_answers_what_was_accepted_and_refuses_the_rest(models: Path) -> None:
    async with Bench(models=models) as bench:
        bench.worker.serve("tiny")
        accepted = [await bench.ask() for _ in range(2)]
        unload = asyncio.create_task(bench.dispatcher.unload("tiny"))
        await settle()
        with pytest.raises(ModelUnloaded):
            await (await bench.ask())
        assert not bench.worker.sent, "the worker keeps it while it is used"
        bench.worker.finish(1)
        await settle()
        bench.worker.finish(2)
        assert all(isinstance(answer, Answer) for answer in await asyncio.gather(*accepted))
        await asked(bench)
        assert bench.worker.sent == [Unload("tiny")]
        bench.worker.loaded("tiny")
        assert (await unload).state == "unloaded"
        bench.worker.tell(ModelInfo("tiny", "ready"))  # a compiled head that came too late
        with pytest.raises(ModelUnloaded, match="an operator can load it again"):
            await (await bench.ask())
        bench.worker.die()
        fresh = await bench.started()
        fresh.hello()
        await settle()
        assert bench.dispatcher.model("tiny").state == "unloaded"


@on_loop
async def test_a_worker_that_dies_over_a_load_leaves_it_to_its_successor(models: Path) -> None:
    async with Bench(models=models) as bench:
        bench.worker.serve("tiny")
        load = await loading(bench, "tiny")
        bench.worker.die()
        assert (await load).id == "tiny"
        (await bench.started()).serve("tiny")


@on_loop
async def test_a_model_that_was_given_up_is_loaded_again_and_survives_its_worker(models: Path) -> None:
    async with Bench(models=models, load_timeout_s=5) as bench:
        bench.worker.hello()
        bench.worker.load("tiny")
        bench.worker.loading_since -= 6
        bench.pool._end_overdue_loads()
        bench.worker.die()
        bench.workers[:] = [await bench.started()]
        assert bench.pool.models["tiny"].reason == "it was not loaded within 5 seconds"
        load = await loading(bench, "tiny")
        bench.worker.serve("tiny")
        bench.worker.loaded("tiny")
        assert (await load).state == "ready"
        bench.worker.die()
        assert bench.pool.models["tiny"].state == "ready", "the next worker loads it"


@on_loop
async def test_a_repository_that_is_gone_has_no_model(models: Path) -> None:
    async with Bench(models=models) as bench:
        bench.worker.serve("tiny")
        shutil.rmtree(models)
        with pytest.raises(ModelNotFound):
            await bench.dispatcher.load("tiny")
        served = await bench.ask()
        bench.worker.finish(1)
        await served
