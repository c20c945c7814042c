"""GPUs older or newer than those which kernels are compiled for, by stand-ins: what computes there, and what is said."""

from __future__ import annotations

import stat
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from lora_kernels import explain, plan, selftest
from lora_kernels.backends import cuda, device, eager, triton
from lora_kernels.operands import Adapter
from lora_kernels.problem import Problem
from lora_kernels.tuning.targets import target_of
from tests.executed.cuda_operators import build_module
from tests.oracle import assert_budget

M, N, K, R = 96, 80, 64, 8


@pytest.fixture
def chip(monkeypatch):
    """chip(7, 5): this machine has a GPU of that compute capability, with both GPU backends installed."""

    def pretend(major, minor, **more):
        name = f"a chip of {major}.{minor}"
        more = {"multi_processor_count": 100, **more}
        properties = SimpleNamespace(major=major, minor=minor, name=name, **more)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        for backend in (cuda.CudaBackend, triton.TritonBackend):
            monkeypatch.setattr(backend, "unavailable", lambda self: None)
        monkeypatch.setattr(selftest, "trusted", lambda backend, where: None)
        device._target.cache_clear()
        plan.forget()

    yield pretend
    device._target.cache_clear()
    plan.forget()


def problem(dtype):
    return Problem(M, N, K, R, dtype, dtype, "cuda", bias=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_before_sm_80_aten_computes_and_the_reason_is_said(chip, capability, dtype):
    chip(*capability)
    found = explain(problem(dtype))
    assert found.backend == "eager" and found.adjoint.backend == "eager"
    for name in ("triton", "cuda"):
        why = found.rejected[name]
        assert f"sm_80 or newer, gfx942 or gfx1100, got 'sm_{capability[0]}{capability[1]}'" in why
        assert "its float16 products use the tensor cores, its bfloat16 ones cannot" in why
        with pytest.raises(RuntimeError, match="sm_80 or newer"):
            explain(problem(dtype), backend=name)


def test_a_chip_without_tensor_cores_promises_none(chip):
    chip(6, 1)
    assert explain(problem("float16")).rejected["triton"].endswith("got 'sm_61'")


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU; `made` has each call with its result, and a product with out_dtype is computed."""

    made: ClassVar[list[tuple[str, torch.Tensor]]] = []
    is_cuda = property(lambda self: True)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        out_dtype = kwargs.pop("out_dtype", None)
        if out_dtype is not None:
            args = tuple(t.to(out_dtype) for t in args)
        result = super().__torch_function__(function, types, args, kwargs)
        name = function.__name__ + ("" if out_dtype is None else f" to {out_dtype}")
        if isinstance(result, torch.Tensor):
            cls.made.append((name, result))
        return result


@pytest.mark.parametrize("accumulation", [False, True], ids=["float32 sums", "float16 sums"])
@pytest.mark.parametrize("vendor", ["nvidia", "amd"])
def test_the_path_of_a_t4_is_in_place_and_in_float16(monkeypatch, vendor, accumulation):
    """y is written by a small product and the base product is added to it; nothing of y's size is float32.

    ATen refuses a float32 result of half operands on AMD, and where float16 sums are allowed: then s is made without one.
    """
    monkeypatch.setattr(torch.version, "hip", "7.0" if vendor == "amd" else None)
    flags = SimpleNamespace(allow_fp16_accumulation=accumulation)
    monkeypatch.setattr(torch.backends.cuda, "matmul", flags)
    monkeypatch.setattr(OnGPU, "made", [])
    plain = [torch.randn(*shape).half() for shape in ((M, K), (K, N), (K, R), (R, N), (N,))]
    x, w, a, b, bias = (t.as_subclass(OnGPU) for t in plain)
    products = eager.PRODUCTS
    s = products.shrink(x, Adapter(a, b, 0.5))
    y = products.expand(x, w, s, Adapter(a, b, 0.5), bias)
    grad = products.wgrad(x, s, torch.float16)
    names = [name for name, _ in OnGPU.made]
    assert ("mm to torch.float32" in names) == (vendor == "nvidia" and not accumulation)
    assert names.count("addmm_") == 1 and s.dtype == torch.float32
    wide = [name for name, t in OnGPU.made if t.shape == (M, N) and t.dtype == torch.float32]
    assert not wide, wide
    x, w, a, b, bias = plain
    exact = x.double() @ w.double() + bias.double() + 0.5 * (x.double() @ a.double() @ b.double())
    assert_budget(y.as_subclass(torch.Tensor), x @ w + bias + 0.5 * (x @ a @ b), exact, "y")
    exact = x.double().t() @ (0.5 * x.double() @ a.double())
    assert_budget(grad.as_subclass(torch.Tensor), x.t() @ (0.5 * (x @ a)), exact, "dA")


@pytest.mark.parametrize(
    ("capability", "like"), [((10, 3), "sm_100"), ((11, 0), "sm_100"), ((12, 1), "sm_120")]
)
def test_a_newer_chip_takes_the_tiles_of_the_nearest_older_one(chip, capability, like):
    chip(*capability)
    found = explain(Problem(4096, 4096, 4096, 16, "bfloat16", "bfloat16", "cuda"), backend="triton")
    assert found.backend == "triton"
    assert device.current_target().name == like == target_of("sm_{}{}".format(*capability)).name


def test_a_chip_has_its_own_multiprocessors_and_bandwidth(chip):
    """An H200, whose copies were measured at 4.24 TB/s; a part of one; and a torch that does not tell the memory's clock."""
    like = target_of("sm_90")
    memory = {"memory_clock_rate": 3_201_000, "memory_bus_width": 6144}
    chip(9, 0, multi_processor_count=132, **memory)
    found = device.current_target()
    assert found.bandwidth_gbs == pytest.approx(4240, rel=0.02) and found.chip == "a chip of 9.0"
    assert found.half_tflops == like.half_tflops and found.name == "sm_90"
    chip(9, 0, multi_processor_count=33, **memory)
    found = device.current_target()
    assert found.multiprocessors == 33 and found.half_tflops == like.half_tflops / 4
    chip(9, 0, multi_processor_count=132)
    assert device.current_target() == replace(like, chip="a chip of 9.0")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_103", "sm_110", "sm_121"])
def test_triton_compiles_them_for_a_newer_chip(architecture):
    """With its tensor cores, within its limits, and without spills; the tiles are those of the nearest older one."""
    pytest.importorskip("triton")
    from lora_kernels.backends.triton.configs import tiles_for
    from tests.compiled.recorder import recording
    from tests.compiled.sass import inspect
    from tests.compiled.shipped import Shapes

    target = target_of(architecture)
    wanted = Problem(4096, 4096, 4096, 16, "bfloat16", "bfloat16", "cuda")
    with recording(architecture) as launches:
        Shapes(wanted, forward=True).launch(tiles_for(wanted, target).config("expand"), target)
    assert f"sm_{architecture[3:]}" in launches[0].compiled.asm["ptx"].split(".target ")[1]
    code = inspect(launches[0].compiled)
    assert code.matrix and code.local_bytes == 0 and code.smem_bytes <= target.smem_bytes


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvcc is a shell script")
def test_the_extension_holds_code_for_every_supported_chip(monkeypatch, tmp_path):
    """A cubin serves later chips of its major version, PTX every later chip: the driver compiles it there."""
    compiler = tmp_path / "nvcc"
    compiler.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/asked"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    build_module().build(tmp_path / "library.so")
    asked = (tmp_path / "asked").read_text().split()
    (option,) = (option for option in asked if option.startswith("-gencode"))
    codes = option.rpartition("code=")[2].strip("[]").split(",")
    cubins = [int(code[3:]) for code in codes if code.startswith("sm_")]
    (ptx,) = (int(code.removeprefix("compute_")) for code in codes if code.startswith("compute_"))
    for chip in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 130):
        same_major = any(c // 10 == chip // 10 and c <= chip for c in cubins)
        assert same_major or ptx <= chip, chip
    assert 110 // 10 not in {c // 10 for c in cubins}  # the chip that only PTX serves
