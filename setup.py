"""Builds the compiled extensions of lora_kernels where a compiler is; everything else is in pyproject.toml.

LORA_KERNELS_BUILD says which: "auto" (the default) builds what this machine can and says in one message what it left out,
"none" builds nothing, "cpu", "cuda" or "cpu,cuda" build those or fail. Use pip's --no-build-isolation, so that the
extensions are built against the torch that will load them.

LORA_KERNELS_PREBUILT names a folder of cpu libraries that were built elsewhere, one for each minor version of torch, such
as _cpu-torch2.13.so: the wheel takes them all, and the one of the torch that is there is loaded.
"""

import importlib.util
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
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
    if name == "cpu" and (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"it is for Linux x86_64, this is {platform.system()} {platform.machine()}"
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
        for library in () if self.inplace else libraries(self.build_lib):
            library.unlink()
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
        if os.environ.get("LORA_KERNELS_PREBUILT"):
            self.take(Path(os.environ["LORA_KERNELS_PREBUILT"]))
        if left_out:
            print("lora_kernels is installed without " + "; ".join(left_out), file=sys.stderr)

    def take(self, folder):
        """Copy the libraries of `folder`, which must be named as they are looked for."""
        found = sorted(folder.glob("*.so"))
        names = [library.name for library in found]
        if not found or not all(re.fullmatch(r"_cpu-torch\d+\.\d+\.so", name) for name in names):
            raise RuntimeError(
                f"LORA_KERNELS_PREBUILT must be a folder of libraries named _cpu-torchX.Y.so, got {folder} with {names}"
            )
        for library in found:
            shutil.copy(library, self.destination("cpu").with_name(library.name))

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


def libraries(root):
    """The compiled libraries of the package below `root`."""
    return sorted((Path(root) / "lora_kernels").glob("_*.so"))


class Wheel(bdist_wheel):
    """Tags the wheel by what its build made: a library is of this platform and of no Python, without one it is for all."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2] if self._libraries() else "any"

    def write_wheelfile(self, *args, **options):
        # Only here: what is installed lies where an extension would.
        self.root_is_pure = not self._libraries()
        super().write_wheelfile(*args, **options)

    def _libraries(self):
        return libraries(self.get_finalized_command("build").build_lib)


# The listed extension makes setuptools run build_ext; Build decides what is built.
SOURCES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/*/*.*"))]
setup(
    ext_modules=[Extension("lora_kernels._native", [], depends=SOURCES)],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
