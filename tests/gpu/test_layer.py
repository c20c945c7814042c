"""The layer on the device: gradients, autocast, compiled graphs, CUDA graphs, streams, another GPU."""

from __future__ import annotations

import copy
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lora_kernels
from lora_kernels import LinearWithLoRA, Problem, lora_linear, plan, use_backend
from lora_kernels.backends import triton as triton_module
from lora_kernels.backends.device import current_target
from lora_kernels.backends.triton import relaunch
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.operands import Adapter
from lora_kernels.reference import LinearWithLoRA as Reference
from tests.gpu.conftest import DEVICE, captured, declined
from tests.oracle import assert_gradients, gradients, reference
from tests.planned import Planned

BACKENDS = ["auto", "eager", "triton", "cuda"]


def operands(M, K, N, R, dtype=torch.float32):
    torch.manual_seed(1)
    shapes = {"x": (M, K), "weight": (N, K), "A": (K, R), "B": (R, N), "bias": (N,)}
    made = {n: torch.randn(s, device=DEVICE) / K**0.5 * 4 for n, s in shapes.items()}
    return {n: t.to(dtype).requires_grad_() for n, t in made.items()}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "p"), [(8, 0.0), (300, 0.0), (300, 0.25)])
def test_every_gradient(name, dtype, M, p, usable):
    given = operands(M, 256, 192, 8, dtype)
    dy = torch.randn(M, 192, device=DEVICE).to(dtype)
    if name in ("triton", "cuda"):
        kind = str(dtype).removeprefix("torch.")
        problem = Problem(M, 192, 256, 8, kind, kind, DEVICE, dropout=p > 0)
        if reason := declined(usable(name), problem):
            pytest.skip(reason)

    mask = None
    if p:
        mask = scaled_mask(Dropout(p, torch.tensor(7, device=DEVICE)), M, 256, torch.float64)
    ours = functools.partial(lora_linear, alpha=0.5, dropout_p=p, seed=7, backend=name)
    actual = gradients(ours, given, dy)
    assert_gradients(actual, functools.partial(reference, alpha=0.5, mask=mask), given, dy)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("M", [8, 300])
def test_a_known_launch_is_triton_s_own(M, offset, triton_backend, monkeypatch):
    """Searched for, known, and made by Triton alone: all results have equal bits."""
    given = operands(M, 256, 192, 8, torch.bfloat16)
    flat = torch.randn(M * 256 + offset, device=DEVICE).bfloat16()
    given["x"] = flat[offset:].view(M, 256).requires_grad_()
    dy = torch.randn(M, 192, device=DEVICE).bfloat16()
    layer = functools.partial(lora_linear, alpha=0.5, backend="triton")
    ours = functools.partial(gradients, layer, given, dy, needed=("x", "A", "B"))
    first = ours()
    keys = set(relaunch._known)
    known = ours()
    assert set(relaunch._known) == keys
    monkeypatch.setattr(relaunch, "_driver_of", lambda kernel: None)
    own = ours()
    for name, value in own.items():
        assert torch.equal(first[name], value) and torch.equal(known[name], value), name


def test_autocast_gives_the_dtype_of_linear():
    layer = LinearWithLoRA(torch.nn.Linear(128, 64), rank=4, alpha=2.0).to(DEVICE)
    torch.nn.init.normal_(layer.lora.B)
    x = torch.randn(32, 128, device=DEVICE)
    exact = copy.deepcopy(layer).double()(x.double())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_eager(dtype):
    given = operands(64, 128, 96, 8, dtype)
    dy = torch.randn(64, 96, device=DEVICE)

    def function(x, weight, A, B, bias):
        return lora_linear(x, weight, A, B, 0.5, bias)

    found, eager = (
        gradients(call, given, dy) for call in (torch.compile(function, fullgraph=True), function)
    )
    assert all(map(torch.equal, found.values(), eager.values()))


@pytest.mark.parametrize("M", [4, 256])
def test_a_captured_graph_computes_new_values(M):
    layer = LinearWithLoRA(torch.nn.Linear(256, 128), rank=8, alpha=2.0).to(DEVICE, torch.bfloat16)
    torch.nn.init.normal_(layer.lora.B)
    x = torch.randn(M, 256, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        graph, y = captured(lambda: layer(x), warm=3)
    for _ in range(3):
        x.normal_()
        layer.lora.A.data.normal_()
        graph.replay()
        with torch.no_grad():
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_graph_trees_with_a_second_model_between(name, usable, monkeypatch):
    """They warm up eagerly in the graph's memory, and give what a call has freed to the next graph."""
    usable(name)
    if name == "triton":  # with a split sum over K, whose blocks are counted
        monkeypatch.setattr(triton_module, "predict_us", lambda name, *_: name != "decode")
    plan.forget()
    layers = []
    for out_features in (256, 512):
        linear = torch.nn.Linear(4096, out_features)
        layers.append(LinearWithLoRA(linear, rank=8, alpha=2.0).to(DEVICE, torch.bfloat16))
        torch.nn.init.normal_(layers[-1].lora.B)
    x = torch.randn(4, 4096, device=DEVICE, dtype=torch.bfloat16)
    compiled = [torch.compile(layer, mode="reduce-overhead", fullgraph=True) for layer in layers]
    with torch.no_grad(), use_backend(name):
        for _ in range(5):  # one warm-up, one capture, replays
            x.normal_()
            for layer, replayed in zip(layers, compiled, strict=True):
                torch.compiler.cudagraph_mark_step_begin()
                assert torch.equal(replayed(x).clone(), layer(x))
    plan.forget()


def test_streams_and_threads_at_once(gpu_backend):
    """Each call counts its own blocks."""
    sizes = (4, 4096), (4096, 256), (4096, 8), (8, 256)
    given = [torch.randn(size, device=DEVICE).bfloat16() for size in sizes]
    x, w, *adapter = given
    products = Planned(gpu_backend, current_target(), "decode")
    expected, _ = products.shrink_expand(x, w, Adapter(*adapter, 0.5))
    torch.cuda.synchronize()

    def work(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [products.shrink_expand(x, w, Adapter(*adapter, 0.5))[0] for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(y, expected) for y in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_work_follows_the_current_stream(gpu_products):
    """Operands are made late on a side stream: a kernel on any other stream would read them too early."""
    side = torch.cuda.Stream()
    given = [torch.zeros(s, device=DEVICE) for s in ((16, 512), (512, 512), (512, 8), (8, 512))]
    made = [torch.randn_like(t) for t in given]

    def product(x, w, A, B):
        return gpu_products.shrink_expand(x, w, Adapter(A, B, 0.5))[0]

    expected = product(*made)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(given, made, strict=True):
            target.copy_(source)
        y = product(*given)
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_operands_decide_the_device(gpu_products):
    given = [torch.randn(s) for s in ((16, 64), (64, 48), (64, 4), (4, 48))]
    results = []
    for device in ("cuda:1", "cuda:0"):
        x, w, A, B = (t.to(device) for t in given)
        results.append(gpu_products.shrink_expand(x, w, Adapter(A, B, 0.5))[0])
    there, here = results
    assert there.device == torch.device("cuda:1")
    torch.testing.assert_close(there.cpu(), here.cpu())


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_lazy_operands_are_what_they_stand_for(name, usable):
    """A negated view, and the zeros that torch.sgn's backward makes: kernels read memory as it is."""
    usable(name)
    x, weight, A, B, bias = operands(4, 64, 48, 4).values()
    with use_backend(name):
        y = lora_linear(torch._neg_view(-x.detach()), weight, A, B, 0.5, bias)
        torch.testing.assert_close(y, lora_linear(x, weight, A, B, 0.5, bias))
        assert not torch.autograd.grad(torch.sgn(y).sum(), A)[0].any()


def test_training_is_the_references():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 64).to(DEVICE)
    theirs = Reference(copy.deepcopy(linear), 4, 2.0).to(DEVICE)
    ours = LinearWithLoRA(linear, rank=4, alpha=2.0).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    losses = []
    x, target = torch.randn(128, 64, device=DEVICE), torch.randn(128, 64, device=DEVICE)
    for model in (theirs, ours):
        lora_kernels.freeze_base(ours)
        optimizer = torch.optim.AdamW([model.lora.A, model.lora.B], lr=1e-2)
        told = []
        for _ in range(30):
            loss = torch.nn.functional.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            told.append(loss.item())
        losses.append(told)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    assert losses[1][-1] < losses[1][0]


def test_strict_says_who_cannot():
    """On this device the first choice works; if it did not, strict would say why and this test would show it."""
    given = operands(512, 512, 512, 8, torch.bfloat16)
    with use_backend("auto", strict=True):
        y = lora_linear(given["x"], given["weight"], given["A"], given["B"], 0.5, given["bias"])
    assert torch.isfinite(y).all()
