"""Numbers of each GPU architecture: what the cost model and the limits of a configuration read.

Shared memory and registers are an architecture's own limits (CUDA C++ programming guide, compute capabilities; AMD CDNA3
and RDNA3 ISA guides). Rates are those of the named reference chip: dense tensor-core peak and memory bandwidth from its
data sheet, times the share of it that a plain matrix product and a plain copy are known to reach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

KIB = 1024
# Of the peak bandwidth, what a copy reaches: measured, an H200's 4.24 of 4.92 TB/s.
COPY_SHARE = 0.87
_RATES = ("l2_gbs", "half_tflops", "tf32_tflops", "float32_tflops")


@dataclass(frozen=True)
class Target:
    """One architecture: `name` is "sm_90" or "gfx942", `chip` the reference chip whose rates these are."""

    name: str
    chip: str
    smem_bytes: int  # shared memory that one block may use
    registers: int  # of one thread, before it spills
    multiprocessors: int
    bandwidth_gbs: float  # achievable copy bandwidth, 1e9 bytes a second
    l2_gbs: float  # L2 to multiprocessors
    half_tflops: float  # achievable, bfloat16 and float16 with float32 accumulation
    tf32_tflops: float
    float32_tflops: float
    # The least and the most of the library's rate that a loop bound by its matrix pipe reaches.
    reaches: tuple[float, float]
    gap_us: float = 1.5  # between dependent launches
    tma: bool = False
    warp_size: int = 32
    tmem_columns: int = 0  # tensor memory, 0 where accumulators are registers

    def of_chip(self, chip: str, multiprocessors: int, peak_gbs: float) -> Target:
        """The target of another chip of this architecture: so many multiprocessors, and a memory of that peak bandwidth.

        Its rates are this one's for each multiprocessor. `peak_gbs` of 0 is not known: then the bandwidth is this one's too.
        """
        share = multiprocessors / self.multiprocessors
        bandwidth_gbs = COPY_SHARE * peak_gbs or self.bandwidth_gbs
        rates = {name: share * getattr(self, name) for name in _RATES}
        made = {"chip": chip, "multiprocessors": multiprocessors, "bandwidth_gbs": bandwidth_gbs}
        return replace(self, **made, **rates)  # type: ignore[arg-type]

    def tflops(self, dtype: str) -> float:
        """The achievable rate of a product in `dtype`, 1e12 operations a second."""
        return self.half_tflops if dtype in ("float16", "bfloat16") else self.float32_tflops


# name, chip, smem, regs, SMs, GB/s, L2 GB/s, half, tf32, float32, reaches. What is published of the last: A100 0.89 to 0.99
# from 2500 (triton #6523, #7085); H100 0.99 to 1.02 without a tail for K >= 1024 (Triton's Gluon tutorial 07), 0.95 with one
# (lorafusion #8); B200 0.94 to 1.01 by pairs of CTAs (tutorial 14), and a plain Triton loop 0.54 at 4096, 0.65 at 8192
# (tilelang #1787), most of which are the cycles of its shared memory. The others are estimates.
# fmt: off
TARGETS = {
    t.name: t
    for t in (
        Target("sm_80",   "A100 SXM",    163 * KIB, 255, 108, 1550, 4000, 270,  135, 18,  (0.89, 0.99)),
        Target("sm_86",   "RTX 3090",    99 * KIB,  255, 82,  850,  2200, 70,   35,  30,  (0.88, 0.98)),
        Target("sm_89",   "RTX 4090",    99 * KIB,  255, 128, 920,  4500, 160,  80,  70,  (0.88, 0.98)),
        Target("sm_90",   "H100 SXM",    227 * KIB, 255, 132, 3000, 5500, 798,  400, 55,  (0.95, 1.02), tma=True),
        Target("sm_100",  "B200",        227 * KIB, 255, 148, 7000, 9000, 1650, 800, 70,  (0.94, 1.01), tma=True,
               tmem_columns=512),
        Target("sm_120",  "RTX 5090",    99 * KIB,  255, 170, 1650, 6000, 200,  100, 90,  (0.85, 0.95)),
        Target("gfx942",  "MI300X",      64 * KIB,  512, 304, 4000, 8000, 700,  300, 120, (0.6, 0.8),   4.0, warp_size=64),
        Target("gfx1100", "RX 7900 XTX", 64 * KIB,  256, 96,  860,  3000, 90,   45,  45,  (0.6, 0.8),   4.0),
    )
}
# fmt: on


# What is left where Triton makes no tensor-core code, as Triton 3.6 to 3.9 make none below sm_80.
_INSTEAD = dict.fromkeys(
    ("sm_70", "sm_72", "sm_75"),
    " (plain ATen computes there; its float16 products use the tensor cores, its bfloat16 ones cannot)",
)


def target_of(architecture: str) -> Target:
    """The target of an architecture's name, "sm_90" or "gfx942"; the nearest older one for a name not listed.

    ValueError for an architecture older than every one listed: its tensor cores are not used by these kernels.
    """
    if architecture in TARGETS:
        return TARGETS[architecture]
    kind = "sm_" if architecture.startswith("sm_") else "gfx"
    older = [
        t
        for name, t in TARGETS.items()
        if architecture.startswith(kind)
        and name.startswith(kind)
        and _version(name) <= _version(architecture)
    ]
    if not older:
        raise ValueError(
            f"architecture must be sm_80 or newer, gfx942 or gfx1100, got {architecture!r}"
            + _INSTEAD.get(architecture, "")
        )
    return max(older, key=lambda t: _version(t.name))


def _version(architecture: str) -> int:
    digits = architecture.removeprefix("sm_").removeprefix("gfx").rstrip("abf")
    return int(digits or "0", 16)
