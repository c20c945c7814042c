"""Writes docs/performance/gpu-predicted.md and its plot: what the cost model and the compiled code say about GPUs.

Nothing in it is measured on a device. `python benchmarks/predicted.py` takes a minute; `--no-code` keeps to the model, and
`--count` writes the cycles of lora_kernels/tuning/cycles.json anew.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The repository's own package and tests, from its root.
from lora_kernels.backends.base import Candidate, fastest  # noqa: E402
from lora_kernels.backends.triton.configs import tiles_of  # noqa: E402
from lora_kernels.plan import predict  # noqa: E402
from lora_kernels.problem import Problem  # noqa: E402
from lora_kernels.tuning.config import CUDA_DECODE_COLUMNS, cuda_decode_blocks  # noqa: E402
from lora_kernels.tuning.cost import full_rate, predict_us  # noqa: E402
from lora_kernels.tuning.cycles import RANKS, TABLE  # noqa: E402
from lora_kernels.tuning.targets import TARGETS, Target  # noqa: E402

FOLDER = ROOT / "docs" / "performance"
SHAPES = (  # M, K, N, R
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (8192, 14336, 4096, 16),
    (8192, 4096, 1024, 16),
    (8192, 4096, 4096, 256),
    (2048, 4096, 4096, 64),
    (4096, 5120, 5120, 32),
    (512, 4096, 4096, 16),
    (16, 4096, 4096, 16),
    (1, 4096, 4096, 16),
)
LARGE = tuple(shape for shape in SHAPES if shape[0] > 32)
FORMS = (
    "reference",
    "addmm",
    "eager",
    "lorafusion",
    "two_kernel",
    "one_pass",
    "decode",
)
ONE_LAUNCH = ("one_launch", "persistent_one_launch")
BEST = "ours: the best of our products, and its range"
TITLES = {form: form for form in (*FORMS, BEST)} | {"lorafusion": "LoRAFusion-style, predicted"}
# Of x: Qwen3-MoE's 4096, 512 and 16 tokens with eight experts each.
GROUPED_ROWS = (32768, 4096, 128)
GROUPED_LAYERS = (  # what it is, K, N, R, groups, weights
    ("Qwen3-MoE gate and up, 128 experts", 2048, 1536, 16, 128, 128),
    ("Qwen3-MoE down, 128 experts", 768, 2048, 16, 128, 128),
    ("16 tenants of one weight", 4096, 4096, 16, 16, 1),
)
GROUPED_TEXT = (
    "The rows are taken as equally many in each group, and each group's are filled up to blocks of rows. `frozen`"
    " is the floor: the arithmetic at the library's rate, or x, y and each weight that has rows moved once. "
    "`loop` is the reference's formula for one group after another, for which the host must know the offsets. "
    "`eager` is the batched form in plain ATen, which does not, but copies a weight for each of up to twice as "
    "many blocks as groups; its passes were counted from its code by hand. `two_kernel` is one launch of `shrink`"
    " and one of `expand` over all groups; a stack of weights is read by pointers, one weight by tensor "
    "descriptors. `tail_first` writes each group's s·B + bias and accumulates the library's product of all rows "
    "onto it, where the groups share the weight. Tiles of 16 and 32 rows were not counted: their cycles are "
    "scaled from those of the nearest tile. In the backward dy is read once for q and once for dB. What is not in"
    " the model: groups of unlike sizes, and whether a block finds its weight in L2."
)
CHIPS = ("sm_90", "sm_80", "sm_100", "sm_120")


def problem_of(shape: tuple[int, int, int, int]) -> Problem:
    M, K, N, R = shape
    return Problem(M, N, K, R, "bfloat16", "bfloat16", device="cuda")


def times(problem: Problem, target: Target) -> dict[str, float]:
    """Predicted microseconds by form, where the form can compute the problem."""
    offered = [c for c in predict(problem, target) if c.slower is None]
    found = {c.name: c.predicted_us for c in offered if c.predicted_us is not None}
    found |= {
        name: predict_us(name, problem, target) for name in ("reference", "addmm", "lorafusion")
    }
    return {form: found[form] for form in FORMS if form in found}


def tables(name: str) -> Iterator[str]:
    """Forward and backward on one target, each form over the frozen layer."""
    target = TARGETS[name]
    for backward in (False, True):
        yield f"\n**{target.chip} ({name}), {'backward' if backward else 'forward'}, predicted**\n"
        yield f"| M, K, N, R | frozen, us | {' | '.join(TITLES[form] for form in FORMS)} | chosen |"
        yield f"|---|---|{'---|' * len(FORMS)}---|"
        for shape in SHAPES:
            problem = problem_of(shape).adjoint() if backward else problem_of(shape)
            frozen = predict_us("frozen", problem, target)
            found = times(problem, target)
            cells = (f"{found[form] / frozen:.2f}" if form in found else "" for form in FORMS)
            taken = TITLES[chosen(problem, target)]
            yield f"| {', '.join(map(str, shape))} | {frozen:.1f} | {' | '.join(cells)} | {taken} |"


RANGES_TEXT = (
    "`persistent` is the product written in Gluon: a program on each multiprocessor, on B200 a pair of CTAs for a tile, and "
    "the rank tail as one more step of its sum. `one_launch` is Triton's product whose first programs compute s; its tiles "
    "wait for that by flags; `persistent_one_launch` is both. None of them is ever taken by prediction, only where `tune` "
    "has timed it as the fastest. One "
    "assumption decides: what a loop that is bound by its matrix pipe reaches of the vendor library's rate. Published: A100 "
    "0.89 to 0.99 from 2500 (triton #6523, #7085); H100 without a tail 1.02 at K = 1024 and 2048, 0.99 to 1.01 from 4096, "
    "0.92 at 512 (Triton's Gluon tutorial 07), with a tail 0.95 at 4096 (lorafusion #8); B200 by pairs of CTAs 0.94 to 1.01 "
    "(tutorial 14). RTX 5090 is an estimate. So each figure is a range over the frozen layer, for "
    + ", ".join(
        f"{TARGETS[n].reaches[1]} down to {TARGETS[n].reaches[0]} on {TARGETS[n].chip}"
        for n in CHIPS
    )
    + "; the tables above, and the choice, have the middle."
)


def ranges() -> Iterator[str]:
    """Our products beside ATen on every chip: what the range of one assumption makes of them."""
    forms = ("two_kernel", "one_launch", "persistent", "persistent_one_launch")
    yield f"| chip | M, K, N, R | direction | frozen, us | eager | {' | '.join(forms)} | one of ours is faster than eager |"
    yield f"|---|---|---|---|---|{'---|' * len(forms)}---|"
    for name, shape in itertools.product(CHIPS, LARGE):
        target = TARGETS[name]
        for problem in (problem_of(shape), problem_of(shape).adjoint()):
            frozen = predict_us("frozen", problem, target)
            found = {c.name: c for c in predict(problem, target)}
            eager = predict_us("eager", problem, target)
            able = (f for f in forms if f in found and not (problem.backward and f in ONE_LAUNCH))
            own = {form: found[form].predicted_range for form in able}
            cells = (
                f"{own[form][0] / frozen:.2f}-{own[form][1] / frozen:.2f}" if form in own else ""
                for form in forms
            )
            quickest, slowest = (min(us[end] for us in own.values()) < eager for end in (0, 1))
            verdict = "yes" if slowest else "in a part of the range" if quickest else "no"
            direction = "backward" if problem.backward else "forward"
            yield (
                f"| {target.chip} | {', '.join(map(str, shape))} | {direction} | {frozen:.1f} | {eager / frozen:.2f} "
                f"| {' | '.join(cells)} | {verdict} |"
            )


def grouped_table() -> Iterator[str]:
    """Experts and tenants: what is predicted for the rows of all groups together."""
    yield "| chip | layer | T, K, N, R | direction | frozen, us | loop | eager | two_kernel | tail_first | chosen |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name in ("sm_90", "sm_80"):
        target = TARGETS[name]
        for layer, K, N, R, groups, weights in GROUPED_LAYERS:
            for T in GROUPED_ROWS:
                types = "bfloat16", "bfloat16", "cuda"
                forward = Problem(T, N, K, R, *types, groups=groups, weights=weights)
                for problem in (forward, forward.adjoint()):
                    frozen = predict_us("frozen", problem, target)
                    found = {c.name: c.predicted_us for c in predict(problem, target)}
                    one = replace(problem, M=T // problem.with_rows, groups=0, weights=1)
                    found["loop"] = problem.with_rows * predict_us("reference", one, target)
                    forms = ("loop", "eager", "two_kernel", "tail_first")
                    cells = (f"{found[f] / frozen:.2f}" if f in found else "" for f in forms)
                    direction = "backward" if problem.backward else "forward"
                    yield (
                        f"| {target.chip} | {layer} | {T}, {K}, {N}, {R} | {direction} | {frozen:.1f} "
                        f"| {' | '.join(cells)} | {chosen(problem, target)} |"
                    )


def gains() -> str:
    """The reference's forward and backward over LoRAFusion's structure, for the sizes that it was published for."""
    found = []
    for size in (4096, 5120, 8192):
        forward = problem_of((8192, size, size, 16))
        plain, fused = (
            sum(predict_us(form, p, TARGETS["sm_90"]) for p in (forward, forward.adjoint()))
            for form in ("reference", "lorafusion")
        )
        found.append(f"{plain / fused:.2f}")
    return ", ".join(found)


def quantised() -> Iterator[str]:
    """The forward over an NF4 weight: decoded in the loop, decoded before, and over a dense weight."""
    yield "| chip | M, K, N, R | frozen, dense W | ours, dense W | nf4: chosen | nf4: two_kernel | of it decoding |"
    yield "|---|---|---|---|---|---|---|"
    for name in ("sm_90", "sm_80"):
        target = TARGETS[name]
        for M in (1, 16, 64, 512, 4096):
            dense = problem_of((M, 4096, 4096, 16))
            packed = replace(dense, weight_format="nf4")
            ours, best = (fastest(predict(each, target)) for each in (dense, packed))
            assert ours is not None and best is not None
            before, product = (predict_us("two_kernel", each, target) for each in (packed, dense))
            cells = (
                f"{predict_us('frozen', dense, target):.1f}",
                f"{ours.predicted_us:.1f} {ours.name}",
                f"{best.predicted_us:.1f} {best.name}",
                f"{before:.1f}",
                f"{before - product:.1f}",
            )
            yield f"| {target.chip} | {M}, 4096, 4096, 16 | {' | '.join(cells)} |"


QUANTISED = [
    "## A quantised weight",
    "",
    "Microseconds of a forward, bfloat16. For many rows a kernel decodes W into a dense copy in memory that all layers",
    "share, and the product reads it. Counted in the emulator (`tests/executed/test_dequantise.py`): half a byte of codes",
    "is read and each element written once, in whole sectors. Assumed: 0.9 of the copy bandwidth, float32 scales, and that",
    "the product finds nothing of the copy in L2. The copy is the same for every M, so this assumption decides only up to",
    "some hundred rows. For at most 64 rows W is decoded in the loop of `decode`: the codes are read once, a quarter of the",
    "bytes. Its instructions decide, not its bytes: 16 an element, 26 for more than 16 rows, counted in the machine code;",
    "assumed is that four are issued in every clock. The bytes alone would allow 3.5 us on H100 for M = 1.",
    "",
]


def plot(file: Path) -> None:
    """Forward and backward of the larger shapes on every chip of the tables, from zero."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 8), layout="constrained", sharey=True)
    shapes, width = LARGE, 0.12
    forms = ("reference", "addmm", "eager", "lorafusion", "two_kernel")
    for axis, name in zip(axes.flat, CHIPS, strict=True):
        target = TARGETS[name]
        prices: dict[str, list[float]] = {form: [] for form in (*forms, BEST, "taken")}
        errors: list[tuple[float, float]] = []
        for shape in shapes:
            both = (problem_of(shape), problem_of(shape).adjoint())
            frozen = sum(predict_us("frozen", problem, target) for problem in both)
            for form in forms:
                prices[form].append(sum(times(p, target)[form] for p in both) / frozen)
            own = [best_of_ours(p, target) for p in both]
            middle = sum(c.predicted_us or 0.0 for c in own)
            least, most = (
                sum(c.predicted_range[end] for c in own if c.predicted_range) for end in (0, 1)
            )
            prices[BEST].append(middle / frozen)
            errors.append(((middle - least) / frozen, (most - middle) / frozen))
            # What a call takes: each direction by the algorithm that is chosen for it.
            taken = sum(times(p, target)[chosen(p, target)] for p in both)
            prices["taken"].append(taken / frozen)
        for i, (form, found) in enumerate(prices.items()):
            at = [x + (i - 3) * width for x in range(len(shapes))]
            colour = {"taken": "black", BEST: "#00796b"}.get(form)
            bars = {"yerr": list(zip(*errors, strict=True)), "capsize": 2} if form == BEST else {}
            label = TITLES.get(form, "ours: what is chosen without `tune`")
            axis.bar(at, found, width, label=label, color=colour, **bars)
        axis.axhline(1.0, color="grey", linewidth=1, linestyle="--")
        axis.set_xticks(range(len(shapes)), ["\n".join(map(str, s)) for s in shapes], fontsize=8)
        axis.set(title=f"{target.chip} ({name}): predicted, not measured", xlabel="M, K, N, R")
    for axis in axes[:, 0]:
        axis.set_ylabel("forward + backward over the frozen layer")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def best_of_ours(problem: Problem, target: Target) -> Candidate:
    """Our product that is predicted fastest, also one that only `tune` can choose."""
    apart = ("eager", "cuda_decode") + (*ONE_LAUNCH, "one_pass", "decode") * problem.backward
    own = [c for c in predict(problem, target) if c.name not in apart]
    return min(own, key=lambda c: c.predicted_us or 0.0)


def chosen(problem: Problem, target: Target) -> str:
    """The algorithm that the cost model chooses."""
    best = fastest(predict(problem, target))
    assert best is not None
    return best.name


def loops() -> Iterator[str]:
    """The main loop of the fused kernel against that of the plain product, from the machine code."""
    from tests.compiled.test_compiled import compile_job, plain_product

    yield "| target | tile | direction | loop: instructions, of them matrix | plain product | registers | plain |"
    yield "|---|---|---|---|---|---|---|"
    problem = problem_of((4096, 4096, 4096, 16))
    for name in sorted(CHIPS):
        for config in tiles_of("expand", problem, TARGETS[name]):
            for form in ("forward", "forward, PEFT's b", "dx")[:: 1 if config.tma else 2]:
                forward = form != "dx"
                job = problem, config, forward, form == "forward, PEFT's b"
                fused = compile_job(name, job)
                plain = plain_product(name, config, problem, forward)
                yield (
                    f"| {name} | {str(config).removeprefix('expand ')} | {form} | "
                    f"{fused.loop.total()}, {len(fused.loop_matrix)} | {plain.loop.total()}, {len(plain.loop_matrix)} | "
                    f"{fused.registers} | {plain.registers} |"
                )


def pipes() -> Iterator[str]:
    """The counted cycles of one block of each tile, and what they make of its rate at K = 4096."""
    cycles = "step: matrix, shared, issue, L2 | once, R = 16 | once, R = 64"
    yield f"| target | tile | direction | {cycles} | matrix share, R = 16 | R = 64 |"
    yield "|---|---|---|---|---|---|---|---|"
    problem = problem_of((4096, 4096, 4096, 16))
    for tile, ((step, rest), (_, rest_wide)) in TABLE.items():
        if tile.types != "bfloat16" or tile.config.kernel == "one_pass":
            continue
        name = str(tile.config).removeprefix("expand ")
        cells = (", ".join(f"{c:.0f}" for c in pipe) for pipe in (step, rest, rest_wide))
        shares = (full_rate(tile, replace(problem, R=R), TARGETS[tile.target]) for R in RANKS)
        yield (
            f"| {tile.target} | {name} | {'forward' if tile.forward else 'dx'} | "
            f"{' | '.join(cells)} | {' | '.join(f'{share:.2f}' for share in shares)} |"
        )


def count() -> None:
    """Writes the table of lora_kernels/tuning/cycles.json anew."""
    import triton

    from lora_kernels.tuning import cycles
    from tests.executed.recount import counted_tiles, recount

    rows = {
        tile: tuple(recount(config, problem, tile.target, R) for R in RANKS)
        for tile, (config, problem) in counted_tiles().items()
    }
    cycles.write(cycles.FILE, triton.__version__, rows)
    print(f"wrote {len(rows)} tiles into {cycles.FILE}")


def decode_table() -> Iterator[str]:
    """The CUDA C++ kernel against the time that reading W alone takes."""
    yield "| chip | M, K, N, R | reading W alone, us | cuda_decode | decode | eager | reference |"
    yield "|---|---|---|---|---|---|---|"
    for name in ("sm_80", "sm_90"):
        target = TARGETS[name]
        for shape in (
            (1, 4096, 4096, 16),
            (16, 4096, 4096, 16),
            (1, 4096, 14336, 16),
            (32, 4096, 14336, 32),
        ):
            problem = problem_of(shape)
            found = times(problem, target)
            floor = 2 * problem.K * problem.N / (target.bandwidth_gbs * 1e3)
            row = (found[form] for form in ("decode", "eager", "reference"))
            own = predict_us("cuda_decode", problem, target)
            cells = " | ".join(f"{us:.1f}" for us in (own, *row))
            yield f"| {target.chip} | {', '.join(map(str, shape))} | {floor:.1f} | {cells} |"


def adapters_from_l2() -> str:
    """What readings of A cost the CUDA C++ kernel."""
    problem = problem_of((1, 4096, 14336, 32))
    each = problem.K * problem.R * problem.itemsize
    share = {}
    for target in TARGETS.values():
        if target.name.startswith("sm_"):
            readers = cuda_decode_blocks(problem.N // CUDA_DECODE_COLUMNS, target.multiprocessors)
            reading_us = readers * each / (target.l2_gbs * 1e3)
            share[target.chip] = reading_us / predict_us("frozen", problem, target)
    least, most = min(share, key=share.__getitem__), max(share, key=share.__getitem__)
    return (
        "A block keeps x·A of its first column tile for its others, and there are at most as many blocks along the columns "
        "as multiprocessors: none reads a byte of A twice, and together they read A from L2 at most once a multiprocessor. "
        f"For {problem.K} x {problem.N} at R = 32, the most that is computed on the way, this takes L2 from "
        f"{share[least]:.2f} ({least}) to {share[most]:.2f} ({most}) of the time that W takes to arrive from memory, and it "
        "runs beside it. The model leaves out that W itself and x, M/64 of W's bytes, pass through L2 too."
    )


def page(with_code: bool = True) -> str:
    """docs/performance/gpu-predicted.md; what comes from the machine code is its end."""
    lines = [
        "# GPUs: predicted, not measured",
        "",
        "One chip was [measured](gpu-measured.md), an H200: the model was off by at most 6 % for large products, and 18 to",
        "38 % too low for few rows. No chip below was. Where a device's bandwidth is known the model has that one's in",
        "place of the chip's here. The tables follow from the",
        "[cost model](../../lora_kernels/tuning/cost.py) with the reference chips of",
        "[targets.py](../../lora_kernels/tuning/targets.py), and from the compiled code, as `benchmarks/predicted.py` wrote",
        "them. bfloat16; each figure is a multiple of the frozen layer's own predicted time. Backward: dx, dA and dB over",
        "the frozen layer's dx. `reference` is the formula, one operation after the other; `addmm` adds the low-rank",
        "product onto x·W in place; `eager` is our backend of plain ATen, which writes s·B + bias and accumulates x·W",
        "onto it. `LoRAFusion-style` is its structure with our tiles: x·A, then the product with s·B from pointer loads,",
        "nothing running beside it; where there are no tensor descriptors our `two_kernel` is the same. All is without",
        "dropout: with it `tail_first` takes the place of `eager`, the same formula with the masks of our kernels.",
        "",
        "![predicted price of LoRA over the frozen layer](gpu-predicted.png)",
        *(line for name in CHIPS for line in tables(name)),
        "",
        "On B200 and RTX 5090 `two_kernel` is predicted to be slower than ATen for nearly every larger shape: the call",
        "takes `eager` there, as wherever it is predicted fastest, and `explain` says so. The rates of the tiles",
        "are counted from their compiled code. One number of each architecture is not: what a loop bound by its matrix pipe",
        "reaches of the vendor's library. It is a range of published figures, below; these tables have its middle. What",
        "LoRAFusion publishes, 1.27 times faster than the reference on average and 1.39 at most, was not used: for its",
        "square layers (M = 8192; K = N = 4096, 5120, 8192; R = 16; H100) the model gives "
        + gains()
        + ".",
        "",
        "At rank 256 the low-rank kernels read x twice, once for each 128 ranks; that L2 has it the second time is assumed.",
        "Their products then take as long as reading x from memory does, the library's as well.",
        "",
        "## Ranges: what is assumed of our loops",
        "",
        *textwrap.wrap(RANGES_TEXT, 120),
        "",
        *ranges(),
        "",
        "## Groups of rows: experts, and several adapters in one batch",
        "",
        *textwrap.wrap(GROUPED_TEXT, 120),
        "",
        *grouped_table(),
        "",
        *QUANTISED,
        *quantised(),
        "",
        "## Cycles of one block by pipe, counted from the compiled code",
        "",
        "Counted in the emulator, and divided by the pipe's rate per multiprocessor and clock, as in",
        "[cycles.py](../../lora_kernels/tuning/cycles.json): for a step of block_k terms, and once for start, rank tail and",
        "stores. The matrix share is that of the product's own cycles in those of the busiest pipe, with K = 4096; of two",
        "blocks that share a multiprocessor (at most 128x128) one's end runs beside the other's loop, as where tensor",
        "memory has two accumulators. A block of two CTAs has the cycles of each one's multiprocessor.",
        "",
        *pipes(),
    ]
    if with_code:
        lines += ["", "## The main loop, from the machine code", "", *loops()]
    return "\n".join(lines) + "\n"


def decode_page() -> str:
    """docs/performance/cuda-decode.md."""
    lines = [
        "# The CUDA C++ kernel for small batches: predicted, not measured",
        "",
        "For at most 32 rows the time is that of reading W. The kernel reads W once with 16-byte loads, x once for each 64",
        "columns, A once for each block, and stores y once (counted in the emulator by",
        "`tests/executed/test_cuda_decode.py`). Halves with an nn.Linear's weight get x·A on the way where R is at most 32;",
        "elsewhere, in a backward for instance, x·A is a launch of the same kernel before it and A is read once in all.",
        "Splits of K are summed in index order by the last block to arrive.",
        "",
        "An H200 took [2.8 to 3.4 times the frozen layer's time](gpu-measured.md#few-rows) for 4096 x 4096, far more than",
        "the model says, which knows bytes alone: a step's loads stood apart in the machine code. They stand side by side",
        "now, not measured again, and a call takes this kernel only where `tune` has timed it.",
        "",
        *decode_table(),
        "",
        *textwrap.wrap(adapters_from_l2(), 120),
        "",
        "It compiles for sm_80, 86, 90, 100 and 120 without spills: `tests/test_cuda_extension.py`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-code", action="store_true", help="only what the cost model says")
    parser.add_argument(
        "--count", action="store_true", help="only count the cycles of each tile again"
    )
    args = parser.parse_args()
    if args.count:
        return count()
    FOLDER.mkdir(exist_ok=True)
    plot(FOLDER / "gpu-predicted.png")
    (FOLDER / "gpu-predicted.md").write_text(page(not args.no_code))
    (FOLDER / "cuda-decode.md").write_text(decode_page())
    print(f"wrote {FOLDER / 'gpu-predicted.md'}, its plot, and cuda-decode.md")


if __name__ == "__main__":
    main()
