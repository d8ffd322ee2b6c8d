"""`python -m tests.soak`: a real server under load and in trouble for minutes; see benchmarks/README.md."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import others
from service.models.repository import EMBEDDED
from service.settings import Settings
from tests.conftest import write_tiny
from tests.server import Server, running, runs
from tests.soak import alone
from tests.soak.attacks import ATTACKS, MIXED, Target, attacking
from tests.soak.cases import REAL, TINY, bad_cases, real_cases, tiny_cases, with_key
from tests.soak.findings import LEDGER, Findings, bounds, tables
from tests.soak.traffic import Clients, ask_alone
from tests.soak.trouble import ask_after_kills, kill_workers, reload_models
from tests.soak.watch import probing, watch_memory

ACTIVATION_CACHE = 2 * 2**20
"""A few pictures of the embedded model, so that the cache overflows all the time."""
CACHE = Path("build/soak")
COMPILED_S, QUIET_S = 600.0, 3.0
SETTLE_S, STOP_S = 10.0, 60.0
ALONE_S = 15.0


@dataclass(frozen=True)
class Options:
    """`tiny`: without the embedded model. `compiled_heads`: the server's setting; 0 spares a short run the compiler."""

    minutes: float = 10.0
    clients: int = 16
    kill_every_s: float = 15.0
    seed: int = 0
    tiny: bool = False
    reload: bool = True
    attacks: bool = True
    attack_every_s: float = 3.0
    device: str = "auto"
    compiled_heads: int = Settings.model_fields["compiled_heads"].default

    @property
    def models(self) -> list[str]:
        return [TINY] if self.tiny else [REAL, TINY]


def soak(options: Options, folder: Path) -> Findings:
    """One soak, with all that it writes in `folder` but compiled heads, which are kept from run to run."""
    temporary = folder / "temporary"
    temporary.mkdir()
    key = secrets.token_urlsafe()
    settings = {
        "models": _repository(folder / "models", options),
        "activation-cache": ACTIVATION_CACHE,
        "compiled-heads": options.compiled_heads,
        "cache": CACHE.absolute(),
        "device": options.device,
    }
    if options.reload:
        settings["api-keys-file"] = _keys_file(folder / "keys", key)
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with running(folder, *flags, TMPDIR=str(temporary)) as server:
        found = asyncio.run(_under_load(server, options, key))
        _end(server, temporary, found)
    return found


def _repository(models: Path, options: Options) -> Path:
    write_tiny(models / TINY)
    if not options.tiny:
        (models / REAL).mkdir()
        (models / REAL / "model.toml").write_text((EMBEDDED / REAL / "model.toml").read_text())
    return models


def _keys_file(file: Path, key: str) -> Path:
    """With keys every request needs one, not only those that load a model."""
    file.write_text(f"soak predict,admin sha256:{hashlib.sha256(key.encode()).hexdigest()}\n")
    return file


async def _under_load(server: Server, options: Options, key: str) -> Findings:
    valid = tiny_cases() if options.tiny else [*tiny_cases(), *real_cases()]
    valid, bad = ([with_key(case, key) for case in cases] for cases in (valid, bad_cases()))
    if options.compiled_heads:
        await asyncio.to_thread(_wait_for_compilers, server)
    _say("The oracle, one request at a time:")
    clients = Clients(server.url, valid, bad, await ask_alone(server.url, valid, _say))
    if options.compiled_heads:
        await asyncio.to_thread(_wait_for_compilers, server)  # of the other layers that were asked for
    before = _descriptors(server)
    found = Findings(time.monotonic(), ledger=clients.ledger)
    until = found.started + 60 * options.minutes
    _say(f"{options.clients} clients for {options.minutes:g} minutes")
    shares: list[float] = []
    target = Target(server.url, key)
    attacks = attacking(target, MIXED, options.attack_every_s) if options.attacks else nullcontext(found.attacks)
    with others.watched(shares), probing(server.url) as found.probes, attacks as found.attacks:
        meanwhile = [
            watch_memory(server, found.memory),
            ask_after_kills(server.url, clients, valid[0], found.kills),
            *([reload_models(server.url, key, options.models, found.reloads)] if options.reload else []),
        ]
        async with _cancelled_at_the_end(meanwhile):
            kills = kill_workers(server, options.kill_every_s, until, found.kills)
            await asyncio.gather(clients.run(options.clients, options.seed, until), kills)
        found.ended = time.monotonic()
    found.others = shares[0]
    found.descriptors = (before, await asyncio.to_thread(_settled_descriptors, server, before))
    found.counters = await _counters(server.url, key)
    return found


@asynccontextmanager
async def _cancelled_at_the_end(work: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Do `work` beside what is done inside. What fails of it fails the whole."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


def _wait_for_compilers(server: Server) -> None:
    """Wait until no worker has had a compiling process for a while: what is compiled later, is so under load."""
    _say("Waiting for the compilers")
    quiet_since = started = time.monotonic()
    while time.monotonic() < min(quiet_since + QUIET_S, started + COMPILED_S):
        if _compilers(server):
            quiet_since = time.monotonic()
        time.sleep(0.2)


def _compilers(server: Server) -> list[psutil.Process]:
    return [child for worker in server.workers() for child in worker.children() if runs(child, "spawn_main")]


def _descriptors(server: Server) -> int:
    return int(psutil.Process(server.process.pid).num_fds())


def _settled_descriptors(server: Server, before: int) -> int:
    """Their number once the last connections are closed."""
    deadline = time.monotonic() + SETTLE_S
    while (now := _descriptors(server)) > before and time.monotonic() < deadline:
        time.sleep(0.2)
    return now


async def _counters(url: str, key: str) -> dict[str, float]:
    """The server's counters of requests."""
    async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": key}) as http:
        response = await http.get("/metrics")
    response.raise_for_status()
    counters = dict.fromkeys(("accepted", *LEDGER), 0.0)
    for line in response.text.splitlines():
        name, _, value = line.rpartition(" ")
        short = name.partition("{")[0].removeprefix("heatmap_requests_").removesuffix("_total")
        if short in counters:
            counters[short] += float(value)
    return counters


def _end(server: Server, temporary: Path, found: Findings) -> None:
    """SIGTERM, and a look at what is left: workers' folders before it, everything after it."""
    family = server.family()
    alive = {str(process.pid) for process in family}
    found.folders_left += [
        f"of worker {path.name}" for path in temporary.glob("*/*") if path.name.isdigit() and path.name not in alive
    ]
    server.signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        found.exit_status = server.wait_exit(STOP_S)
    found.children_left = len(psutil.wait_procs(family, timeout=STOP_S / 10)[1])
    empty = "torchinductor_"  # a folder that torch makes when it is imported
    found.folders_left += [path.name for path in temporary.iterdir() if not path.name.startswith(empty)]


def parse(arguments: Sequence[str]) -> Options:
    default = Options()
    parser = argparse.ArgumentParser(
        "soak",
        description="A real server under load and in trouble, for minutes.",
        epilog=f"`--attack NAME` measures attacks alone instead: all, {', '.join(ATTACKS)}.",
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=float, default=default.minutes)
    parser.add_argument("--clients", type=int, default=default.clients)
    parser.add_argument("--kill-every", type=float, default=default.kill_every_s, metavar="S", dest="kill_every_s")
    parser.add_argument("--seed", type=int, default=default.seed, help="of what each client asks, and when it leaves")
    parser.add_argument("--tiny", action="store_true", help="without the embedded model")
    parser.add_argument("--reload", action=argparse.BooleanOptionalAction, default=default.reload, help="of models")
    parser.add_argument("--attacks", action=argparse.BooleanOptionalAction, default=default.attacks, help="mixed in")
    parser.add_argument(
        "--attack-every",
        type=float,
        default=default.attack_every_s,
        metavar="S",
        dest="attack_every_s",
        help="pause between two",
    )
    parser.add_argument("--device", default=default.device, help="as of `serve`")
    parser.add_argument("--compiled-heads", type=int, default=default.compiled_heads, help="as of `serve`")
    return Options(**vars(parser.parse_args(arguments)))


def measure_attacks(arguments: Sequence[str]) -> None:
    """`--attack NAME`: print what each attack alone does to a fresh server."""
    parser = argparse.ArgumentParser("soak", description="Each attack alone on a fresh server.")
    parser.add_argument("--attack", nargs="+", choices=["all", *ATTACKS], required=True, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=ALONE_S)
    options = parser.parse_args(arguments)
    rows = []
    for name in ATTACKS if "all" in options.attack else options.attack:
        _say(f"{name}, {options.seconds:g} s")
        with tempfile.TemporaryDirectory(prefix="heatmap-attack-") as folder:
            rows.append(alone.measure_attack(name, Path(folder), options.seconds).row(name))
    print(alone.table(rows).markdown())


def main(arguments: Sequence[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # the server is stopped on the way out
    if "--attack" in arguments:
        measure_attacks(arguments)
        return
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="heatmap-soak-") as folder:
        found = soak(options, Path(folder))
    judged = bounds(found)
    for table in tables(found, judged):
        print(table.markdown(), end="\n\n")
    sys.exit(any(bound.kept is False for bound in judged))


def _say(line: str) -> None:
    """Progress, apart from the tables."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
