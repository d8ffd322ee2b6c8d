"""Real packages of a tiny head: equal to the eager one for every input, or refused; never wrong without a word."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from service.models import compiled as compiled_module
from service.models.compiled import FULL, SEVERAL, SINGLE, CompiledHead, Disagreement, Form, compile_head, prove
from service.models.heads import Heads
from service.models.layers import LayerTable
from service.models.packages import key_of
from service.models.program import Program, as_tuple, capture
from service.workers.compiler import COMPILER
from tests.nets import CPU, Dense, Varied, close_to, images, program_of, seeded, table

SIZE, MAX_BATCH = 12, 4
FORM = Form((3, SIZE, SIZE), torch.float32, CPU, MAX_BATCH)

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="there is no C++ compiler")


@cache
def program(seed: int = 0) -> Program:
    return program_of(seeded(Dense, seed), SIZE)


def head_of(of: Program, layer: str = "third") -> fx.GraphModule:
    """What comes before `third` of `Dense`: its value, and both other convolutions', which cross the cut."""
    return of.split(table(of).target(layer, use_conv_only=True).node).head


@dataclass(frozen=True)
class Packages:
    folder: Path
    compiled: CompiledHead


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """The packages of the head of `Dense`, made once."""
    folder = tmp_path_factory.mktemp("packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        compile_head(head_of(program()), FORM, folder)
    return Packages(folder, CompiledHead(folder, FORM, slots=2))


def assert_equal(ours: Sequence[Tensor], eager: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(eager)
    for value, same in zip(ours, eager, strict=True):
        assert value.dtype == same.dtype
        assert not value.requires_grad
        assert close_to(value, same) < tolerance


@pytest.mark.parametrize("count", [1, 2, 3, MAX_BATCH])
def test_a_compiled_head_is_the_eager_one_with_all_that_crosses(packages: Packages, count: int) -> None:
    shown = images(count, SIZE, seed=count)
    values = packages.compiled(shown)
    assert len(values) == 3
    assert_equal(values, head_of(program())(shown))


def test_a_compiled_head_is_the_eager_module_in_float64(packages: Packages) -> None:
    twin, shown = seeded(Dense).double(), images(3, SIZE)
    first = twin.get_submodule("first")(shown.double()).relu()
    second = twin.get_submodule("second")(first).relu()
    third = twin.get_submodule("third")(torch.cat([first, second], 1))
    for value, exact in zip(packages.compiled(shown), (third, first, second), strict=True):
        assert close_to(value, exact) < 1e-5


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda shown: shown.contiguous(memory_format=torch.channels_last),
    "rows and columns swapped": lambda shown: shown.mT,
    "every second column": lambda shown: shown.repeat_interleave(2, dim=3)[..., ::2],
    "a part of larger ones": lambda shown: torch.nn.functional.pad(shown, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "one channel thrice": lambda shown: shown[:, :1].expand(-1, 3, -1, -1),
    "mirrored channels": lambda shown: shown.movedim(1, 3).contiguous().movedim(3, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 3])
def test_images_of_any_layout_are_understood(packages: Packages, layout: str, count: int) -> None:
    shown = LAYOUTS[layout](images(count, SIZE))
    assert not shown.is_contiguous()
    assert_equal(packages.compiled(shown), head_of(program())(shown.contiguous()))


def test_one_picture_for_a_whole_batch_and_one_with_odd_strides_are_understood(packages: Packages) -> None:
    one = images(1, SIZE)
    assert_equal(packages.compiled(one.expand(3, -1, -1, -1)), head_of(program())(one.repeat(3, 1, 1, 1)))
    every_other = images(6, SIZE)[::2]
    assert_equal(packages.compiled(every_other), head_of(program())(every_other.contiguous()))


REFUSED: dict[str, Tensor] = {
    "float64": torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float64),
    "bfloat16": torch.zeros(2, 3, SIZE, SIZE, dtype=torch.bfloat16),
    "uint8": torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8),
    "a row more": torch.zeros(1, 3, SIZE + 1, SIZE),
    "a column less": torch.zeros(2, 3, SIZE, SIZE - 1),
    "one channel": torch.zeros(1, 1, SIZE, SIZE),
    "channels at the end": torch.zeros(1, SIZE, SIZE, 3),
    "no batch": torch.zeros(3, SIZE, SIZE),
    "one dimension more": torch.zeros(1, 1, 3, SIZE, SIZE),
    "no picture": torch.zeros(0, 3, SIZE, SIZE),
    "a picture too many": torch.zeros(MAX_BATCH + 1, 3, SIZE, SIZE),
    "another device": torch.zeros(1, 3, SIZE, SIZE, device="meta"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_any_other_tensor_is_refused(packages: Packages, wrong: str) -> None:
    with pytest.raises(ValueError, match="compiled for"):
        packages.compiled(REFUSED[wrong])


def test_every_call_has_values_of_its_own(packages: Packages) -> None:
    for count in (1, 3):
        shown = images(count, SIZE)
        first = packages.compiled(shown)
        kept = [value.clone() for value in first]
        packages.compiled(images(count, SIZE, seed=1))
        assert all(torch.equal(value, same) for value, same in zip(first, kept, strict=True))
        for value in first:
            value.zero_()
        assert_equal(packages.compiled(shown), kept)


def test_eight_threads_get_their_own_values(packages: Packages) -> None:
    batches = [images(1 + number % MAX_BATCH, SIZE, seed=number) for number in range(16)]
    with ThreadPoolExecutor(8) as clients:
        for shown, values in zip(batches, clients.map(packages.compiled, batches), strict=True):
            assert_equal(values, head_of(program())(shown))


def test_its_size_is_that_of_its_files(packages: Packages) -> None:
    sizes = [file.stat().st_size for file in packages.folder.iterdir()]
    assert len(sizes) == 3
    assert packages.compiled.bytes == sum(sizes) > 10_000


def test_what_was_compiled_is_proven(packages: Packages) -> None:
    prove(packages.compiled, head_of(program()), FORM, counts={1, 2, 3, MAX_BATCH, MAX_BATCH + 1})


def moved(parameter: str) -> fx.GraphModule:
    """The head of a network of which one number differs from the compiled one's."""
    module = seeded(Dense)
    with torch.no_grad():
        module.get_parameter(parameter)[0] += 0.01
    return head_of(program_of(module, SIZE))


@pytest.mark.parametrize("count", [1, MAX_BATCH])
@pytest.mark.parametrize("parameter", ["first.bias", "third.bias"])
def test_a_head_of_other_weights_is_found_out(packages: Packages, parameter: str, count: int) -> None:
    with pytest.raises(Disagreement, match=f"of a batch of {count} differs"):
        prove(packages.compiled, moved(parameter), FORM, counts={count})


def test_a_head_with_other_values_is_found_out(packages: Packages) -> None:
    with pytest.raises(Disagreement):
        prove(packages.compiled, _with_outputs_swapped(head_of(program())), FORM, counts={2})


def _with_outputs_swapped(head: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    values = graph.graph_copy(head.graph, {})
    assert isinstance(values, tuple)
    graph.output((values[0], values[2], values[1]))
    return fx.GraphModule(head, graph)


@pytest.mark.parametrize("damaged", [SINGLE, SEVERAL, FULL])
def test_a_damaged_package_is_refused(packages: Packages, tmp_path: Path, damaged: str) -> None:
    for file in packages.folder.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / damaged).write_bytes((packages.folder / damaged).read_bytes()[:5000])
    with pytest.raises(RuntimeError):
        CompiledHead(tmp_path, FORM, slots=1)


def test_a_head_runs_compiled_up_to_the_largest_batch_and_eagerly_beyond(packages: Packages) -> None:
    """The package is another network's, so that its numbers tell which of the two ran."""
    target = LayerTable(program(1)).target("third", use_conv_only=True)
    head = Heads(program(1)).at(target)
    for count in (1, MAX_BATCH, MAX_BATCH + 1):
        assert_equal(head(images(count, SIZE)), head_of(program(1))(images(count, SIZE)))
    head.compiled = packages.compiled
    for count in (1, 2, MAX_BATCH):
        assert_equal(head(images(count, SIZE)), head_of(program(0))(images(count, SIZE)))
    large = images(MAX_BATCH + 1, SIZE)
    assert all(torch.equal(ours, eager) for ours, eager in zip(head(large), head_of(program(1))(large), strict=True))
    head.compiled = None
    assert_equal(head(images(1, SIZE)), head_of(program(1))(images(1, SIZE)))


@pytest.mark.slow
def test_what_is_slower_than_eager_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(compiled_module, "NOISE_S", -60.0)  # only what gains a minute
    folder = tmp_path / "packages"
    folder.mkdir()
    compile_head(head_of(program()), replace(FORM, max_batch=1), folder)
    assert [file.name for file in folder.iterdir()] == ["single.slower"]
    nothing = CompiledHead(folder, FORM, slots=1)
    assert nothing.bytes == 0
    assert not any(nothing.takes(count) for count in range(MAX_BATCH + 1))
    with pytest.raises(ValueError, match="not compiled for a batch of 1"):
        nothing(images(1, SIZE))
    head = Heads(program()).at(LayerTable(program()).target("third", use_conv_only=True))
    head.compiled = nothing
    assert_equal(head(images(1, SIZE)), head_of(program())(images(1, SIZE)))


def test_a_batch_goes_singly_where_that_is_fastest(
    packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (SINGLE, SEVERAL, FULL):
        shutil.copy(packages.folder / name, tmp_path)

    def seconds(head: object, shown: Tensor) -> float:  # a clock by which a free batch size is slow
        return 1.0 if isinstance(head, fx.GraphModule) else 0.1 * len(shown) if isinstance(head, partial) else 0.9

    monkeypatch.setattr(compiled_module, "_seconds", seconds)
    compiled_module._choose(tmp_path, head_of(program()), FORM)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full.slower", "several.singly", SINGLE]
    singly = CompiledHead(tmp_path, FORM, slots=1)
    prove(singly, head_of(program()), FORM, counts={1, 2, 3, MAX_BATCH})
    for count in (1, 2, 3, MAX_BATCH):
        assert singly.takes(count)
        assert_equal(singly(images(count, SIZE)), head_of(program())(images(count, SIZE)))


def test_the_package_of_full_batches_is_for_them_alone(packages: Packages, tmp_path: Path) -> None:
    shutil.copy(packages.folder / FULL, tmp_path)
    full = CompiledHead(tmp_path, FORM, slots=1)
    assert [count for count in range(MAX_BATCH + 2) if full.takes(count)] == [MAX_BATCH]
    assert_equal(full(images(MAX_BATCH, SIZE)), head_of(program())(images(MAX_BATCH, SIZE)))


@pytest.mark.slow
def test_one_picture_at_a_time_in_reduced_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    module = seeded(Varied).to(dtype)
    example = torch.zeros(2, 3, SIZE, SIZE, dtype=dtype)
    head = head_of(Program(capture(module, example)), "second")
    form = replace(FORM, dtype=dtype, max_batch=1)
    (tmp_path / "packages").mkdir()
    compile_head(head, form, tmp_path / "packages")
    assert [file.name for file in (tmp_path / "packages").iterdir()] == [SINGLE]
    compiled = CompiledHead(tmp_path / "packages", form, slots=1)
    shown = images(1, SIZE).to(dtype)
    assert_equal(compiled(shown), as_tuple(head(shown)), 4 * torch.finfo(dtype).eps)
    with pytest.raises(ValueError, match="compiled for"):
        compiled(images(1, SIZE))
    with pytest.raises(ValueError, match="not compiled for a batch of 2"):
        compiled(images(2, SIZE).to(dtype))
    with pytest.raises(Disagreement):
        prove(compiled, head_of(Program(capture(seeded(Varied, 1).to(dtype), example)), "second"), form, counts={1})


@pytest.mark.parametrize(
    "other",
    [
        replace(FORM, shape=(3, SIZE, SIZE + 1)),
        replace(FORM, dtype=torch.bfloat16),
        replace(FORM, device=torch.device("cuda:0")),
        replace(FORM, device=torch.device("cuda:1")),
        replace(FORM, max_batch=MAX_BATCH + 1),
    ],
)
def test_another_form_has_another_key(other: Form) -> None:
    assert key_of(FORM) == key_of(replace(other, **vars(FORM)))
    assert key_of(FORM) != key_of(other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_run_a_compiled_head_beside_each_other(tmp_path: Path) -> None:
    device = torch.device("cuda:0")
    module = seeded(Dense).to(device)
    head = head_of(Program(capture(module, torch.zeros(2, 3, SIZE, SIZE, device=device))))
    form = replace(FORM, device=device)
    compile_head(head, form, tmp_path)
    compiled = CompiledHead(tmp_path, form, slots=2)
    batches = [images(1 + number % MAX_BATCH, SIZE, seed=number).to(device) for number in range(32)]
    torch.cuda.synchronize(device)

    def run(part: int) -> list[Sequence[Tensor]]:
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            found: list[Sequence[Tensor]] = [[value.cpu() for value in compiled(one)] for one in batches[part::2]]
        return found

    with ThreadPoolExecutor(2) as streams:
        for part, found in enumerate(streams.map(run, range(2))):
            for shown, values in zip(batches[part::2], found, strict=True):
                assert_equal(values, [value.cpu() for value in head(shown)], 1e-4)
