"""Quantised weights on the device: bits of their dense copy, gradients, CUDA graphs, streams and threads."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lora_kernels import Problem, explain, lora_linear, plan
from lora_kernels.backends.device import current_target
from lora_kernels.operands import Adapter
from lora_kernels.samples import SAMPLES, sample
from tests.gpu.conftest import DEVICE, captured, declined
from tests.oracle import assert_gradients, gradients, reference
from tests.planned import Planned


def operands(M, N, K, R, dtype, name):
    """x, weight, A, B; x, A and B require grad."""
    torch.manual_seed(4)
    x, A, B = (torch.randn(s, device=DEVICE) / s[1] ** 0.5 for s in ((M, K), (K, R), (R, N)))
    x, A, B = (t.to(dtype).requires_grad_() for t in (x, A, B))
    return x, sample(name, N, K, dtype, DEVICE), A, B


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("size", [(1, 1), (7, 91), (513, 1030), (4096, 4096)])
def test_the_bits_are_those_of_the_weights_own_copy(size, name, dtype, triton_backend):
    if dtype == torch.float32 and current_target().name == "gfx1100":
        pytest.skip("its float32 products are ATen's")
    from lora_kernels.backends.triton.configs import tiles_for
    from lora_kernels.backends.triton.dequantise import dequantise

    kind = str(dtype).removeprefix("torch.")
    problem = Problem(128, *size, 8, kind, kind, DEVICE, weight_format=name)
    weight = sample(name, *size, dtype, DEVICE)
    out = torch.full(size, torch.nan, dtype=dtype, device=DEVICE)
    dequantise(weight, out, tiles_for(problem, current_target()).config("dequantise"))
    assert torch.equal(out, weight.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("M, N, K", [(5, 192, 256), (64, 4096, 4096), (300, 192, 250)])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_every_gradient(backend, M, N, K, name, dtype, triton_backend):
    kind = str(dtype).removeprefix("torch.")
    problem = Problem(M, N, K, 8, kind, kind, DEVICE, weight_format=name)
    if backend == "triton" and (reason := declined(triton_backend, problem)):
        pytest.skip(reason)
    x, weight, A, B = operands(M, N, K, 8, dtype, name)
    dy = torch.randn(M, N, device=DEVICE).to(dtype)
    ours = functools.partial(lora_linear, weight=weight, alpha=0.5, backend=backend)

    def plain(x, A, B):
        return reference(x, weight.dense().to(x.dtype), A, B, 0.5)

    given = {"x": x, "A": A, "B": B}
    assert_gradients(gradients(ours, given, dy), plain, given, dy)


@pytest.mark.parametrize("M", [4, 256])
def test_captured_graphs_and_eager_calls_beside_one_another(M, triton_backend):
    """A replay uses its own memory: an eager call with a larger weight between two replays changes neither."""
    if declined(triton_backend, Problem(M, 128, 256, 8, "bfloat16", "bfloat16", DEVICE)):
        pytest.skip("declined")
    small = operands(M, 128, 256, 8, torch.bfloat16, "nf4")
    large = operands(M, 512, 1024, 8, torch.bfloat16, "nf4")

    def call(given):
        with torch.no_grad():
            return lora_linear(*given, 0.5, backend="triton")

    graph, (y, z) = captured(lambda: (call(small), call(large)), warm=3)
    for _ in range(5):
        small[0].data.normal_(), large[0].data.normal_()
        between = call(large)
        graph.replay()
        again = call(small)
        assert torch.equal(y, again) and torch.equal(z, between)


def test_graph_trees_keep_no_memory_of_ours(triton_backend):
    """They check that nothing of a graph's pool is held by others, and warm up eagerly in it."""
    layers = [operands(128, n, 512, 8, torch.bfloat16, "nf4") for n in (256, 512)]

    def call(x, A, B, weight):
        return lora_linear(x, weight, A, B, 0.5, backend="triton")

    def of(weight):
        return torch.compile(lambda x, A, B: call(x, A, B, weight), mode="reduce-overhead")

    compiled = [of(weight) for _, weight, _, _ in layers]
    with torch.no_grad():
        for _ in range(5):
            for (x, weight, A, B), replayed in zip(layers, compiled, strict=True):
                x.data.normal_()
                torch.compiler.cudagraph_mark_step_begin()
                assert torch.equal(replayed(x, A, B).clone(), call(x, A, B, weight))
    plan.forget()


@pytest.mark.parametrize("one_stream", [False, True])
def test_streams_and_threads_at_once(one_stream, triton_backend):
    """Each call has its weight in memory of its own until its product has read it."""
    if declined(triton_backend, Problem(128, 512, 512, 8, "bfloat16", "bfloat16", DEVICE)):
        pytest.skip("declined")
    products = Planned(triton_backend, current_target(), "two_kernel")
    layers = [operands(128, 256 * n, 512, 8, torch.bfloat16, "nf4") for n in (1, 2, 3, 4)]

    def product(x, weight, A, B):
        return products.shrink_expand(x, weight.t(), Adapter(A, B, 0.5))[0]

    with torch.no_grad():
        expected = [product(*given) for given in layers]
    torch.cuda.synchronize()

    def work(index):
        stream = torch.cuda.default_stream() if one_stream else torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            found = [product(*layers[index]) for _ in range(50)]
            stream.synchronize()
        return all(torch.equal(y, expected[index]) for y in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_explain_says_how_it_is_read(triton_backend):
    x, weight, A, B = operands(8, 256, 512, 8, torch.bfloat16, "nf4")
    told = str(explain(x, weight, A, B, 0.5, backend="triton"))
    assert "the nf4 weight decoded" in told and "dense copy" not in told
