"""The commands of `python -m lora_kernels`: `add_arguments` and `run`, which returns the exit code."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

LARGEST = 2**63 - 1  # what PyTorch counts a tensor's elements with


def say(text: str) -> None:
    """Prints to standard error, at once: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def device_of(device: str | None) -> str:
    """`device`, or by default "cuda" where there is a GPU. RuntimeError where it is "cuda" and there is no GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda needs a GPU that PyTorch can use, and there is none")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_sizes(sizes: list[int] | tuple[int, ...], least: int) -> None:
    """ValueError unless M, K, N and R are at least `least` and their tensors can exist."""
    M, K, N, R = sizes
    if min(sizes) < least:
        rule = "not negative" if least == 0 else "positive"
        raise ValueError(f"--shape must be four sizes that are {rule}, got {M} {K} {N} {R}")
    if max(*sizes, M * K, K * N, M * N, R * max(M, K, N)) > LARGEST:
        raise ValueError(
            f"--shape must make tensors of at most 2^63 - 1 elements, got {M} {K} {N} {R}"
        )


def check_output(path: Path | None, is_file: bool, option: str = "--output") -> None:
    """Makes the folder that results will go to. ValueError where they cannot be written: before anything is measured."""
    if path is None:
        return
    rule = f"{option} must be a {'file' if is_file else 'folder'} that can be written, got {path}"
    if is_file and path.is_dir():
        raise ValueError(f"{rule}: it is a folder")
    if is_file and path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{rule}: it may not be changed")
    folder = path.parent if is_file else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{rule}: {error.strerror or error}") from error
