"""A launch that skips Triton's search for the compiled kernel is the launch that Triton would make."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia import hopper
from triton.runtime import driver, jit
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels import lora_linear, plan
from lora_kernels.backends.triton import relaunch
from lora_kernels.backends.triton.configs import ALGORITHMS
from tests.pretended import on_target


class Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 1234

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Kernel(CompiledKernel):
    """Compiled for one key of Triton's; its launches are kept."""

    function, packed_metadata, module, src = 5, "metadata", None, None

    def __init__(self, key, launches):
        self.name = key
        self._run = lambda *args: launches.append((key, *args))

    def _init_handles(self):
        pass


@pytest.fixture
def launches(monkeypatch):
    """Every launch as what the driver gets of it; Triton's own have empty chains of hooks and what these would be told."""
    made = []

    def compiled(self, key, signature, device, constexprs, options, attrs, warmup):
        kernels = self.device_caches[device][0]
        return kernels.setdefault(key, Kernel(key, made))

    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(jit.JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(relaunch, "_known", {})
    monkeypatch.setattr(relaunch, "_VERSIONS", (triton.__version__,))
    relaunch._triton.cache_clear()
    yield made
    relaunch._triton.cache_clear()


@pytest.fixture
def searches(monkeypatch):
    """The functions whose kernels Triton looked for."""
    asked, stock = [], jit.JITFunction.run

    def run(self, *args, **kwargs):
        asked.append(self)
        return stock(self, *args, **kwargs)

    run.__qualname__ = stock.__qualname__
    monkeypatch.setattr(jit.JITFunction, "run", run)
    return asked


def function():
    @triton.jit(do_not_specialize=["free"])
    def add(
        x_ptr,
        y_ptr,
        descriptor,
        number,
        free,
        factor,
        A: triton.language.constexpr,
        B: triton.language.constexpr,
        more_ptr=None,
        C: triton.language.constexpr = 3,
    ):
        pass

    return add


def without_hooks(launch):
    key, *grid_and_kernel, _metadata, _enter, _exit = launch[:10]
    return key, *grid_and_kernel, *launch[10:]


memory = torch.zeros(1024, dtype=torch.float16)


def described(rows, block, dtype=torch.float16, swizzle=None):
    base = memory.view(dtype)[: rows * 16].view(rows, 16)
    if swizzle is None:
        return TensorDescriptor.from_tensor(base, block)
    return hopper.TensorDescriptor.from_tensor(base, block, NVMMASharedLayout(swizzle, 16, rank=2))


CHOICES = {
    "x": [memory[:4], memory[64:70], memory[8:], memory[1:5], memory[4:], memory.float(), None],
    "y": [memory[:4], memory[3:7], torch.nn.Parameter(memory[:4]), None],
    "descriptor": [
        described(4, [16, 16]),
        described(8, [16, 16]),
        described(8, [32, 16]),
        described(8, [16, 16], torch.bfloat16),
        described(4, [16, 16], swizzle=32),
        described(8, [16, 16], swizzle=32),
        described(8, [16, 16], swizzle=0),
        memory,
        None,
    ],
    "number": [0, 1, 2, 15, 16, 32, 2**31 - 1, 2**31, 2**40, -16, True, 1.0, None],
    "free": [0, 1, 16, 2**31, True, 1.0],
    "factor": [0.5, 1.0, 0.0, memory[:1], 1],
    "named": [
        {"A": 1, "B": 2},
        {"A": 2, "B": 1},
        {"B": 1, "A": 2},
        {"A": True, "B": 2},
        {"A": "1", "B": None},
        {"A": 1, "B": 2, "num_warps": 8},
        {"A": 1, "B": 2, "num_stages": 8},
        {"A": 1, "B": 2, "enable_fp_fusion": False},
        {"A": 1, "B": 2, "maxnreg": 128},
        {"A": 1, "B": 2, "launch_pdl": True},
        {"A": 1, "B": 2, "C": 4},
        {"A": 1, "B": 2, "more_ptr": 16},
        {"A": 1, "B": 2, "more_ptr": None},
    ],
}


def calls():
    """Every choice beside the first of the others, and every pair of two arguments' choices."""
    first = {name: 0 for name in CHOICES}
    for a, b in itertools.combinations(CHOICES, 2):
        for i, j in itertools.product(range(len(CHOICES[a])), range(len(CHOICES[b]))):
            at = first | {a: i, b: j}
            *args, named = (CHOICES[name][at[name]] for name in CHOICES)
            yield tuple(args), named


def test_every_launch_is_the_one_that_triton_makes(launches):
    """Twice over: first each is searched for, then known."""
    kernel = function()
    for _ in range(2):
        for args, named in calls():
            relaunch.run(kernel, 7, 0, args, dict(named))
            kernel[(7,)](*args, **named)
            ours, stock = map(without_hooks, launches)
            assert len(ours) == len(stock)
            assert all(a is b or a == b for a, b in zip(ours, stock, strict=True))
            launches.clear()
    assert len(relaunch._known) > 100


def test_triton_searches_once(launches, searches):
    kernel, other = function(), function()
    args, named = next(calls())
    for _ in range(3):
        relaunch.run(kernel, 7, 0, args, named)
        relaunch.run(other, 8, 0, args, named)
    assert searches == [kernel, other]
    assert [launch[1] for launch in launches] == [7, 8] * 3
    relaunch.run(kernel, 7, 1, args, named)  # another device
    assert searches == [kernel, other, kernel]


@pytest.mark.parametrize("given", [memory[:4], described(4, [16, 16])], ids=["tensor", "tiles"])
def test_a_tensor_by_name_is_not_kept(given, launches, searches):
    """It may be another one at the same place the next time."""
    kernel, (args, named) = function(), next(calls())
    for _ in range(2):
        relaunch.run(kernel, 7, 0, args, named | {"more_ptr": given})
    assert searches == [kernel] * 2 and not relaunch._known
    assert all(given is launch[-2] for launch in launches)


def test_what_is_known_has_an_end(launches, searches, monkeypatch):
    monkeypatch.setattr(relaunch, "_MOST", 2)
    kernel, (args, named) = function(), next(calls())
    for programs, number in enumerate((3, 4, 5, 5, 3, 4), 1):
        relaunch.run(kernel, programs, 0, (*args[:3], number, *args[4:]), named)
        assert len(relaunch._known) <= 2
    assert len(searches) == 5 and [launch[1] for launch in launches] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "what",
    ["enter", "exit", "own", "debug", "stages", "before", "run", "wraps", "instance", "version"],
)
def test_triton_launches_where_it_does_more(what, launches, searches, monkeypatch):
    kernel, (args, named), told = function(), next(calls()), []
    relaunch.run(kernel, 7, 0, args, named)
    relaunch.run(kernel, 7, 0, args, named)
    assert len(searches) == 1
    runtime = knobs.runtime
    if what in ("enter", "exit"):
        chain = getattr(runtime, f"launch_{what}_hook")
        monkeypatch.setattr(chain, "calls", [told.append])
    elif what == "own":
        monkeypatch.setattr(runtime, "launch_enter_hook", told.append)
    elif what == "debug":
        monkeypatch.setattr(runtime, "debug", True)
    elif what == "stages":
        monkeypatch.setattr(runtime, "add_stages_inspection_hook", lambda: ("key", "hash"))
    elif what == "before":
        kernel.add_pre_run_hook(lambda *args, **named: told.append(args))
    elif what == "run":
        watched = jit.JITFunction.run
        monkeypatch.setattr(jit.JITFunction, "run", lambda *a, **named: watched(*a, **named))
    elif what == "wraps":
        watched = jit.JITFunction.run
        wrapper = functools.wraps(watched)(lambda *a, **named: watched(*a, **named))
        monkeypatch.setattr(jit.JITFunction, "run", wrapper)
    elif what == "instance":
        watched = kernel.run
        kernel.run = lambda *a, **named: watched(*a, **named)
    else:
        monkeypatch.setattr(relaunch, "_VERSIONS", ("0.",))
        relaunch._triton.cache_clear()
    relaunch.run(kernel, 7, 0, args, named)
    relaunch.run(kernel, 7, 0, args, named)
    assert len(searches) == 3 and len(launches) == 4


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_layers_launches_are_known_after_the_first_step(
    algorithm, dropout_p, launches, searches, monkeypatch
):
    """And are those that Triton makes, but for a product that gets tensors by name: that one Triton launches."""
    on_target(monkeypatch, "sm_90", algorithm)
    step: list[tuple[str, bool]] = []

    def launch_twice(kernel, grid):
        kernels.add(kernel)

        def launch(*args, **named):
            before = len(searches)
            relaunch.run(kernel, *grid, 0, args, named)
            step.append((kernel.fn.__name__, len(searches) == before))
            kernel.run(*args, grid=grid, warmup=False, **named)
            ours, stock = map(without_hooks, launches)
            pairs = zip(ours, stock, strict=True)
            assert all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in pairs), kernel
            launches.clear()

        return launch

    kernels: set[jit.JITFunction] = set()
    monkeypatch.setattr(jit.JITFunction, "__getitem__", launch_twice)
    M, types = (40 if algorithm == "decode" else 2048), {"dtype": torch.bfloat16}
    x, A, B = (torch.randn(*s, **types) for s in ((M, 512), (512, 16), (16, 768)))
    w, dy = torch.randn(768, 512, **types), torch.randn(M, 768, **types)
    trained = [t.requires_grad_() for t in (x, A, B)]
    try:
        for _ in range(2):
            step.clear()
            y = lora_linear(x, w, A, B, 0.5, dropout_p=dropout_p, backend="triton")
            torch.autograd.grad(y, trained, dy)
    finally:
        for kernel in kernels:
            kernel.device_caches.clear()  # of stand-ins
        plan.forget()
    assert len(step) >= 6
    searched = {name for name, known in step if not known}
    by_name = algorithm == "persistent_one_launch" or dropout_p
    assert searched <= ({"_persistent_kernel"} if by_name else set())
