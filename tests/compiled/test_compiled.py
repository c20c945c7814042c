"""Every configuration that selection can return compiles for its GPU, fits it, spills nothing and uses matrix units."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.backends.triton.configs import main_tile, tiles_of, unmasked, untried
from lora_kernels.problem import Problem
from lora_kernels.tuning.config import (
    LOWRANK_KERNELS,
    PERSISTENT,
    WGRAD_BESIDE,
    TileConfig,
    Tiles,
    runs_beside,
    shrink_beside,
    smem_bytes,
)
from lora_kernels.tuning.cycles import TRITON
from lora_kernels.tuning.targets import TARGETS
from tests.compiled.jobs import COMPILED, FORMS, TWINS, TYPES, Job
from tests.compiled.recorder import recording
from tests.compiled.sass import Code, inspect
from tests.compiled.shipped import Shapes

pytestmark = pytest.mark.slow
PARTS = 8  # of a target's work, for test processes beside each other
# Nothing spills, but for what the compiler of Triton 3.6 sets aside of one thread to fit more warps, before and after a
# loop but for an instruction or two.
LOCAL_BYTES, LOOP_SPILLS = (16, 0.01) if triton.__version__.startswith("3.6.") else (0, 0.0)
SCRATCH = 4096  # bytes of shared memory beside the tiles: barriers, and what a result takes to change its layout
MATRIX_UNIT = {"sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "mfma", "gfx1100": "wmma"}


def compile_job(target: str, job: Job, scaled: bool = False, loops: bool = True) -> Code:
    problem, config, forward, peft_b = job
    with recording(target) as launches:
        Shapes(problem, forward, peft_b, scaled).launch(config, TARGETS[target])
    form = ""
    if config.kernel == "dequantise":
        form = "_nf4" if problem.weight_format == "nf4" else "_bytes"
    name = "scale" if scaled and config.kernel == "wgrad" else config.kernel
    name = {"one_launch": "expand", "persistent_one_launch": "persistent"}.get(name, name)
    assert launches[0].name == f"_{name}{form}_kernel"
    return inspect(launches[0].compiled, loops)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("target, form", COMPILED)
def test_shipped_configurations(target, part, form):
    every = list(FORMS[form](target))
    if target in TWINS:
        tiles = [{replace(job[1], split=1) for job in FORMS[form](twin)} for twin in TWINS]
        assert tiles[0] == tiles[1]
        every = list(FORMS[form](TWINS[0]))[TWINS.index(target) :: len(TWINS)]
    limits = TARGETS[target]
    wrong = []
    for job in every[part::PARTS]:
        problem, config, forward, _ = job
        code = compile_job(target, job, form == "scaled", False)
        what = f"{config} for {problem}, {'forward' if forward else 'backward'}"
        if code.local_bytes > LOCAL_BYTES or code.loop_spills > LOOP_SPILLS:
            wrong.append(
                f"{what}: {code.local_bytes} bytes spilled, {code.loop_spills:.1%} of a loop, "
                f"{code.registers} registers"
            )
        if code.smem_bytes > limits.smem_bytes:
            wrong.append(f"{what}: {code.smem_bytes} bytes of shared memory")
        predicted = smem_bytes(config, problem, limits) + SCRATCH
        # Elsewhere the layout of a result, or of a float32 operand, may pass through memory of its own.
        lowrank = config.kernel in LOWRANK_KERNELS and limits.tma and form != "scaled"
        if lowrank and code.smem_bytes > predicted:
            wrong.append(f"{what}: {code.smem_bytes} bytes of shared memory, predicted {predicted}")
        if code.tmem_columns > max(limits.tmem_columns, 0):
            wrong.append(f"{what}: {code.tmem_columns} columns of tensor memory")
        multiplies = problem.dtype == "bfloat16" and config.kernel != "dequantise"
        multiplies = multiplies and not (form == "scaled" and config.kernel == "wgrad")
        if multiplies and not code.matrix and target != "gfx1100":
            wrong.append(f"{what}: no matrix instruction")
        main = config.kernel in ("expand", "one_launch", *PERSISTENT, "one_pass")
        main = main and problem.dtype == "bfloat16"
        main = main and config.block_m >= 64  # the rows of an instruction of sm_90 and sm_100
        if main and not any(op.startswith(MATRIX_UNIT.get(target, "HMMA")) for op in code.matrix):
            wrong.append(f"{what}: {dict(code.matrix)}, not {MATRIX_UNIT.get(target, 'HMMA')}")
    assert len(every) >= 5 and not wrong, "\n".join(wrong)


@triton.jit
def _plain_product_kernel(
    x,
    w,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    W_K_MAJOR: tl.constexpr,
):
    """y = x·w and nothing else: what the main loop of the fused kernel is measured by."""
    pid_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M)
    pid_n = tl.program_id(0) // tl.cdiv(M, BLOCK_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m[:, None] < M
    mask_n = offs_n[None, :] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        for k in range(0, K, BLOCK_K):
            x_tile = x.load([pid_m * BLOCK_M, k])
            if W_K_MAJOR:  # noqa: SIM108, a constant decides which branch is compiled
                w_tile = w.load([pid_n * BLOCK_N, k]).T
            else:
                w_tile = w.load([k, pid_n * BLOCK_N])
            acc = tl.dot(x_tile, w_tile, acc)
    else:
        offs_k = tl.arange(0, BLOCK_K)
        x_ptrs = x + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        w_ptrs = w + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
        for _ in range(0, K, BLOCK_K):
            x_tile = tl.load(x_ptrs, mask=mask_m, other=0.0)
            w_tile = tl.load(w_ptrs, mask=mask_n, other=0.0)
            acc = tl.dot(x_tile, w_tile, acc)
            x_ptrs += BLOCK_K * stride_xk
            w_ptrs += BLOCK_K * stride_wk
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)


def plain_product(target: str, config: TileConfig, problem: Problem, forward: bool) -> Code:
    M, N, K = problem.M, problem.N, problem.K
    x = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
    stored = torch.empty((N, K) if forward else (K, N), dtype=torch.bfloat16, device="meta")
    w, y = stored.t() if forward else stored, torch.empty(M, N, dtype=torch.bfloat16, device="meta")
    first, second = x, w
    if config.tma:
        block = [config.block_n, config.block_k] if forward else [config.block_k, config.block_n]
        first = TensorDescriptor.from_tensor(x, [config.block_m, config.block_k])
        second = TensorDescriptor.from_tensor(stored, block)
    with recording(target) as launches:
        _plain_product_kernel[(1,)](
            first,
            second,
            y,
            M,
            N,
            K,
            *x.stride(),
            *w.stride(),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            TMA=config.tma,
            W_K_MAJOR=forward,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return inspect(launches[0].compiled)


@pytest.mark.parametrize("form", ["forward", "forward, PEFT's b", "backward"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_the_main_loop_is_the_plain_products(target, form, record_property):
    """The rank tail adds no matrix instruction to the loop and at most 10 % others, nor any shared memory."""
    problem = Problem(4096, 4096, 4096, 16, "bfloat16", "bfloat16", device="cuda")
    forward, peft_b = form != "backward", form == "forward, PEFT's b"
    for config in tiles_of("expand", problem, TARGETS[target]):
        if peft_b and not config.tma:
            continue
        plain = plain_product(target, config, problem, forward)
        fused = compile_job(target, (problem, config, forward, peft_b))
        others, plain_others = (
            code.loop.total() - len(code.loop_matrix) for code in (fused, plain)
        )
        line = (
            f"{target} {config} {form}: loop of {fused.loop.total()} instructions, "
            f"{len(fused.loop_matrix)} matrix; plain {plain.loop.total()}, {len(plain.loop_matrix)}; "
            f"registers {fused.registers} and {plain.registers}; shared {fused.smem_bytes} and {plain.smem_bytes}"
        )
        print(line)
        record_property("main loop", line)
        assert plain.loop_matrix and fused.loop_matrix == plain.loop_matrix, line
        assert others <= 1.1 * plain_others + 1, line
        assert fused.smem_bytes <= plain.smem_bytes, line


def test_the_page_of_predictions_has_these_loops():
    """It is written by `benchmarks/predicted.py`, which compiles the same."""
    made = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "predicted.py"))
    page = (made["FOLDER"] / "gpu-predicted.md").read_text()
    if triton.__version__ == TRITON:
        assert page == made["page"]()
    else:
        assert page.startswith(made["page"](with_code=False)) and list(made["loops"]())


# The matrix instructions of the loop, all its instructions and bytes of shared memory at most, columns of tensor memory.
PERSISTENT_LOOPS = {
    ("sm_90", "128x256x64"): (["HGMMA.64x256x16.F32.BF16"] * 4, 90, 181 * 1024, 0),
    ("sm_100", "256x256x64"): (["UTCHMMA.2CTA"] * 4, 48, 225 * 1024, 512),
    ("sm_100", "128x256x64"): (["UTCHMMA"] * 4, 48, 225 * 1024, 512),
    ("sm_100", "128x128x64"): (["UTCHMMA"] * 4, 48, 209 * 1024, 256),
}


@pytest.mark.skipif(untried() is not None, reason=str(untried()))
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("types", [*TYPES[:2], ("float16", "float16")], ids=str)
@pytest.mark.parametrize(("target", "size"), PERSISTENT_LOOPS)
def test_the_persistent_loop(target, size, types, forward):
    """At rank 16 and 64, with a mask or without, the loop over K is the same: four matrix instructions, few others."""
    problem = Problem(4096, 4096, 4096, 16, *types, device="cuda")
    configs = [c for k in PERSISTENT for c in tiles_of(k, problem, TARGETS[target])]
    matrix, instructions, smem_bytes, columns = PERSISTENT_LOOPS[target, size]
    if types[0] == "float16":
        matrix = [op.removesuffix(".BF16") for op in matrix]
    sizes = [c for c in configs if size in str(c)]
    for R, config, dropout in product((16, 64), sizes, (False, True)):
        own = replace(problem, R=R, dropout=dropout)
        masks = config.kernel == "persistent" and unmasked(config, own) is None
        if dropout and (forward or not masks):
            continue
        code = compile_job(target, (own, config, forward, False))
        assert code.loop_matrix == matrix, code
        assert code.loop.total() <= instructions and code.local_bytes == 0, code
        assert code.smem_bytes <= smem_bytes and code.tmem_columns == columns, code


@pytest.mark.skipif(untried() is not None, reason=str(untried()))
@pytest.mark.parametrize("R", [16, 64])
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_low_rank_kernels_fit_beside_the_persistent_product(target, R):
    """A multiprocessor has the registers, shared and tensor memory of both; a block has a KiB more of shared memory."""
    problem = Problem(8192, 4096, 4096, R, "bfloat16", "bfloat16", device="cuda")
    limits, beside = TARGETS[target], [shrink_beside(R, TARGETS[target])]
    beside += [WGRAD_BESIDE[target]] if target in WGRAD_BESIDE else []
    large = next(
        c for c in tiles_of("persistent", problem, limits) if runs_beside(c, problem, limits)
    )
    assert large.block_m * large.block_n >= 128 * 256

    def taken(config: TileConfig, forward: bool) -> tuple[int, int, int]:
        with recording(target) as launches:
            Shapes(problem, forward).launch(config, limits)
        code = inspect(launches[0].compiled, False)
        (threads,) = re.findall(r"\.reqntid (\d+)", launches[0].compiled.asm["ptx"])
        registers = -(-code.registers // 8) * 8 * int(threads)
        return registers, code.smem_bytes + 1024, code.tmem_columns

    for forward, small in product((True, False), beside):
        both = [sum(pair) for pair in zip(taken(large, forward), taken(small, True), strict=True)]
        assert both[0] <= 65536 and both[1] <= limits.smem_bytes + 1024 and both[2] <= 512, both


@pytest.mark.parametrize("target", [name for name in TARGETS if name != TWINS[1]])
def test_the_tail_alone_with_its_mask(target):
    """What `tail_first` launches beside the library's product: s·b + bias, and mask∘(q·aᵀ), of every type."""
    wrong = []
    kinds = [(*pair, 64) for pair in (*TYPES, ("float16", "float16"))]
    for (dtype, adapter_dtype, R), forward in product([*kinds, (*TYPES[0], 61)], (True, False)):
        problem = Problem(4096, 4096, 0, R, dtype, adapter_dtype, device="cuda", dropout=True)
        config = main_tile("tail_first", problem, Tiles(()))
        code = compile_job(target, (problem, config, forward, False), loops=False)
        if code.local_bytes > LOCAL_BYTES:
            wrong.append(f"{config} for {problem}: {code.local_bytes} bytes spilled")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_a_float32_q_beside_bfloat16_operands(target):
    """As where A alone is trained, or DoRA: rounded on its way, with a mask or without, over groups or not; dA reads it."""
    problem = Problem(4096, 4096, 4096, 64, "bfloat16", "bfloat16", device="cuda")
    compiled, wrong = 0, []
    for groups, dropout in ((0, False), (0, True), (8, False), (8, True)):
        own = replace(problem, groups=groups, weights=groups or 1, dropout=dropout)
        for kernel in ("expand", "wgrad"):
            for config in tiles_of(kernel, own, TARGETS[target]):
                with recording(target) as launches:
                    shapes = Shapes(own, kernel == "wgrad", float32_s=True)
                    shapes.launch(config, TARGETS[target])
                code = inspect(launches[0].compiled, False)
                compiled += 1
                if code.local_bytes > LOCAL_BYTES:
                    wrong.append(f"{config} for {own}: {code.local_bytes} bytes spilled")
    assert compiled >= 6 and not wrong, "\n".join(wrong)
