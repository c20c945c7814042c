"""Builds the compiled extensions of lora_kernels where a compiler is; everything else is in pyproject.toml.

LORA_KERNELS_BUILD says which: "auto" (the default) builds what this machine can and says in one message what it left out,
"none" builds nothing, "cpu", "cuda" or "cpu,cuda" build those or fail. Use pip's --no-build-isolation, so that the
extensions are built against the torch that will load them.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NAMES = ("cpu", "cuda")


def requested(value):
    """(names to build, whether each of them must succeed) for a value of LORA_KERNELS_BUILD."""
    value = value.strip().lower() or "auto"
    if value in ("auto", "none"):
        return (NAMES if value == "auto" else ()), False
    names = tuple(name.strip() for name in value.split(","))
    if not set(names) <= set(NAMES):
        raise ValueError(
            f'LORA_KERNELS_BUILD must be auto, none, cpu, cuda or "cpu,cuda", got {value!r}'
        )
    return names, True


def missing(name, auto):
    """What this machine lacks to build the extension `name`, or None. `auto` asks for a use of it as well."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed here (is --no-build-isolation missing?)"
    if name == "cpu":
        compiler = os.environ.get("CXX") or "c++"
        return (
            None if shutil.which(compiler.split()[0]) else f"there is no C++ compiler ({compiler})"
        )
    if shutil.which("nvcc") is None:
        return "there is no nvcc"
    import torch

    return "this torch has no CUDA" if auto and torch.version.cuda is None else None


class Build(build_ext):
    """Builds each requested extension; one that fails stops the installation only when it was named."""

    def run(self):
        names, must = requested(os.environ.get("LORA_KERNELS_BUILD", "auto"))
        # What an earlier wheel left in the build folder is no part of this one.
        for name in () if self.inplace else NAMES:
            self.destination(name).unlink(missing_ok=True)
        left_out = []
        for name in names:
            reason = missing(name, auto=not must)
            if reason is None:
                try:
                    getattr(self, f"build_{name}")()
                except (Exception, SystemExit) as error:
                    if must:
                        raise
                    reason = f"its build failed: {error}"
            if reason is not None:
                if must:
                    raise RuntimeError(
                        f"LORA_KERNELS_BUILD asks for the {name} extension, but {reason}"
                    )
                left_out.append(f"{name}: {reason}")
        if left_out:
            print("lora_kernels is installed without " + "; ".join(left_out), file=sys.stderr)

    def get_outputs(self):
        return []  # what is built decides itself in run

    def get_output_mapping(self):
        return {}

    def destination(self, name):
        """Where the library of extension `name` belongs: in the package, or in the wheel being made."""
        folder = ROOT / "lora_kernels" if self.inplace else Path(self.build_lib) / "lora_kernels"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"_{name}.so"

    def build_cpu(self):
        from torch.utils import cpp_extension

        sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
        if not sources:
            raise FileNotFoundError("csrc/cpu holds no sources")
        extension = cpp_extension.CppExtension(
            "lora_kernels._cpu", sources, extra_compile_args=["-O3", "-g0", "-fopenmp", "-w"]
        )
        build = cpp_extension.BuildExtension(
            Distribution({"ext_modules": [extension]}),
            use_ninja=shutil.which("ninja") is not None,
            no_python_abi_suffix=True,
        )
        build.build_temp, build.build_lib = self.build_temp, str(Path(self.build_temp) / "lib")
        build.ensure_finalized()
        build.run()
        # Moved into place: a process that has the old library loaded keeps it.
        made, to = Path(build.build_lib) / "lora_kernels/_cpu.so", self.destination("cpu")
        shutil.copy(made, to.with_suffix(".new"))
        os.replace(to.with_suffix(".new"), to)

    def build_cuda(self):
        spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc/cuda/build.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.build(self.destination("cuda"))


# The listed extension makes setuptools run build_ext and tag the wheel for this platform; Build decides what is built.
SOURCES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*/*.*"))]
setup(
    ext_modules=[Extension("lora_kernels._native", [], depends=SOURCES)],
    cmdclass={"build_ext": Build},
)
