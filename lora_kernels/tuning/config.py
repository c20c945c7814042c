"""How one kernel is tiled, and the single statement of which tilings a problem and a GPU allow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_kernels.problem import DENSE, ITEMSIZE, PACKED_BYTES, Problem
from lora_kernels.tuning.targets import Target

KERNELS = (
    "shrink",
    "expand",
    "persistent",
    "persistent_one_launch",
    "one_launch",
    "one_pass",
    "decode",
    "wgrad",
    "shrink_wgrad",
    "dequantise",
)
PERSISTENT = ("persistent", "persistent_one_launch")  # in Gluon
LOWRANK_KERNELS = ("shrink", "wgrad", "shrink_wgrad")  # they read x (or dy) and no weight
# They take groups of rows, or read none.
GROUPED_KERNELS = ("shrink", "expand", "wgrad", "dequantise")
DECODE_ROWS = 64  # the most rows that `decode` holds in one tile
CUDA_DECODE_ROWS = 32  # the most rows of the CUDA C++ kernel
CUDA_DECODE_COLUMNS = 64  # of a half w that one of its tiles takes
CUDA_DECODE_RANK = 32  # the most ranks whose x·a it computes in its pass over w
TAIL_PARTS = 3  # of s, and of b, in a rank tail "in parts": one sum over three times the rank
FUSED_RANK = 64  # the largest rank of the kernels that keep a whole rank beside the main tile


def one_reading_columns(problem: Problem) -> int:
    """Columns of dy in a block of the kernel that reads it once for q and dB."""
    if problem.R > 32:
        return 32
    if "float32" not in (problem.dtype, problem.adapter_dtype):
        return 256
    return 128 if problem.dtype == "bfloat16" and problem.R <= 16 else 64


def one_reading_moves_less(itemsize: int, R: int, columns: int) -> bool:
    """Whether that kernel moves fewer bytes than the two that it replaces.

    A row of dy has 8·R bytes of partial results of q, float32 there and back, for each block of columns; they must be
    fewer than the second reading of dy that they save.
    """
    return itemsize * columns > 8 * R


def cuda_decode_fuses(R: int, one_half_type: bool, w_k_major: bool) -> bool:
    """Whether the CUDA C++ kernel computes x·a in its pass over w; else x·a is a launch of its own before it."""
    return one_half_type and w_k_major and R <= CUDA_DECODE_RANK


def cuda_decode_blocks(tiles: int, multiprocessors: int) -> int:
    """Blocks of the CUDA C++ kernel that share `tiles` of w's columns evenly, at most one for each multiprocessor.

    Each computes x·a beside its first tile, so that this is how often a is read.
    """
    return math.ceil(tiles / math.ceil(tiles / multiprocessors))


def shrinking_programs(blocks: int, tiles: int, programs: int, block_n: int) -> int:
    """How many of the programs that share `tiles` compute s of `blocks` of rows first: the result does not depend on it.

    Those that have a tile less, where these have done it before the others' first loops over K have ended. That is assumed
    to take block_n / 128 blocks each: reading x by half of a multiprocessor's port. Else all.
    """
    spare = -tiles % programs
    return spare if spare * max(1, block_n // 128) >= blocks else programs


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch options of `kernel`.

    A tile has block_m rows, block_n columns and block_k terms of a sum at a time; rank columns come in chunks of at most
    `rank_chunk`. `group_m` blocks of rows share an L2 neighbourhood. `split` parts of the sum are added in index order.
    `tma`: fetch through tensor descriptors where the operands allow it. `ctas` blocks of threads multiply a tile together
    into tensor memory, by tcgen05 in Gluon; 0 elsewhere.
    """

    kernel: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    split: int = 1
    tma: bool = False
    rank_chunk: int = 64
    ctas: int = 0

    def __str__(self) -> str:
        text = f"{self.kernel} {self.block_m}x{self.block_n}x{self.block_k}"
        text += f" w{self.num_warps} s{self.num_stages}" + f" split {self.split}" * (self.split > 1)
        return text + " tma" * self.tma + f" {self.ctas} CTAs" * (self.ctas > 1)


@dataclass(frozen=True)
class Tiles:
    """A tile for each kernel that can compute a problem, and the times of low-rank kernels that `tune` measured."""

    configs: tuple[TileConfig, ...]
    measured: Mapping[str, float] = field(default_factory=dict, compare=False)

    def has(self, kernel: str) -> bool:
        """Whether `kernel` can compute the problem."""
        return any(c.kernel == kernel for c in self.configs)

    def config(self, kernel: str) -> TileConfig:
        """The tile of `kernel`; ValueError where it cannot compute the problem."""
        for config in self.configs:
            if config.kernel == kernel:
                return config
        able = tuple(config.kernel for config in self.configs)
        raise ValueError(f"kernel must be one of {able}, got {kernel!r}")


def whole_rows(problem: Problem) -> bool:
    """Whether rows of x and of the weight are whole pieces of 16 elements, as Triton wants for a load of several at once.

    Rows of other lengths are loaded element by element, and each element takes a register for its address.
    """
    return problem.K % 16 == 0 and (problem.w_k_major or problem.N % 16 == 0)


def fits(config: TileConfig, problem: Problem, target: Target) -> str | None:
    """None if `config` can compute `problem` on `target`, else the rule that it breaks."""
    for name in ("block_m", "block_n", "block_k", "num_warps", "rank_chunk"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1 or value & (value - 1):
            return f"{name} must be a power of two, got {value!r}"
    for name in ("num_stages", "group_m", "split"):
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1:
            return f"{name} must be a positive integer, got {getattr(config, name)!r}"
    if config.kernel not in KERNELS:
        return f"kernel must be one of {KERNELS}, got {config.kernel!r}"
    if problem.dtype == "float64":
        return "float64 has no tensor-core form"
    if config.block_k < 16 or config.rank_chunk < 16:
        return (
            "block_k and rank_chunk must be at least 16, the shortest sum of a matrix instruction"
        )
    if problem.groups and config.kernel not in GROUPED_KERNELS:
        return f"{config.kernel} takes no groups of rows"
    if config.tma and not target.tma:
        return f"{target.name} has no tensor descriptors"
    able = (1, 2) if config.kernel in PERSISTENT and target.tmem_columns else (0,)
    if config.ctas not in able:
        return (
            f"ctas of {config.kernel} on {target.name} must be one of {able}, got {config.ctas!r}"
        )
    if config.kernel == "decode" and problem.M > DECODE_ROWS:
        return f"decode takes at most {DECODE_ROWS} rows, got {problem.M}"
    if config.kernel in ("decode", "shrink_wgrad") and problem.R > FUSED_RANK:
        return f"{config.kernel} takes a rank of at most {FUSED_RANK}, got {problem.R}"
    if target.name == "gfx1100" and (
        problem.dtype == "float32" or config.kernel in ("decode", "shrink_wgrad")
    ):
        return f"{target.name} multiplies float32 without its matrix unit, and {config.kernel} runs out of registers"
    mixed = problem.dtype != problem.adapter_dtype
    if config.kernel == "shrink_wgrad" and target.name == "sm_120" and mixed and problem.R > 32:
        return f"{target.name} runs out of registers for float32 adapters of rank {problem.R}"
    if config.kernel == "decode" and "float32" in (problem.dtype, problem.adapter_dtype):
        held = config.block_m * rank_block(problem.R, FUSED_RANK)
        most = 512 if target.warp_size == 64 else 1024 if problem.dtype == "float32" else 2048
        if held > most:
            return (
                f"decode has no registers for {config.block_m} rows of rank {problem.R} in float32"
            )
    masked = 16 if problem.dtype == "float32" else 32
    if config.kernel == "one_pass" and problem.dropout and masked < problem.R:
        return f"one_pass has no registers for a mask beside a rank of {problem.R}"
    if config.kernel == "decode" and problem.dropout:
        return "decode has no dropout"
    packed = problem.weight_format != DENSE
    if config.kernel == "decode" and packed and target.name == "gfx942" and problem.M > 16:
        return f"{target.name} runs out of registers for more than 16 rows beside packed weights"
    large = config.kernel == "shrink_wgrad" or (config.kernel == "decode" and problem.M > 16)
    if target.name == "gfx942" and large and not whole_rows(problem):
        return f"{target.name} runs out of registers for {config.kernel} of rows that are no multiples of 16, got {problem}"
    if config.kernel == "decode" and packed and not problem.w_k_major:
        return f"decode reads {problem.weight_format} weights of a forward only"
    if config.kernel == "decode" and problem.weight_format == "nf4" and problem.K % 64:
        return (
            f"decode reads nf4 weights whose rows are whole blocks of 64, got rows of {problem.K}"
        )
    if config.kernel == "dequantise" and not packed:
        return "a dense weight is not decoded"
    if reason := _race(config, problem, target):
        return reason
    if config.kernel in PERSISTENT and (reason := _persistent_refuses(config, problem, target)):
        return reason
    one_launch = config.kernel in ("one_launch", "persistent_one_launch")
    if one_launch and (reason := _one_launch_refuses(config, problem, target)):
        return reason
    needed = smem_bytes(config, problem, target)
    if needed > target.smem_bytes:
        return f"needs {needed} bytes of shared memory, {target.name} has {target.smem_bytes}"
    return None


def _race(config: TileConfig, problem: Problem, target: Target) -> str | None:
    """The rule of tiles for which Triton 3.9 makes code with a race in shared or tensor memory, as the emulator finds.

    It stores a step's parts to tensor memory before it waits for the products that still read the last one's. In `decode` it
    fetches the next x over the one that a warp group's product still reads, where another product of x takes mma.sync, as
    that with a of fewer than 64 ranks does, or w comes from registers.
    """
    rows = {
        "shrink": config.block_m,
        "wgrad": config.block_n,
        "shrink_wgrad": max(config.block_m, config.block_n),
    }.get(config.kernel, 0)
    in_parts = target.tmem_columns and lowrank_in_parts(problem)
    if in_parts and rows >= 64 and config.num_warps > 2:
        return (
            f"{config.kernel} in parts has a race in tensor memory of {target.name} with more than 2 warps, "
            f"got {config.num_warps}"
        )
    warp_group = target.name == "sm_90" and config.block_n >= 64 and config.num_warps >= 4
    beside_mma_sync = problem.R <= 32 or problem.weight_format != DENSE
    if config.kernel == "decode" and warp_group and beside_mma_sync and problem.itemsize == 2:
        return (
            f"decode by {config.block_n} columns has a race in shared memory of {target.name} with "
            f"more than 2 warps, got {config.num_warps}"
        )
    return None


def _persistent_refuses(config: TileConfig, problem: Problem, target: Target) -> str | None:
    """The rule of the persistent product that is broken: tensor copies fetch each operand, s and b in a half type."""
    if not config.tma:
        return "persistent fetches by tensor descriptors"
    if config.ctas and (
        config.block_m != 128 * config.ctas or 2 * config.block_n > target.tmem_columns
    ):
        return (
            f"tensor memory of {target.name} holds two accumulators of 128 rows a CTA, "
            f"got {config.block_m}x{config.block_n} by {config.ctas}"
        )
    if problem.itemsize != 2:
        return f"persistent takes an x of bfloat16 or float16, got {problem.dtype}"
    if problem.N % 8 or problem.K % 8:
        return f"persistent takes N and K that are multiples of 8, got {problem.N} and {problem.K}"
    return None


# The wgrad that runs beside a persistent product: all rows in one part, in little shared memory. 64 columns: a layer of 4096
# makes half as many programs as there are multiprocessors. On sm_100 it does not pay: shared memory and L2 are as busy there
# as the matrix units, and bandwidth is cheap.
WGRAD_BESIDE = {"sm_90": TileConfig("wgrad", 32, 64, 16, 4, 4)}
# Of shared memory, of a low-rank kernel and of what the hardware adds to each block.
BESIDE_BYTES = 34 * 1024
# Of a read of memory beside others: 0.87 to 0.97 by the times of two low-rank kernels on an H200.
LATENCY_US = 1.0


def waits_us(config: TileConfig, steps: int) -> float:
    """The least time of a program that takes so many steps, one after the other: num_stages - 1 are on their way."""
    return steps / max(1, config.num_stages - 1) * LATENCY_US


def shrink_beside(R: int, target: Target) -> TileConfig | None:
    """The tile of the shrink that runs beside a persistent product, in little shared memory and no tensor memory."""
    if target.name == "sm_90":
        return TileConfig("shrink", 64, 1, 64, 4, 3)
    if target.name == "sm_100":
        return TileConfig("shrink", 64, 1, 32, 2, 6 if R <= 32 else 5)
    return None


def wgrad_beside_us(problem: Problem, target: Target) -> float:
    """The time of the sums of dB and dA beside dx, each program of which waits for one part of its rows after the other."""
    tile = WGRAD_BESIDE[target.name]
    programs = math.ceil(problem.K / tile.block_n) + math.ceil(problem.N / tile.block_n)
    turns = math.ceil(programs / target.multiprocessors)
    return turns * waits_us(tile, math.ceil(problem.M / tile.block_m))


def runs_beside(config: TileConfig, problem: Problem, target: Target) -> bool:
    """Whether low-rank kernels run beside the persistent product of this tile, on the same multiprocessors.

    In a forward shrink; in a backward shrink and the sums of dB and dA, where there are such and dx takes longer. In one
    type, without a mask. By shared memory: registers suffice, tests count those of both. A tile of 256 columns takes longer
    than a program of shrink over all of K, which waits for memory; a narrower one has the shrink of all other products.
    """
    if problem.groups or problem.empty or problem.dropout or problem.R > FUSED_RANK:
        return False
    if problem.N % 16 or problem.K % 16:  # the tiles beside have no registers for other rows
        return False
    if not problem.dtype == problem.adapter_dtype == "bfloat16":
        return False
    if (
        config.block_n < 256
        or smem_bytes(config, problem, target) + BESIDE_BYTES > target.smem_bytes
    ):
        return False
    if not problem.backward:
        return target.name in WGRAD_BESIDE or not splits_shrink(problem, target)
    if target.name not in WGRAD_BESIDE or problem.weight_format != DENSE:
        return False
    # dx after the first of some eight tiles of each multiprocessor.
    return wgrad_beside_us(problem, target) < 0.8 * problem.flops / (target.half_tflops * 1e6)


def splits_shrink(problem: Problem, target: Target) -> bool:
    """Whether shrink has so few blocks of rows that it sums K in parts: the launch before a product adds them then."""
    return 2 * max(1, row_blocks(problem, 64)) <= target.multiprocessors


def one_launch_ranks(masked: bool) -> int:
    """The largest rank whose s a product computes in its own launch: a mask of x takes registers."""
    return 32 if masked else FUSED_RANK


def _one_launch_refuses(config: TileConfig, problem: Problem, target: Target) -> str | None:
    """The rule of the product that computes s in its own launch that `problem` breaks."""
    if not target.name.startswith("sm_"):
        return f"one_launch is made for NVIDIA GPUs, not for {target.name}"
    if not problem.dtype == problem.adapter_dtype == "bfloat16":
        return (
            "one_launch hands s on in bfloat16, the type that x and the adapters must have, "
            f"got {problem.dtype} and {problem.adapter_dtype}"
        )
    most = one_launch_ranks(problem.dropout)
    most = 16 if problem.dropout and target.name == "sm_100" else most  # 16 bytes spill
    if most < problem.R:
        return f"one_launch takes a rank of at most {most}, got {problem.R}"
    if config.kernel == "one_launch":
        return None
    if problem.dropout:
        return "persistent_one_launch has no dropout"
    if config.ctas:
        return f"persistent_one_launch is not made for the tensor memory of {target.name}"
    if config.block_n < rank_block(problem.R, FUSED_RANK):
        return (
            f"a rank of {problem.R} does not fit {config.block_n} columns of persistent_one_launch"
        )
    return None


def lowrank_in_parts(problem: Problem) -> bool:
    """Whether low-rank kernels multiply float32 adapters, s and q as parts in x's type."""
    return (problem.dtype, problem.adapter_dtype) == ("bfloat16", "float32")


def tail_in_parts(problem: Problem) -> bool:
    """Whether a product beside a half x multiplies s by b in parts, as they are no bfloat16 numbers."""
    return problem.itemsize == 2 and not problem.dtype == problem.adapter_dtype == "bfloat16"


def tail_ranks(problem: Problem) -> int:
    """Columns of s and rows of b that the persistent product multiplies."""
    return (TAIL_PARTS if tail_in_parts(problem) else 1) * problem.R


def masks_no_tail(config: TileConfig, ranks: int) -> str | None:
    """Why the persistent product has no mask of its rank tail, of so many `tail_ranks`, or None where it has one."""
    if config.ctas:
        return (
            "tensor memory has no columns for the rank tail apart, which alone the mask of dx is on"
        )
    if ranks > config.block_k:
        # Two steps at a time spill 80 bytes of a thread; one by one, each with a mask, a block of 128x256 ends with 16784
        # cycles of instructions at rank 128, where that of `expand` has 10456.
        return (
            f"the mask of dx is on one step of s·b, of at most {config.block_k} ranks, got {ranks}"
        )
    return None


def rank_block(R: int, rank_chunk: int) -> int:
    """How many rank columns a tile holds: R's next power of two, at least 16 for tensor cores, at most rank_chunk."""
    return min(max(16, 1 << (R - 1).bit_length()), rank_chunk)


def row_blocks(problem: Problem, block_m: int) -> int:
    """Blocks of block_m rows, none of which has rows of two groups, where the rows are spread evenly over the groups."""
    each = math.ceil(problem.M / max(problem.with_rows, 1))
    return problem.with_rows * math.ceil(each / block_m)


def smem_bytes(config: TileConfig, problem: Problem, target: Target) -> int:
    """Shared memory of the operand tiles that the pipeline of `config` keeps in flight; compilations confirm it."""
    size = problem.itemsize
    adapter = ITEMSIZE[problem.adapter_dtype]
    ranks = rank_block(problem.R, config.rank_chunk)
    m, n, k = config.block_m, config.block_n, config.block_k
    every = config.tma
    if config.kernel in (*LOWRANK_KERNELS, "decode") and target.tma and config.num_warps >= 4:
        # Matrix instructions of four warps and 64 rows read one block while num_stages - 1 are fetched.
        every = (m if config.kernel == "shrink" else n) >= 64
    # NF4's codes are looked up on the way, each a float32.
    of_w = 4.5 if problem.weight_format == "nf4" else PACKED_BYTES.get(problem.weight_format, size)
    stage = {
        "shrink": m * k * size + k * ranks * adapter,
        "expand": (m + n) * k * size,
        "one_launch": (m + n) * k * size,
        **dict.fromkeys(PERSISTENT, (m + n) * k * size // max(1, config.ctas)),
        "one_pass": (m + n) * k * size + k * ranks * adapter,
        "decode": m * k * size + int(n * k * of_w) + k * ranks * adapter,
        "wgrad": m * n * size + m * ranks * 4,
        "shrink_wgrad": m * n * size + m * ranks * 4,
        "dequantise": n * k * size,
    }[config.kernel]
    extra = {
        "shrink_wgrad": n * ranks * (adapter + 4),
        # half of a tile's result
        **dict.fromkeys(PERSISTENT, m * n // 2 * size // max(1, config.ctas)),
    }.get(config.kernel, 0)
    if size < adapter and config.kernel in ("shrink", "wgrad"):
        extra = (k if config.kernel == "shrink" else m) * ranks * size  # one part, or a rounded one
    if config.kernel == "wgrad" and problem.dropout and problem.dtype == "float16":
        extra += m * n * size  # what is masked, beside a float32 operand
    return max(1, config.num_stages - (not every)) * stage + extra
