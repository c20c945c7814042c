"""Cycles for which one block of each shipped tile occupies the pipes of a multiprocessor, counted from its compiled code.

The emulator of tests/ptx executes a block at two depths. Their difference is what a step of block_k terms takes; what is
left is taken once: the start, the rank tail, the stores. Counts become cycles by the rates of one multiprocessor and clock:

matrix   FLOPs by the data sheets, accumulated in float32; tf32 at half the rate. float32 is counted as it is without
         leave to round to tf32: exact, in the fma pipe
shared   128 bytes: wavefronts of threads' accesses, and what copies write and matrix instructions read by themselves
issue    4 instructions of a warp, as PTX has them
l2       64 bytes, the port of a multiprocessor. The slices together deliver less (5.5 TB/s on an H100: 24 bytes), but the
         blocks that run at one time ask for the same tiles, whose requests are merged on the way: at 24 bytes no product
         with tiles of 128x256 could pass half of the peak, and published ones reach nine tenths

`python benchmarks/predicted.py --count` writes TABLE anew; tests/executed/test_counted.py compares it with the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from lora_kernels.problem import Problem
from lora_kernels.tuning.config import TileConfig

PIPES = ("matrix", "shared", "issue", "l2")
COUNTED = ("sm_80", "sm_90", "sm_100", "sm_120")
TRITON = "3.9.0"  # whose code was counted; 3.6's differs in half types by instructions that are not what holds a step up
SHARED_BYTES, INSTRUCTIONS, L2_BYTES = 128, 4, 64
# bfloat16 and float16 FLOPs of the matrix unit, and float32 FLOPs of the fma pipe, per multiprocessor and clock.
_MATRIX_FLOPS = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192, "sm_120": 512}
_FMA_FLOPS = {"sm_80": 128, "sm_90": 256, "sm_100": 256, "sm_120": 256}
# Targets whose code is not executed take the counts of one that has the same rates per multiprocessor and clock.
_LIKE = {"sm_86": "sm_120", "sm_89": "sm_120", "gfx942": "sm_80", "gfx1100": "sm_120"}
_HALF = ("float16", "bfloat16")  # with the same counts
RANKS = (16, 64)  # at which TABLE was counted; between and beyond, a line through both


class Tile(NamedTuple):
    """Names a row of TABLE; `types` is x's dtype, and A's where the loop reads A and A is wider.

    `forward`: w is stored [N, K], a [K, R] and b [R, N]; all the other way round for dx.
    """

    target: str
    types: str
    kernel: str
    forward: bool
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool

    @classmethod
    def of(cls, config: TileConfig, problem: Problem, target: str) -> Tile:
        return cls(
            *_rows(config.kernel, problem, target),
            config.block_m,
            config.block_n,
            config.block_k,
            config.num_warps,
            config.num_stages,
            config.tma,
        )


@dataclass(frozen=True)
class Cycles:
    """Of one block, for each of PIPES: `step` for every block_k terms of the sum, `rest` once."""

    step: tuple[float, ...]
    rest: tuple[float, ...]

    def block(self, steps: int, overlapped: bool) -> float:
        """The busiest pipe's cycles; `overlapped`: another block's loop runs beside what this one does once."""
        if overlapped:
            return max(s * steps + r for s, r in zip(self.step, self.rest, strict=True))
        return max(self.step) * steps + max(self.rest)


def flops_per_clock(target: str, dtype: str) -> int:
    """Of one multiprocessor, for a product in `dtype`."""
    rates = _FMA_FLOPS if dtype in ("float32", "float64") else _MATRIX_FLOPS
    return rates[_LIKE.get(target, target)]


def tiles(kernel: str, problem: Problem, target: str) -> list[Tile]:
    """The counted tiles of `kernel` for `problem`'s types and layout."""
    return [tile for tile in TABLE if tile[:4] == _rows(kernel, problem, target)]


def cycles(tile: Tile, R: int) -> Cycles:
    """Of `tile` at rank R. A tile that is not in TABLE takes the counts of the one nearest in area:

    shared memory and L2 scaled by block_m + block_n, the rest by block_m·block_n, a step also by block_k.
    """
    known = TABLE.get(tile)
    if known is None:
        return _scaled(tile, R)
    share = (max(R, RANKS[0]) - RANKS[0]) / (RANKS[1] - RANKS[0])
    (step, rest), (step_wide, rest_wide) = known
    return Cycles(_between(step, step_wide, share), _between(rest, rest_wide, share))


def _between(at: tuple[float, ...], wide: tuple[float, ...], share: float) -> tuple[float, ...]:
    return tuple(a + share * (b - a) for a, b in zip(at, wide, strict=True))


def _scaled(tile: Tile, R: int) -> Cycles:
    size = tile.block_m * tile.block_n
    same = [t for t in TABLE if t[:4] == tile[:4]]
    near = min(same, key=lambda t: (abs(math.log(t.block_m * t.block_n / size)), t.tma != tile.tma))
    known = cycles(near, R)
    depth = tile.block_k / near.block_k
    area = size / (near.block_m * near.block_n)
    edge = (tile.block_m + tile.block_n) / (near.block_m + near.block_n)
    step = zip(known.step, (area, edge, area, edge), strict=True)
    return Cycles(tuple(s * depth * by for s, by in step), tuple(r * area for r in known.rest))


def _rows(kernel: str, problem: Problem, target: str) -> tuple[str, str, str, bool]:
    """What Tile starts with."""
    half, adapter_half = (t in _HALF for t in (problem.dtype, problem.adapter_dtype))
    wide_adapters = kernel == "one_pass" and half and not adapter_half
    types = "bfloat16, float32" if wide_adapters else "bfloat16" if half else "float32"
    return _LIKE.get(target, target), types, kernel, problem.w_k_major


# At each of RANKS: cycles of PIPES for a step, and once.
Row = tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
TABLE: dict[Tile, Row] = {
    Tile("sm_80", "bfloat16", "expand", True, 128, 128, 32, 4, 4, False): (
        ((512, 384, 216, 256), (512, 1312, 1048, 704)),
        ((512, 384, 216, 256), (2048, 2432, 1612, 1280)),
    ),
    Tile("sm_80", "bfloat16", "expand", True, 64, 128, 64, 4, 3, False): (
        ((512, 576, 232, 384), (256, 960, 753, 384)),
        ((512, 576, 232, 384), (1024, 1632, 1097, 768)),
    ),
    Tile("sm_80", "bfloat16", "expand", False, 128, 128, 32, 4, 4, False): (
        ((512, 384, 210, 256), (512, 1312, 1054, 704)),
        ((512, 384, 210, 256), (2048, 2432, 1601, 1280)),
    ),
    Tile("sm_80", "bfloat16", "expand", False, 64, 128, 64, 4, 3, False): (
        ((512, 576, 222, 384), (256, 960, 752, 384)),
        ((512, 576, 222, 384), (1024, 1632, 1088, 768)),
    ),
    Tile("sm_80", "bfloat16", "one_pass", True, 64, 128, 32, 4, 3, False): (
        ((288, 424, 130, 208), (256, 1264, 711, 384)),
        ((384, 736, 253, 448), (1024, 2128, 1209, 768)),
    ),
    Tile("sm_80", "bfloat16", "one_pass", False, 64, 128, 32, 4, 3, False): (
        ((288, 424, 145, 208), (256, 1264, 806, 384)),
        ((384, 736, 265, 448), (1024, 2128, 1319, 768)),
    ),
    Tile("sm_80", "bfloat16, float32", "one_pass", True, 64, 128, 32, 4, 3, False): (
        ((448, 528, 284, 224), (256, 1376, 797, 448)),
        ((1024, 1152, 881, 512), (1024, 2528, 1298, 1024)),
    ),
    Tile("sm_80", "bfloat16, float32", "one_pass", False, 64, 128, 32, 4, 3, False): (
        ((448, 464, 295, 224), (256, 1376, 804, 448)),
        ((1024, 896, 865, 512), (1024, 2528, 1281, 1024)),
    ),
    Tile("sm_80", "float32", "expand", True, 64, 64, 32, 4, 3, False): (
        ((2048, 5248, 1181, 256), (1024, 1344, 985, 384)),
        ((2048, 5248, 1181, 256), (4096, 3840, 2781, 768)),
    ),
    Tile("sm_80", "float32", "expand", False, 64, 64, 32, 4, 3, False): (
        ((2048, 1664, 1175, 256), (1024, 3136, 988, 384)),
        ((2048, 1664, 1175, 256), (4096, 11008, 2784, 768)),
    ),
    Tile("sm_80", "float32", "one_pass", True, 32, 32, 32, 4, 2, False): (
        ((768, 3152, 520, 160), (256, 512, 451, 128)),
        ((1536, 4832, 1153, 448), (1024, 1808, 1129, 320)),
    ),
    Tile("sm_80", "float32", "one_pass", False, 32, 32, 32, 4, 2, False): (
        ((768, 3152, 526, 160), (256, 1408, 445, 128)),
        ((1536, 10208, 1102, 448), (1024, 5392, 1114, 320)),
    ),
    Tile("sm_90", "bfloat16", "expand", True, 128, 256, 64, 8, 3, True): (
        ((1024, 1024, 174, 768), (512, 5504, 1528, 1280)),
        ((1024, 1024, 174, 768), (2048, 18944, 2134, 2048)),
    ),
    Tile("sm_90", "bfloat16", "expand", True, 128, 256, 64, 8, 3, False): (
        ((1024, 1024, 252, 768), (512, 6272, 1830, 1280)),
        ((1024, 1024, 252, 768), (2048, 19968, 2380, 2048)),
    ),
    Tile("sm_90", "bfloat16", "expand", True, 128, 128, 64, 8, 3, True): (
        ((512, 640, 168, 512), (256, 1792, 988, 704)),
        ((512, 640, 168, 512), (1024, 5632, 1384, 1280)),
    ),
    Tile("sm_90", "bfloat16", "expand", True, 128, 128, 64, 8, 3, False): (
        ((512, 640, 210, 512), (256, 2304, 1170, 704)),
        ((512, 640, 210, 512), (1024, 6400, 1548, 1280)),
    ),
    Tile("sm_90", "bfloat16", "expand", True, 64, 128, 64, 4, 3, True): (
        ((256, 384, 82, 384), (128, 1408, 518, 384)),
        ((256, 384, 82, 384), (512, 4864, 800, 768)),
    ),
    Tile("sm_90", "bfloat16", "expand", True, 64, 128, 64, 4, 3, False): (
        ((256, 384, 121, 384), (128, 1792, 669, 384)),
        ((256, 384, 121, 384), (512, 5376, 942, 768)),
    ),
    Tile("sm_90", "bfloat16", "expand", False, 128, 256, 64, 8, 3, True): (
        ((1024, 1024, 172, 768), (512, 1536, 1526, 1280)),
        ((1024, 1024, 172, 768), (2048, 3584, 2086, 2048)),
    ),
    Tile("sm_90", "bfloat16", "expand", False, 128, 256, 64, 8, 3, False): (
        ((1024, 1024, 236, 768), (512, 2304, 1812, 1280)),
        ((1024, 1024, 236, 768), (2048, 4608, 2304, 2048)),
    ),
    Tile("sm_90", "bfloat16", "expand", False, 128, 128, 64, 8, 3, True): (
        ((512, 640, 166, 512), (256, 832, 984, 704)),
        ((512, 640, 166, 512), (1024, 2048, 1356, 1280)),
    ),
    Tile("sm_90", "bfloat16", "expand", False, 128, 128, 64, 8, 3, False): (
        ((512, 640, 202, 512), (256, 1344, 1176, 704)),
        ((512, 640, 202, 512), (1024, 2816, 1502, 1280)),
    ),
    Tile("sm_90", "bfloat16", "expand", False, 64, 128, 64, 4, 3, True): (
        ((256, 384, 84, 384), (128, 448, 517, 384)),
        ((256, 384, 84, 384), (512, 1280, 778, 768)),
    ),
    Tile("sm_90", "bfloat16", "expand", False, 64, 128, 64, 4, 3, False): (
        ((256, 384, 114, 384), (128, 832, 662, 384)),
        ((256, 384, 114, 384), (512, 1792, 907, 768)),
    ),
    Tile("sm_90", "bfloat16", "one_pass", True, 128, 128, 64, 8, 3, False): (
        ((576, 816, 292, 544), (256, 2336, 1430, 704)),
        ((768, 1216, 460, 896), (1024, 6208, 2230, 1280)),
    ),
    Tile("sm_90", "bfloat16", "one_pass", False, 128, 128, 64, 8, 3, False): (
        ((576, 816, 330, 544), (256, 1376, 1468, 704)),
        ((768, 1216, 486, 896), (1024, 2368, 2208, 1280)),
    ),
    Tile("sm_90", "bfloat16, float32", "one_pass", True, 128, 128, 64, 8, 3, False): (
        ((896, 1280, 892, 576), (256, 2368, 1722, 768)),
        ((2048, 3200, 1840, 1024), (1024, 6272, 2508, 1536)),
    ),
    Tile("sm_90", "bfloat16, float32", "one_pass", False, 128, 128, 64, 8, 3, False): (
        ((896, 1216, 918, 576), (256, 1408, 1714, 768)),
        ((2048, 2432, 1812, 1024), (1024, 2432, 2470, 1536)),
    ),
    Tile("sm_90", "float32", "expand", True, 64, 64, 32, 4, 3, False): (
        ((1024, 8704, 1331, 256), (512, 1728, 1058, 384)),
        ((1024, 8704, 1331, 256), (2048, 4608, 2979, 768)),
    ),
    Tile("sm_90", "float32", "expand", False, 64, 64, 32, 4, 3, False): (
        ((1024, 2048, 1274, 256), (512, 5056, 1098, 384)),
        ((1024, 2048, 1274, 256), (2048, 17920, 3084, 768)),
    ),
    Tile("sm_90", "float32", "one_pass", True, 32, 32, 32, 4, 2, False): (
        ((384, 5632, 618, 160), (128, 704, 493, 128)),
        ((768, 5664, 1138, 320), (512, 2144, 1183, 320)),
    ),
    Tile("sm_90", "float32", "one_pass", False, 32, 32, 32, 4, 2, False): (
        ((384, 3712, 621, 160), (128, 2240, 504, 128)),
        ((768, 8096, 1133, 320), (512, 7008, 1193, 320)),
    ),
    Tile("sm_100", "bfloat16", "expand", True, 128, 256, 64, 8, 3, True): (
        ((512, 768, 115.5, 768), (256, 5384, 1272.75, 1280)),
        ((512, 768, 115.5, 768), (1024, 18440, 1836.25, 2048)),
    ),
    Tile("sm_100", "bfloat16", "expand", True, 128, 256, 64, 8, 3, False): (
        ((512, 768, 195.75, 768), (256, 6152, 1568.75, 1280)),
        ((512, 768, 195.75, 768), (1024, 19464, 2078.25, 2048)),
    ),
    Tile("sm_100", "bfloat16", "expand", True, 128, 128, 64, 4, 3, True): (
        ((256, 512, 60.25, 512), (128, 1732, 659, 704)),
        ((256, 512, 60.25, 512), (512, 5380, 981.5, 1280)),
    ),
    Tile("sm_100", "bfloat16", "expand", True, 128, 128, 64, 4, 3, False): (
        ((256, 512, 121.25, 512), (128, 2244, 876.25, 704)),
        ((256, 512, 121.25, 512), (512, 6148, 1176.75, 1280)),
    ),
    Tile("sm_100", "bfloat16", "expand", False, 128, 256, 64, 8, 3, True): (
        ((512, 768, 117.75, 768), (256, 1416, 1262.75, 1280)),
        ((512, 768, 117.75, 768), (1024, 3080, 1790.25, 2048)),
    ),
    Tile("sm_100", "bfloat16", "expand", False, 128, 256, 64, 8, 3, False): (
        ((512, 768, 162, 768), (256, 2184, 1562.75, 1280)),
        ((512, 768, 162, 768), (1024, 4104, 2012.25, 2048)),
    ),
    Tile("sm_100", "bfloat16", "expand", False, 128, 128, 64, 4, 3, True): (
        ((256, 512, 61.5, 512), (128, 772, 656.25, 704)),
        ((256, 512, 61.5, 512), (512, 1796, 957.75, 1280)),
    ),
    Tile("sm_100", "bfloat16", "expand", False, 128, 128, 64, 4, 3, False): (
        ((256, 512, 101.5, 512), (128, 1284, 854.25, 704)),
        ((256, 512, 101.5, 512), (512, 2564, 1126.75, 1280)),
    ),
    Tile("sm_100", "bfloat16", "one_pass", True, 128, 128, 64, 8, 3, False): (
        ((288, 672, 214, 544), (128, 2280, 1287.25, 704)),
        ((384, 1024, 344.25, 896), (512, 5960, 1787.5, 1280)),
    ),
    Tile("sm_100", "bfloat16", "one_pass", False, 128, 128, 64, 8, 3, False): (
        ((288, 672, 248, 544), (128, 1320, 1321.25, 704)),
        ((384, 1024, 366.25, 896), (512, 2120, 1763.5, 1280)),
    ),
    Tile("sm_100", "bfloat16, float32", "one_pass", True, 128, 128, 64, 8, 3, False): (
        ((448, 928, 641.5, 576), (128, 2280, 1546.75, 768)),
        ((1024, 3200, 1488.5, 1024), (512, 5960, 2227, 1536)),
    ),
    Tile("sm_100", "bfloat16, float32", "one_pass", False, 128, 128, 64, 8, 3, False): (
        ((448, 864, 667.75, 576), (128, 1320, 1494.75, 768)),
        ((1024, 2432, 1476.75, 1024), (512, 2120, 2157, 1536)),
    ),
    Tile("sm_100", "float32", "expand", True, 64, 64, 32, 4, 3, False): (
        ((1024, 8704, 1557, 256), (512, 1728, 1194, 384)),
        ((1024, 8704, 1557, 256), (2048, 4608, 3278, 768)),
    ),
    Tile("sm_100", "float32", "expand", False, 64, 64, 32, 4, 3, False): (
        ((1024, 2048, 1439, 256), (512, 5056, 1297, 384)),
        ((1024, 2048, 1439, 256), (2048, 17920, 3505, 768)),
    ),
    Tile("sm_100", "float32", "one_pass", True, 32, 32, 32, 4, 2, False): (
        ((384, 5440, 740, 160), (128, 704, 582, 128)),
        ((768, 5664, 1329, 320), (512, 2144, 1372, 320)),
    ),
    Tile("sm_100", "float32", "one_pass", False, 32, 32, 32, 4, 2, False): (
        ((384, 3712, 749, 160), (128, 2240, 610, 128)),
        ((768, 8096, 1341, 320), (512, 7008, 1416, 320)),
    ),
    Tile("sm_120", "bfloat16", "expand", True, 128, 128, 32, 4, 3, False): (
        ((2048, 384, 143, 256), (2048, 1056, 959, 704)),
        ((2048, 384, 143, 256), (8192, 2176, 1522, 1280)),
    ),
    Tile("sm_120", "bfloat16", "expand", True, 64, 64, 64, 4, 3, False): (
        ((1024, 384, 114, 256), (512, 528, 480, 224)),
        ((1024, 384, 114, 256), (2048, 960, 728, 512)),
    ),
    Tile("sm_120", "bfloat16", "expand", False, 128, 128, 32, 4, 3, False): (
        ((2048, 384, 141, 256), (2048, 1056, 842, 704)),
        ((2048, 384, 141, 256), (8192, 2176, 1522, 1280)),
    ),
    Tile("sm_120", "bfloat16", "expand", False, 64, 64, 64, 4, 3, False): (
        ((1024, 384, 110, 256), (512, 528, 486, 224)),
        ((1024, 384, 110, 256), (2048, 960, 726, 512)),
    ),
    Tile("sm_120", "bfloat16", "one_pass", True, 64, 64, 32, 4, 2, False): (
        ((640, 264, 72, 144), (512, 664, 535, 224)),
        ((1024, 576, 195, 384), (2048, 1288, 946, 512)),
    ),
    Tile("sm_120", "bfloat16", "one_pass", False, 64, 64, 32, 4, 2, False): (
        ((640, 264, 81, 144), (512, 664, 593, 224)),
        ((1024, 576, 201, 384), (2048, 1288, 1016, 512)),
    ),
    Tile("sm_120", "bfloat16, float32", "one_pass", True, 64, 64, 32, 4, 2, False): (
        ((1280, 368, 226, 160), (512, 752, 575, 256)),
        ((3584, 992, 823, 448), (2048, 1616, 1001, 640)),
    ),
    Tile("sm_120", "bfloat16, float32", "one_pass", False, 64, 64, 32, 4, 2, False): (
        ((1280, 304, 227, 160), (512, 752, 589, 256)),
        ((3584, 736, 797, 448), (2048, 1616, 991, 640)),
    ),
    Tile("sm_120", "float32", "expand", True, 64, 64, 32, 4, 3, False): (
        ((1024, 8704, 1557, 256), (512, 1728, 1194, 384)),
        ((1024, 8704, 1557, 256), (2048, 4608, 3278, 768)),
    ),
    Tile("sm_120", "float32", "expand", False, 64, 64, 32, 4, 3, False): (
        ((1024, 2048, 1439, 256), (512, 5056, 1297, 384)),
        ((1024, 2048, 1439, 256), (2048, 17920, 3505, 768)),
    ),
    Tile("sm_120", "float32", "one_pass", True, 32, 32, 32, 4, 2, False): (
        ((384, 5440, 740, 160), (128, 704, 582, 128)),
        ((768, 7792, 1511, 448), (512, 2576, 1632, 320)),
    ),
    Tile("sm_120", "float32", "one_pass", False, 32, 32, 32, 4, 2, False): (
        ((384, 3712, 749, 160), (128, 2240, 610, 128)),
        ((768, 11632, 1583, 448), (512, 8720, 1735, 320)),
    ),
}
