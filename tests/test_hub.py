"""The Hub kernel: it is loaded from a folder that is on no path, beside another copy of itself, and trains."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest

from tests.processes import python

pytestmark = pytest.mark.slow  # processes that import torch

ROOT = Path(__file__).parent.parent
LOADED = """
import importlib.util, sys
import torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lora_kernels", "safetensors", "peft", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
def load(name, folder):
    spec = importlib.util.spec_from_file_location(
        name, folder + "/__init__.py", submodule_search_locations=[folder]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
"""
TRAINS = """
first, second = load("first_1f", sys.argv[1]), load("second_2f", sys.argv[2])
assert not hasattr(first, "save_adapter") and "save_adapter" not in first.__all__
for name in first.__all__:
    getattr(first, name)
for kernel in (first, second):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    plain = [t.detach().clone() for t in model.state_dict().values()]
    kernel.replace_linear_with_lora(model, rank=2, alpha=0.5)
    kernel.freeze_base(model)
    torch.nn.init.normal_(model[0].lora.B)
    torch.nn.init.normal_(model[2].lora.B)
    x = torch.randn(5, 8)
    w1, b1, w2, b2 = plain
    parameters = list(kernel.lora_parameters(model))
    A1, B1, A2, B2 = (p.detach().clone().requires_grad_() for p in parameters)
    h = torch.tanh(x @ w1.t() + b1 + 0.5 * (x @ A1 @ B1))
    expected = h @ w2.t() + b2 + 0.5 * (h @ A2 @ B2)
    wanted = torch.autograd.grad(expected.square().sum(), (A1, B1, A2, B2))
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(x).square().sum().backward()
    for parameter, gradient in zip(parameters, wanted):
        torch.testing.assert_close(parameter.grad, gradient)
    before = parameters[0].detach().clone()
    optimizer.step()
    assert not torch.equal(before, parameters[0])
    # The operator that a compiler records is this copy's own.
    from torch.fx.experimental.proxy_tensor import make_fx
    with torch.no_grad():
        graph = make_fx(lambda x: model(x), tracing_mode="real")(x)
    targets = {str(node.target) for node in graph.graph.nodes}
    own = sys.modules[kernel.__name__ + "._ops"].ops.name
    assert any(target.startswith(own + ".lora_linear") for target in targets), (own, targets)
spaces = {name.split("::")[0] for name in torch._C._dispatch_get_all_op_names() if "lora_kernels" in name}
assert len(spaces) == 2 and "lora_kernels" not in spaces, spaces
"""
SELFTEST = """
kernel = load("first_1f", sys.argv[1])
selftest = sys.modules["first_1f.selftest"]
selftest._uuid = lambda index: None
try:
    selftest._failure_elsewhere("triton", 0)
except selftest.NoVerdictError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Two folders of the kernel as built, each with a namespace of its own."""
    first, second = (tmp_path_factory.mktemp("hub") / name for name in ("first", "second"))
    python(ROOT / "release/hub.py", first, "--built")
    shutil.copytree(first, second)
    folders = [folder / "torch-ext/lora_kernels" for folder in (first, second)]
    ops = (folders[1] / "_ops.py").read_text()
    (folders[1] / "_ops.py").write_text(re.sub(r"_lora_kernels_\w+?\b", "_lora_kernels_2", ops))
    return list(map(str, folders))


def test_two_copies_train_a_step_from_folders_that_are_on_no_path(kernel, tmp_path):
    python("-c", LOADED + TRAINS, *kernel, cwd=tmp_path)


def test_a_self_test_finds_the_kernel_by_its_folder(kernel, tmp_path):
    """In its own process, where the package has no name that could be imported. There is no GPU: it says so, and no more."""
    said = python("-c", LOADED + SELFTEST, kernel[0], cwd=tmp_path).stdout
    assert "cannot use the device" in said or said == "", said


def test_the_layout_is_the_builders(kernel):
    root = Path(kernel[0]).parents[1]
    assert sorted(path.name for path in root.iterdir()) == ["LICENSE", "build.toml", "torch-ext"]
    text = (root / "build.toml").read_text()
    assert re.search(r'^name = "([a-z][-a-z0-9]*[a-z0-9])"$', text, re.M)[1] == "lora-kernels"
    assert "[torch-noarch]" in text and re.search(r"^version = [1-9]", text, re.M)
    code = root / "torch-ext" / "lora_kernels"
    assert (code / "tuning/cycles.json").exists() and not (code / "bench").exists()
    assert "lora-kernels" not in (code / "selftest.py").read_text(), "no such package is installed"


@pytest.mark.parametrize(
    "left",
    [
        "import lora_kernels.plan",
        "from lora_kernels import plan",
        'torch.library.impl("lora_kernels::lora_linear_new", "CPU", f)',
        'importlib.import_module("lora_kernels.new")',
    ],
)
def test_what_would_need_the_package_on_a_path_is_refused(left):
    check = runpy.run_path(str(ROOT / "release/hub.py"))["check"]
    with pytest.raises(RuntimeError, match="needs lora_kernels on a path"):
        check(left, "somewhere")
    check("from . import plan", "somewhere")
