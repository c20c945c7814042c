"""Compiles the CUDA extension with nvcc: against any torch, a CPU-only one too, as it uses the stable ABI alone.

As a program: for this machine's GPU alone, in the checkout's package.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SOURCES = ("bindings.cu", "launch.cu")
ARCHITECTURES = ("80", "86", "90", "100", "120")  # sm_86 code is sm_89's too
PTX = "80"  # no kernel uses an instruction that came after it
_HERE = Path(__file__).resolve().parent


def build(
    output: Path,
    *,
    archs: Sequence[str] = ARCHITECTURES,
    more: Sequence[str] = (),
) -> str:
    """Write the shared library `output` for the compute capabilities `archs` ("80", ...); returns what nvcc printed.

    The code of all is assembled from one PTX, for 8.0, which is included: a driver compiles it for every newer GPU without
    code of its own, such as 11.0. `more` are further sources and options.
    FileNotFoundError without nvcc; RuntimeError with nvcc's own words when it fails.
    """
    import torch

    root = Path(torch.__file__).parent
    # A torch with CUDA has the stream in a library of its own, which only a weak symbol asks for.
    libraries = [
        name
        for name in ("torch", "torch_cpu", "torch_cuda")
        if (root / f"lib/lib{name}.so").exists()
    ]
    codes = [f"compute_{PTX}", *(f"sm_{arch}" for arch in archs)]
    command = [
        nvcc(),
        "-std=c++20",
        "-O3",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",  # 2.10, the oldest that is supported
        f"-I{root / 'include'}",
        f"-gencode=arch=compute_{PTX},code=[{','.join(codes)}]",
        "-Xcompiler=-fPIC",
        "-Xptxas=-v",
        "-shared",
        f"-L{root / 'lib'}",
        "-Xlinker=--no-as-needed",
        *(f"-l{name}" for name in libraries),
        "--threads=0",
        *(str(_HERE / name) for name in SOURCES),
        *more,
        "-o",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def nvcc() -> str:
    """The compiler on the PATH; FileNotFoundError if there is none."""
    found = shutil.which("nvcc")
    if found is None:
        raise FileNotFoundError("nvcc must be on the PATH to build the CUDA extension")
    return found


if __name__ == "__main__":
    import torch

    capability = "".join(map(str, torch.cuda.get_device_capability()))
    print(build(_HERE.parents[1] / "lora_kernels/_cuda.so", archs=[capability]))
