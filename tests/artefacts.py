"""What tests compile, kept in build/tests under a digest of all that decides it, for other tests, workers and runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "tests"


def digest(*parts: str | bytes | Path) -> str:
    """A name for these texts; of a path the file's content counts."""
    total = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part
        content = content.encode() if isinstance(content, str) else content
        total.update(f"{len(content)} ".encode() + content)
    return total.hexdigest()[:24]


def sources(*folders: str) -> Iterable[Path]:
    """The Python files of these folders of the repository."""
    return (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """The file `name` in build/tests; where there is none, `make` writes it. Other workers wait for the one that makes it.

    `name` must hold a digest of whatever decides the content. What fails leaves nothing.
    """
    file = FOLDER / name
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(file.name + ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not file.exists():
            scratch = file.with_name(f"{os.getpid()}.{file.name}")
            try:
                make(scratch)
                scratch.replace(file)
            finally:
                scratch.unlink(missing_ok=True)
    return file
