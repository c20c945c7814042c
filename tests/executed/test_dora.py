"""DoRA's compiled kernels, executed: every gradient in random order, and the bytes that its scale and norms move."""

from __future__ import annotations

import functools

import pytest
import torch

from lora_kernels import lora_linear
from lora_kernels.backends.triton.expand import expand
from lora_kernels.backends.triton.scale import scaled_gradient
from lora_kernels.backends.triton.shrink import shrink_squares
from lora_kernels.backends.triton.shrink_wgrad import shrink_wgrad
from lora_kernels.tuning.config import TileConfig
from tests.executed.layer import emulated
from tests.oracle import assert_budget, assert_gradients, gradients
from tests.ptx.launch import emulate
from tests.test_dora import NAMES, operands, reference

pytestmark = pytest.mark.slow
FORWARDS = {
    "two_kernel": ["shrink", "expand"],
    "one_pass": ["one_pass"],
    "decode": ["decode"],
}


@pytest.mark.parametrize(
    "target, algorithm",
    [
        ("sm_80", "one_pass"),
        ("sm_90", "two_kernel"),
        ("sm_100", "two_kernel"),
        ("sm_120", "decode"),
    ],
)
def test_every_gradient_through_the_layer(target, algorithm):
    """No kernel but those of LoRA, and one more reading of W: the scale is in their stores, and in the reading of dy."""
    given = dict(zip(NAMES, operands(33, 88, 72, 12, torch.bfloat16), strict=True))
    dy = torch.randn(33, 88, generator=torch.Generator().manual_seed(7)).bfloat16()
    with emulated(target, algorithm, 11) as executed:
        actual = gradients(functools.partial(lora_linear, alpha=0.7), given, dy)
    assert_gradients(
        actual, functools.partial(reference, alpha=0.7), given, dy, f"by {algorithm} on {target}"
    )
    kernels = [launch.name for launch in executed if launch.name != "sum_partials"]
    norms, backward = ["shrink"], ["shrink_wgrad", "expand", "wgrad"]
    assert kernels == norms + FORWARDS[algorithm] + backward


TARGET = "sm_80"
M, N, K, R = 64, 128, 128, 16


def moved(executed, number=0):
    """(bytes loaded, bytes stored) by tensor, and what no kernel does: store to an operand, or use an atomic."""
    tensors = executed[number].counters.tensors
    assert all((t.stores <= 1).all() and not t.atomics for t in tensors.values())
    return {name: (t.bytes_loaded, t.bytes_stored) for name, t in tensors.items()}


def test_bytes_of_the_scaled_product():
    """z is stored once beside y and neither is read; c is read as a bias is."""
    x, w, z = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16().t(), torch.empty(M, N)
    z, s, c = z.bfloat16(), torch.randn(M, R), torch.rand(N)
    b, bias = torch.randn(R, N).bfloat16(), torch.randn(N).bfloat16()
    config = TileConfig("expand", 64, 64, 32, 4, 3)
    with emulate(TARGET) as executed:
        y = expand(x, w, s, b, bias, config, c=c, z=z)
        plain = expand(x, w, s, b, None, config)
    scaled, usual = moved(executed), moved(executed, 1)
    assert torch.equal(z, plain)
    exact = c.double() * (x.double() @ w.double() + s.double() @ b.double()) + bias.double()
    assert_budget(y, (c * (x @ w + s.bfloat16() @ b) + bias).bfloat16(), exact)
    assert scaled["y_ptr"] == scaled["z_ptr"] == usual["y_ptr"] == (0, 2 * M * N)
    same = ("x", "w", "s_ptr", "b_ptr")
    assert [scaled[name] for name in same] == [usual[name] for name in same]
    assert scaled["c_ptr"][0] <= 4 * config.num_warps * 4 * N  # each warp has its copy


@pytest.mark.parametrize("kept", [True, False], ids=["", "no z"])
def test_the_backward_reads_dy_once(kept):
    """q, dB, dz and dc: what DoRA adds is one reading of z and one store of dz."""
    dy, z = torch.randn(M, N).bfloat16(), torch.randn(M, N).bfloat16() if kept else None
    s, c, b_t = torch.randn(M, R), torch.rand(N), torch.randn(N, R).bfloat16()
    config = TileConfig("shrink_wgrad", 32, 64, 16, 4, 2, split=2)
    with emulate(TARGET, 5) as executed:
        q, dB, dz, dc = shrink_wgrad(dy, b_t, 0.5, s, torch.float32, config, c, z)
    tensors = moved(executed)
    assert tensors["dy_ptr"] == (dy.nbytes, 0) and tensors["dz_ptr"] == (0, dy.nbytes)
    scaled_b = (b_t * c[:, None]).bfloat16()
    torch.testing.assert_close(
        q.double(), 0.5 * dy.double() @ scaled_b.double(), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(
        dB.double(), (s.double().t() @ dy.double()) * c, rtol=1e-5, atol=1e-3
    )
    assert torch.equal(dz, (dy * c).bfloat16())
    if z is None:
        assert dc is None
        return
    assert tensors["z_ptr"] == (z.nbytes, 0)
    torch.testing.assert_close(dc.double(), (dy.double() * z).sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kept", [True, False], ids=["", "no z"])
def test_the_scale_alone(kept):
    """The pass of its own, of a rank for which q and dB have no kernel together: one reading of each, any strides."""
    dy, z = torch.randn(N, 70).bfloat16().t(), torch.randn(70, N).bfloat16() if kept else None
    c = torch.rand(N)
    with emulate(TARGET, 5) as executed:
        dz, dc = scaled_gradient(dy, c, z, TileConfig("wgrad", 32, 64, 16, 4, 2, split=2))
    tensors = moved(executed)
    assert tensors["dy_ptr"] == (dy.nbytes, 0) and tensors["dz_ptr"] == (0, dy.nbytes)
    assert torch.equal(dz, (dy * c).bfloat16())
    if z is None:
        assert dc is None and "z_ptr" not in tensors
        return
    assert tensors["z_ptr"] == (z.nbytes, 0)
    torch.testing.assert_close(dc.double(), (dy.double() * z).sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("split", [1, 2])
def test_the_norms_read_w_once(split):
    """Also where the rank has several blocks, of which one adds up the squares."""
    w, a = torch.randn(70, 100).bfloat16(), torch.randn(100, 33).bfloat16()
    config = TileConfig("shrink", 32, 1, 32, 4, 2, split=split, rank_chunk=64)
    with emulate(TARGET, 5) as executed:
        lowrank, squares = shrink_squares(w, a, config)
    assert moved(executed)["x_ptr"] == (w.nbytes, 0)
    torch.testing.assert_close(lowrank.double(), w.double() @ a.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(squares.double(), w.double().square().sum(1), rtol=1e-5, atol=0)
    with emulate(TARGET) as executed:
        found = shrink_squares(w, a, TileConfig("shrink", 32, 1, 32, 4, 2, rank_chunk=16))
    torch.testing.assert_close(found, (lowrank, squares), rtol=1e-5, atol=1e-4)
    assert moved(executed)["squares_ptr"] == (0, squares.nbytes)
