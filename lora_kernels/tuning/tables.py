"""Tuned tables: what `tune` measured on a device, as JSON in the user's cache, read when a problem of it is chosen.

A file belongs to one chip and is a list of entries {"problem": {...}, "times": {"decode": 12.3, ...}, "configs": [...]}.
An entry that this version cannot read or that breaks `fits` is left out; a file that is no such list counts as absent.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_kernels import env
from lora_kernels.problem import DENSE, Problem
from lora_kernels.tuning.config import LOWRANK_KERNELS, TileConfig, fits
from lora_kernels.tuning.cost import ALGORITHMS, predict_us
from lora_kernels.tuning.targets import Target

VERSION = 5
# Of M; larger problems are like the largest.
BUCKETS = (16, 32, 64, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Entry:
    """The measurements of `problem`, whose M is a bucket: microseconds of each algorithm that works, and the best tiles.

    The entry of a problem without a weight, N = 0, has the low-rank kernels' times and tiles.
    """

    problem: Problem
    times: dict[str, float] = field(hash=False)
    configs: tuple[TileConfig, ...]


def path(target: Target) -> Path:
    """The file of a target's chip; it may not exist."""
    chip = re.sub(r"[^a-z0-9]+", "-", target.chip.lower())
    return env.cache_dir() / f"tuned-{target.name}-{chip}-v{VERSION}.json"


def bucket(M: int) -> int:
    """The smallest bucket that holds M, or the largest bucket."""
    return next((b for b in BUCKETS if b >= M), BUCKETS[-1])


def bucketed(problem: Problem) -> Problem:
    """The problem that stands for all of the same bucket: a bias changes no choice.

    Over groups, for which no table has entries, buckets go on: many rows may still be few in each group.
    """
    M = bucket(problem.M)
    if problem.groups:
        M = max(M, 1 << (problem.M - 1).bit_length())
    return replace(problem, M=M, bias=False)


def lowrank(problem: Problem) -> Problem:
    """The problem of the kernels that read the problem's x and no weight, which `tune` times without dropout."""
    return replace(without_weight(problem), bias=False, dropout=False)


def without_weight(problem: Problem) -> Problem:
    """The problem of the kernels that read the problem's x alone: the same for every weight."""
    return replace(problem, N=0, w_k_major=True, backward=False, weight_format=DENSE)


def lookup(problem: Problem, target: Target) -> Entry | None:
    """The entry of the problem's bucket, or None."""
    return load(path(target), target).get(_key(bucketed(problem)))


def times_of(algorithm: str, problem: Problem, target: Target) -> tuple[float | None, float]:
    """(measured, predicted) microseconds of an algorithm that has no tile."""
    entry = lookup(problem, target)
    measured_us = None if entry is None else entry.times.get(algorithm)
    return measured_us, predict_us(algorithm, bucketed(problem), target)


def load(file: Path, target: Target) -> dict[Problem, Entry]:
    """The valid entries of a file, by problem; read again only when the file has changed."""
    try:
        changed = file.stat().st_mtime_ns
    except OSError:
        return {}
    return _load(file, changed, target)


def save(entries: list[Entry], target: Target) -> Path:
    """Add `entries` to the target's file, replacing those of the same problems; written aside and moved into place."""
    file = path(target)
    merged = {**load(file, target), **{_key(entry.problem): entry for entry in entries}}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(entry) for entry in merged.values()], indent=1)
    handle, scratch = tempfile.mkstemp(dir=file.parent, suffix=".json")
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text)
        os.replace(scratch, file)
    except BaseException:
        os.unlink(scratch)
        raise
    return file


@functools.lru_cache(maxsize=16)
def _load(file: Path, changed: int, target: Target) -> dict[Problem, Entry]:
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError):
        raw = None
    if not isinstance(raw, list):
        env.logger().warning("%s is no tuned table and is not used", file)
        return {}
    entries = (_from_json(item, target) for item in raw)
    return {_key(entry.problem): entry for entry in entries if entry is not None}


def _key(problem: Problem) -> Problem:
    """The problem as a key: what decides a choice, so without its bias, device type and direction."""
    return replace(problem, bias=False, device="cuda", backward=False)


def _from_json(item: Any, target: Target) -> Entry | None:
    try:
        problem = Problem(**item["problem"])
        configs = tuple(TileConfig(**config) for config in item["configs"])
        times = {str(name): float(us) for name, us in item["times"].items()}
        unfit = any(fits(config, problem, target) for config in configs)
        hash((problem, configs))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    known = times.keys() <= {*ALGORITHMS, *LOWRANK_KERNELS} and all(us > 0 for us in times.values())
    return Entry(problem, times, configs) if known and not unfit else None
