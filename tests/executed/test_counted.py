"""The table of counted cycles is what the compiled code counts."""

from __future__ import annotations

import pytest
import triton

from lora_kernels.tuning.counted import COUNTED, TABLE, TRITON
from tests.executed.recount import counted_tiles, recount


def test_the_table_has_the_shipped_tiles_and_no_other():
    assert list(counted_tiles()) == list(TABLE)


@pytest.mark.skipif(triton.__version__ != TRITON, reason=f"the code of Triton {TRITON} was counted")
@pytest.mark.parametrize("target", COUNTED)
def test_the_table_is_what_the_compiled_code_counts(target):
    """Exactly. `python benchmarks/predicted.py --count` after a change of a kernel, a tile or the compiler."""
    drifted = {
        tile: row
        for tile, (config, problem) in counted_tiles().items()
        if tile.target == target and (row := recount(config, problem, target)) != TABLE.get(tile)
    }
    assert not drifted
