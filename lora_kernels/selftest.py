"""A backend proves itself on the device it is to run on: a few small problems, forward and every gradient, against float64.

On a GPU this happens before a backend's first use on a new device, driver, Triton or package version; the verdict is kept
in the cache folder. A backend that fails is not used there, and `explain` says why. The test has a process of its own: an
illegal access makes every later call of its process fail, and a kernel may never end. Where no such process can be started,
or it cannot open the device (which this process may have for itself), there is no verdict: the backend is not used.
`python -m lora_kernels selftest`, run while the device is free, keeps one, or a new one after a failure.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing.spawn import get_executable
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels import backends, env, formulas
from lora_kernels.ahead import compile_ahead
from lora_kernels.backends.base import Backend, Products, fastest
from lora_kernels.backends.composite import PRODUCTS as COMPOSITE
from lora_kernels.backends.device import current_target
from lora_kernels.dropout import Dropout, scaled_mask
from lora_kernels.formulas import Needs
from lora_kernels.once import once
from lora_kernels.operands import Adapter, Groups, QuantizedWeight
from lora_kernels.problem import DENSE, Problem
from lora_kernels.samples import SAMPLES, sample

_EVERY = Needs(True, False, True, True, False)
_SIZES = ((1, 48, 64, 8), (33, 65, 47, 12), (130, 136, 264, 16), (70, 40, 24, 72))  # M, N, K, R
# With whole blocks of NF4 in a row, which a kernel for few rows decodes itself, and without.
_PACKED_SIZES = ((5, 72, 128, 8), (70, 33, 50, 8))
_GROUPED_SIZES = ((70, 136, 72, 12, 4), (40, 48, 64, 16, 1))  # M, N, K, R, weights
_GROUPS = 4
_DTYPES = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
)


@dataclass(frozen=True)
class Result:
    """One tensor of one problem: its largest error from float64, and the largest that was allowed."""

    problem: Problem
    tensor: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    def __str__(self) -> str:
        verdict = "is within" if self.passed else "is off by more than"
        return f"{self.tensor} {verdict} {self.allowed:.1e} (error {self.error:.1e}) for {self.problem}"


def run(backend: Backend, device: torch.device | str) -> list[Result]:
    """y, dx, dA and dB of every self-test problem that `backend` does not refuse, on `device`.

    Allowed is twice what eager PyTorch is off in the same types, plus two roundings of the largest number.
    """
    device = torch.device(device)
    problems = [*_problems(backend, device)]
    compile_ahead((partial(list, _check(backend, problem, device)) for problem in problems), device)
    return [result for problem in problems for result in _check(backend, problem, device)]


LIMIT = 600.0  # seconds for a backend's test, most of which its kernels are compiled
_MARK = "lora_kernels self-test: "  # before the answers of a process, which may print more
_BEGINS = "begins"
_PROGRAM = """
import sys
sys.path[:] = [folder for folder in sys.path if folder]
import json
sys.path[:], package, folder, name, index, uuid = json.loads(sys.argv[1])
import importlib.util
# By its file, as the package may have been loaded from a folder that is on no path.
file = folder + "/__init__.py"
spec = importlib.util.spec_from_file_location(package, file, submodule_search_locations=[folder])
sys.modules[package] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[package])
importlib.import_module(package + ".selftest").answer(name, index, uuid)
"""


class NoVerdictError(RuntimeError):
    """The backend could not be tested: it may be right or wrong."""


def trusted(backend: Backend, device: torch.device) -> str | None:
    """None when `backend` passed its self-test on this device, else why it must not be used.

    Where no verdict is kept, the test runs now, in a process of its own.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _verdict(backend, _fingerprint(backend.name, index), index)


@once
def _verdict(backend: Backend, fingerprint: str, index: int) -> str | None:
    file = _file(fingerprint)
    try:
        known = json.loads(file.read_text())
        if known["fingerprint"] == fingerprint:
            return known["failure"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        failure = _failure_elsewhere(backend.name, index)
    except NoVerdictError as error:
        failure = (
            f"its self-test needs a process of its own, and {error}; "
            "run `python -m lora_kernels selftest` once, while the device is free"
        )
    else:
        _write(file, fingerprint, failure)
    if failure is not None:
        env.logger().warning("the %s backend is not used on this device: %s", backend.name, failure)
    return failure


def keep(backend: Backend, index: int, failure: str | None) -> None:
    """Write down what a self-test in this process found, for later processes."""
    fingerprint = _fingerprint(backend.name, index)
    _write(_file(fingerprint), fingerprint, failure)


def _failure_elsewhere(name: str, index: int) -> str | None:
    """What the self-test found wrong in a new process, or None. NoVerdictError where it could not be made."""
    python = os.fsdecode(get_executable() or "")  # what multiprocessing.set_executable can change
    if not python or (getattr(sys, "frozen", False) and python == sys.executable):
        raise NoVerdictError("this program has no Python interpreter to start")
    package = [__package__, str(Path(__file__).resolve().parent)]
    asked = json.dumps([list(map(str, sys.path)), *package, name, index, _uuid(index)])
    env.logger().info("the %s backend is tested on device %d, for the first time", name, index)
    try:
        code, output, errors = _run_apart([python, "-c", _PROGRAM, asked], LIMIT)
    except OSError as error:
        raise NoVerdictError(f"none could be started: {error}") from error
    answers = [line.removeprefix(_MARK) for line in output.splitlines() if line.startswith(_MARK)]
    last = (errors.strip().splitlines() or ["it printed nothing"])[-1]
    ended = f"did not end within {LIMIT:g} s" if code is None else f"ended with {_told(code)}"
    if not answers:
        raise NoVerdictError(f"one {ended} before the test began: {last}")
    if code != 0 or answers[-1] == _BEGINS:
        return f"its self-test {ended}: {last}"
    verdict = json.loads(answers[-1])
    if verdict["unable"] is not None:
        raise NoVerdictError(f"one cannot use the device: {verdict['unable']}")
    return verdict["failure"]


def _run_apart(command: list[str], limit: float) -> tuple[int | None, str, str]:
    """(exit code, stdout, stderr) of `command`; the code is None where it did not end within `limit` seconds."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # In a session of its own, so that compilers it has started end with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            if code is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)  # a driver may hold it: then it is left behind
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
        return code, texts[0], texts[1]


def _told(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def answer(name: str, index: int, uuid: str | None) -> None:
    """Test the backend `name` on the device with this `uuid`, probably `index`, and print the answer: in its own process."""
    failure = unable = None
    try:
        device = torch.device("cuda", _index_of(uuid, index))
        torch.zeros(1, device=device).item()
    except Exception as error:
        unable = _first_line(error)
    else:
        print(f"\n{_MARK}{_BEGINS}", flush=True)
        try:
            backend = backends.get(name)
            unable = backend.unavailable()
            failure = None if unable else _failure(backend, device)
        except torch.OutOfMemoryError as error:
            unable = _first_line(error)
    print(f"\n{_MARK}{json.dumps({'failure': failure, 'unable': unable})}", flush=True)


def _uuid(index: int) -> str | None:
    """The device's UUID, which is the same under every CUDA_VISIBLE_DEVICES."""
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return None if uuid is None else str(uuid)


def _index_of(uuid: str | None, index: int) -> int:
    """The device called `uuid`, probably `index`; RuntimeError if this process has none."""
    count = torch.cuda.device_count()
    for candidate in (index, *range(count)):
        if candidate < count and _uuid(candidate) == uuid:
            return candidate
    raise RuntimeError(f"there is no device {index} with uuid {uuid} among {count}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _failure(backend: Backend, device: torch.device) -> str | None:
    """What the self-test found wrong, or None. OutOfMemoryError is raised: it is no verdict on the backend."""
    try:
        results = run(backend, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel on an unknown device may fail in any way
        return f"its self-test raised {_first_line(error)}"
    return failure_of(results)


def failure_of(results: list[Result]) -> str | None:
    """What is wrong with a self-test's results, or None."""
    failed = [result for result in results if not result.passed]
    if failed:
        return f"its self-test failed {len(failed)} of {len(results)} checks; {failed[0]}"
    return None if results else "it refuses every problem of its self-test"


def _fingerprint(name: str, index: int) -> str:
    device = torch.cuda.get_device_properties(index)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    versions = driver, torch.__version__, _version("triton"), _version("lora-kernels")
    return "|".join(map(str, (name, device.name, device.major, device.minor, *versions)))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _file(fingerprint: str) -> Path:
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:20]
    return env.cache_dir() / "selftest" / f"{digest}.json"


def _write(file: Path, fingerprint: str, failure: str | None) -> None:
    """Keep a verdict; where the cache cannot be written the next process tests again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "w") as out:
            json.dump({"fingerprint": fingerprint, "failure": failure}, out)
        os.replace(scratch, file)
    except OSError:
        env.logger().info("%s cannot be written", file)


def _problems(backend: Backend, device: torch.device) -> Iterator[Problem]:
    """Each type with every size; and each format of a weight that the backend reads, with few rows and with many."""
    for weight_format in sorted(SAMPLES.keys() & set(backend.formats)):
        for types in _DTYPES:
            for sizes in _PACKED_SIZES:
                yield Problem(*sizes, *types, device.type, weight_format=weight_format)
    for types in _DTYPES:
        for i, sizes in enumerate(_SIZES):
            yield Problem(*sizes, *types, device.type, bias=i % 2 == 0, dropout=i == 2)
        for M, N, K, R, weights in _GROUPED_SIZES:
            own = {"bias": True, "dropout": weights == 1, "groups": _GROUPS, "weights": weights}
            yield Problem(M, N, K, R, *types, device.type, **own)  # type: ignore[arg-type]


def _check(backend: Backend, problem: Problem, device: torch.device) -> Iterator[Result]:
    if problem.groups and not backend.groups:
        return
    target = current_target(device) if device.type == "cuda" else None
    own = [fastest(backend.candidates(each, target)) for each in (problem, problem.adjoint())]
    if None in own:
        return
    dtype, adapter_dtype = getattr(torch, problem.dtype), getattr(torch, problem.adapter_dtype)
    generator = torch.Generator().manual_seed(problem.M)

    def normal(*shape: int, over: int = 1, to: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (values / max(over, 1) ** 0.5).to(to).to(device)

    M, N, K, R = problem.M, problem.N, problem.K, problem.R
    stack = (problem.groups,) if problem.groups else ()
    own_weight = problem.weights > 1
    base = stack if own_weight else ()
    x, weight = normal(M, K), normal(*base, N, K, over=K)
    packed = None
    if problem.weight_format != DENSE:
        packed = sample(problem.weight_format, N, K, dtype, device)
        weight = packed.dense()
    A = normal(*stack, K, R, over=K, to=adapter_dtype)
    B = normal(*stack, R, N, over=R, to=adapter_dtype)
    bias = normal(*base, N) if problem.bias else None
    dy = normal(M, N)
    bounds = [0, 0, 1, M // 2, M]  # none, one, some
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    groups = Groups(offsets, own_weight, own_weight) if problem.groups else None
    dropout = Dropout(0.25, torch.tensor(2024, device=device)) if problem.dropout else None
    operands = (x, weight, A, B, bias, dy)
    forward, backward = (candidate.products for candidate in own if candidate is not None)
    assert forward is not None and backward is not None
    bound = forward.bound(groups), backward.bound(groups)
    actual = _results(*bound, operands, dropout, packed)
    doubles = tuple(t if t is None else t.double() for t in operands)
    composite = COMPOSITE.bound(groups)
    exact = _results(composite, composite, doubles, dropout)
    eager = _reference(operands, dropout, bounds if problem.groups else None)
    for name, value in exact.items():
        eps = torch.finfo(eager[name].dtype).eps
        allowed = 2 * _distance(eager[name], value) + 2 * eps * max(1.0, value.abs().max().item())
        yield Result(problem, name, _distance(actual[name], value), allowed)


def _results(
    forward: Products,
    backward: Products,
    operands: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    packed: QuantizedWeight | None = None,
) -> dict[str, Tensor]:
    """y, dx, dA and dB; `packed` is read instead of the weight among the operands, which is its dense copy."""
    x, dense, A, B, bias, dy = operands
    assert (
        x is not None and dense is not None and A is not None and B is not None and dy is not None
    )
    weight = packed or dense
    adapter = Adapter(A, B, 0.75, dropout)
    y, s = formulas.forward(forward, x, weight, adapter, bias)
    saved = formulas.keep(_EVERY, x, weight, A, B, s)
    dx, _, dA, dB, _ = formulas.backward(backward, dy, saved, _EVERY, adapter, A.dtype)
    assert dx is not None and dA is not None and dB is not None
    return {"y": y, "dx": dx, "dA": dA, "dB": dB}


def _reference(
    operands: tuple[Tensor | None, ...], dropout: Dropout | None, bounds: list[int] | None
) -> dict[str, Tensor]:
    """The same by autograd on one PyTorch operation after the other, in the operands' own types; group after group."""
    x, weight, A, B = (t.detach().requires_grad_() for t in operands[:4] if t is not None)
    bias, dy = operands[4:]
    mask = 1.0 if dropout is None else scaled_mask(dropout, x.shape[0], x.shape[1], x.dtype)
    masked = (x * mask).to(A.dtype)

    def layer(rows: slice, w: Tensor, a: Tensor, b: Tensor, own_bias: Tensor | None) -> Tensor:
        y = torch.nn.functional.linear(x[rows], w, own_bias)
        return y + (0.75 * (masked[rows] @ a @ b)).to(y.dtype)

    if bounds is None:
        y = layer(slice(None), weight, A, B, bias)
    else:
        parts = []
        for g, (begin, end) in enumerate(pairwise(bounds)):
            base = (weight, bias) if weight.ndim == 2 else (weight[g], bias[g])  # type: ignore[index]
            parts.append(layer(slice(begin, end), base[0], A[g], B[g], base[1]))
        y = torch.cat(parts)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), dy)
    return {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}


def _distance(t: Tensor, exact: Tensor) -> float:
    return (t.double() - exact).abs().max().item()
