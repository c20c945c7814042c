"""The table of counted cycles is what the compiled code counts."""

from __future__ import annotations

import pytest
import triton

from lora_kernels.backends.triton import configs
from lora_kernels.tuning.cycles import COUNTED, RANKS, TABLE, TRITON
from tests.executed.recount import counted_tiles, recount

pytestmark = pytest.mark.slow
PARTS = 5  # of a target's tiles, for test processes beside each other


def test_the_table_has_the_shipped_tiles_and_no_other():
    shipped = [t for t in TABLE if t.config.kernel != "persistent" or configs.untried() is None]
    assert list(counted_tiles()) == shipped


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("target", COUNTED)
def test_the_table_is_what_the_compiled_code_counts(target, part):
    """Each tile at one of its two ranks, in turn.

    Exactly, with the Triton whose code was counted; with another, the busiest pipe of a step in half types.
    `python benchmarks/predicted.py --count` after a change of a kernel, a tile or the compiler.
    """
    exactly = triton.__version__ == TRITON
    drifted = {}
    tiles = [each for each in counted_tiles().items() if each[0].target == target]
    for number, (tile, (config, problem)) in list(enumerate(tiles))[part::PARTS]:
        if exactly or tile.types == "bfloat16":
            at = number % len(RANKS)
            found, known = recount(config, problem, target, RANKS[at]), TABLE[tile][at]
            step, known_step = found[0], known[0]
            if not (found == known if exactly else max(step) == pytest.approx(max(known_step))):
                drifted[tile] = found
    assert len(tiles) >= PARTS and not drifted
