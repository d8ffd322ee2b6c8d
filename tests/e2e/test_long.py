"""What a service is after much work, and while it has none: no leak, no hook, no idle cost; and probes under load."""

from __future__ import annotations

import gc
import http.client
import itertools
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from torch import Tensor, nn

from service.errors import MethodNotSupported
from service.explain.method import REGISTRY
from service.models.repository import Entry
from service.settings import Settings
from service.workers.device import Device
from service.workers.engine import Engine
from service.workers.loading import load_into
from service.workers.messages import ExplainRequest
from tests.conftest import write_tiny
from tests.e2e.support import file_of, resized, text_of
from tests.server import Server, processor_s, running, wait_until
from tests.soak.cases import Case, case
from tests.soak.watch import probing

pytestmark = pytest.mark.alone

CLIENTS = 4
BLOCKS, BLOCK = 6, 140
"""Requests of the test; `make soak` sends many more. Each brings and takes some 50 KB: a leak of them would show."""
NOISE_MIB = {"server": 2.0, "worker": 6.0}
IDLE, MAX_IDLE = 0.01, 0.10
"""Cores that an idle service may take: what is meant, and what is tested on shared machines."""
MAX_PROBE_S = 0.5  # ten times the 50 ms that are meant
MIB = 2**20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("long")
    write_tiny(folder / "models" / "tiny")
    with running(folder, "--models", str(folder / "models")) as server:
        yield server


def requests(picture: bytes) -> list[Case]:
    """What a worn service has answered: several methods, formats and encodings, and errors."""
    path, image = "/models/tiny/heatmap", file_of(resized(picture, 150, 100))
    fields: list[dict[str, Any]] = [
        {},
        {"method": ["grad_cam", "saliency"], "format": "npy"},
        {"target_classes": [0, 1], "encoding": "jpeg"},
        {"method": "guided_grad_cam", "size": "model"},
        {"method": "score_cam", "format": "gray16"},
        {"target_classes": ["anr"]},
        {"images": [text_of(image[:500])]},
    ]
    return [case(str(number), path, json={"images": [text_of(image)], **one}) for number, one in enumerate(fields)]


def work_off(server: Server, cases: list[Case], count: int) -> list[int]:
    """Send `count` requests over a few connections that are kept; returns their statuses."""
    turns = itertools.cycle(cases)
    address = urlsplit(server.url)

    def work(mine: list[Case]) -> list[int]:
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
        statuses = []
        for one in mine:
            connection.request("POST", one.path, one.body, dict(one.headers))
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
        connection.close()
        return statuses

    parts = [[next(turns) for _ in range(count // CLIENTS)] for _ in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        return [status for statuses in pool.map(work, parts) for status in statuses]


def processes(server: Server) -> dict[str, psutil.Process]:
    (worker,) = server.workers()
    return {"server": psutil.Process(server.process.pid), "worker": worker}


def descriptors(server: Server) -> dict[str, int]:
    return {name: process.num_fds() for name, process in processes(server).items()}


# Fault 10: after very many requests


def test_many_requests_leave_no_descriptor_and_no_memory(service: Server, chelsea: bytes) -> None:
    cases = requests(chelsea)
    work_off(service, cases, BLOCK)
    wait_until(lambda: not client_connections(service), 60, service)
    before = descriptors(service)
    resident: dict[str, list[float]] = {"server": [], "worker": []}
    for _ in range(BLOCKS):
        statuses = work_off(service, cases, BLOCK)
        assert set(statuses) == {200, 422}
        for name, process in processes(service).items():
            resident[name].append(process.memory_info().rss / MIB)
    print({name: [round(mib, 1) for mib in values] for name, values in resident.items()})
    wait_until(lambda: not client_connections(service), 60, service)
    assert descriptors(service) == before
    for name, values in resident.items():
        assert values[-1] - values[0] <= NOISE_MIB[name], (name, values)


def client_connections(server: Server) -> list[object]:
    connections = psutil.Process(server.process.pid).net_connections("tcp")
    return [one for one in connections if one.status == psutil.CONN_ESTABLISHED]


QUICK: dict[str, dict[str, object]] = {
    "integrated_gradients": {"steps": 4},
    "is_cam": {"n": 1},
    "occlusion": {"window": 16, "stride": 16},
    "rise": {"n": 4},
    "smooth_grad": {"n": 4},
    "smooth_grad_cam_plus_plus": {"n": 4},
    "ss_cam": {"n": 1},
}


def modules() -> list[nn.Module]:
    """Every module in this process, whoever holds it."""
    gc.collect()
    return [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]


def hooks_of(module: nn.Module) -> dict[str, list[object]]:
    return {name: list(value) for name, value in vars(module).items() if "hook" in name and value}


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def test_no_method_leaves_anything_on_a_module(tmp_path: Path, chelsea: bytes) -> None:
    strangers = {id(module) for module in modules()}
    write_tiny(tmp_path / "tiny")
    engine = Engine(Device("cpu", None, 4), Settings(compiled_heads=0))
    try:
        assert load_into(engine, Entry("tiny", tmp_path / "tiny")).state == "ready"
        source = engine.models["tiny"].program.source
        state = {id(module): (hooks_of(module), module.training) for module in source.modules()}
        weights = {name: value.clone() for name, value in source.state_dict().items()}
        assert weights
        answered = {method for _ in range(2) for method in REGISTRY if explained(engine, method, chelsea)}
        assert answered >= {"grad_cam", "guided_backprop", "deconvnet", "score_cam", "full_grad", "smooth_grad"}
        assert {id(module): (hooks_of(module), module.training) for module in source.modules()} == state
        assert all((source.state_dict()[name] == value).all() for name, value in weights.items())
        ours = [module for module in modules() if id(module) not in strangers]
        assert set(map(id, source.modules())) <= set(map(id, ours))
        for module in ours:
            assert id(module) in state or not hooks_of(module) or is_captures(module), module
            assert not any(value.requires_grad for value in tensors_of(module)), module
            assert all(value.grad is None for value in tensors_of(module)), module
    finally:
        engine.close()


def is_captures(module: nn.Module) -> bool:
    """Whether torch.export made this module, with hooks of its own, when the network was captured."""
    return "_StatefulGraphModule" in [kind.__name__ for kind in type(module).__mro__]


def explained(engine: Engine, method: str, picture: bytes) -> bool:
    """Whether the method could explain two pictures and two classes of each."""
    params = QUICK.get(method, {})
    request = ExplainRequest("tiny", (picture,) * 2, ((0, 1),) * 2, (method,), gen_params=params, as_base64=False)
    try:
        engine.explain(request)
    except MethodNotSupported:
        return False
    return True


# Fault 12: probes while every worker is busy


def test_probes_answer_at_once_while_the_worker_is_busy(service: Server, chelsea: bytes) -> None:
    slow = {"method": "rise", "gen_params": {"n": 20_000}, "timeout_s": 4}
    body = {"images": [text_of(chelsea)] * 8, **slow}

    def ask(_number: int) -> int:
        with httpx.Client(base_url=service.url, timeout=60) as client:
            return client.post("/models/tiny/heatmap", json=body).status_code

    with probing(service.url) as probes, ThreadPoolExecutor(4) as pool:
        answers = pool.map(ask, range(4))
        wait_until(lambda: service.given() > 0, 60, service)
        busy_from = time.monotonic()
        assert set(answers) == {504}, "each was computed until its deadline"
        busy_until = time.monotonic()
    during = [probe for probe in probes if busy_from < probe.at < busy_until]
    latencies = sorted(1000 * probe.seconds for probe in during)
    print(f"{len(during)} probes: median {statistics.median(latencies):.1f} ms, largest {latencies[-1]:.1f} ms")
    assert len(during) > 40
    assert {(probe.path, probe.status) for probe in during} == {("/livez", 200), ("/readyz", 200)}
    assert latencies[-1] <= 1000 * MAX_PROBE_S


# Fault 16: idle


def test_an_idle_service_takes_next_to_nothing(service: Server, chelsea: bytes) -> None:
    assert set(work_off(service, requests(chelsea), 28)) == {200, 422}
    wait_until(lambda: not client_connections(service), 60, service)
    time.sleep(1)
    before, began = taken(service), time.monotonic()
    time.sleep(4)
    share = (taken(service) - before) / (time.monotonic() - began)
    print(f"idle: {100 * share:.2f} % of a core, {100 * IDLE:g} % are meant")
    assert share < MAX_IDLE


def taken(server: Server) -> float:
    """Seconds of processor time that the server and everything below it have taken."""
    family = [psutil.Process(server.process.pid), *server.family()]
    return sum(map(processor_s, family))
