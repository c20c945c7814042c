"""The table of counted cycles is what the compiled code counts."""

from __future__ import annotations

import pytest
import triton

from lora_kernels.backends.triton import configs
from lora_kernels.tuning.cycles import COUNTED, TABLE, TRITON, Row
from tests.executed.recount import counted_tiles, recount

pytestmark = pytest.mark.slow
PARTS = 6  # of a target's tiles, for test processes beside each other


def test_the_table_has_the_shipped_tiles_and_no_other():
    shipped = [t for t in TABLE if t.config.kernel != "persistent" or configs.untried() is None]
    assert list(counted_tiles()) == shipped


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("target", COUNTED)
def test_the_table_is_what_the_compiled_code_counts(target, part):
    """Exactly, with the Triton whose code was counted; with another, the busiest pipe of each step in half types.

    `python benchmarks/predicted.py --count` after a change of a kernel, a tile or the compiler.
    """
    exactly = triton.__version__ == TRITON
    drifted = {}
    tiles = [each for each in counted_tiles().items() if each[0].target == target]
    for tile, (config, problem) in tiles[part::PARTS]:
        if exactly or tile.types == "bfloat16":
            row, known = recount(config, problem, target), TABLE[tile]
            if not (row == known if exactly else busiest(row) == pytest.approx(busiest(known))):
                drifted[tile] = row
    assert len(tiles) >= PARTS and not drifted


def busiest(row: Row) -> list[float]:
    return [max(step) for step, _ in row]
