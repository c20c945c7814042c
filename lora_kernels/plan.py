"""The plan of a call: what computes it, with which tiles, and one reason for each backend that does not.

Backends give candidates, and this file compares them. "auto" takes the fastest candidate of what can run, by the rule of
`backends.base.fastest`, in the order of the registry where no times are known. An explicit name never falls back: it
computes or raises. A plan is made from numbers, when the product runs; no device is used before a tensor on it arrives.
Plans are remembered: a table that `tune` writes meanwhile counts for calls that this process has not yet met.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels import backends, env, selftest
from lora_kernels.backends.base import Backend, Candidate, Products, ProjectionProducts, fastest
from lora_kernels.backends.device import current_target
from lora_kernels.operands import Groups, Weight, layout_of, name_of
from lora_kernels.problem import DENSE, Problem
from lora_kernels.tuning.targets import Target

_MOST_PLANS = 4096
# Moved for each element by `QuantizedWeight.dense`, whose operations read and write float32: 22 of nf4, 19 of int8.
_DENSE_BYTES = 20


@dataclass(frozen=True, eq=False)
class _Request:
    """One `use_backend` that is open."""

    asked: tuple[str, bool]  # name, strict


_requests: list[_Request] = []  # the last one counts


@dataclass(frozen=True)
class Plan:
    """What computes `problem` on `device`, with one reason for each backend that does not.

    `candidate` is the chosen algorithm with its products, `compared` are all algorithms that could have been taken,
    `passed_over` has the reason why another algorithm of the chosen backend was not to be compared.
    `dequantises`: the products read no weight of this format and get a dense copy.
    """

    problem: Problem
    device: torch.device
    asked: tuple[str, bool]
    backend: str
    candidate: Candidate
    compared: tuple[Candidate, ...]
    rejected: dict[str, str]
    passed_over: dict[str, str] = field(default_factory=dict)
    algorithm: str | None = None  # the only one that may be taken; None: any
    dequantises: bool = False
    magnitude: bool = False  # of a call with DoRA's magnitude, which `explain` was asked about

    @functools.cached_property
    def products(self) -> Products:
        """The products that compute the problem."""
        return self.candidate.products  # type: ignore[return-value]  # a chosen candidate has them

    @functools.cached_property
    def adjoint(self) -> Plan:
        """The plan of the backward: of dx, and of dA and dB beside it."""
        return make_plan(self.problem.adjoint(), self.device, self.asked, self.algorithm)

    def readable(self, weight: Any) -> Any:
        """A weight, or None, as the products read it: itself, or a dense copy of a format that they do not read."""
        return weight.dense() if self.dequantises and weight is not None else weight

    @property
    def plan(self) -> str:
        """How the chosen backend computes the problem, in a few words; "" where there is one way only."""
        chosen = self.candidate
        steps = [chosen.how] if chosen.how else []
        if self.dequantises:
            steps.insert(0, f"a dense copy of the {self.problem.weight_format} weight")
        if self.magnitude:
            fused = self.products.scales_columns
            steps.append(f"DoRA's scale in {'the same product' if fused else 'a pass of its own'}")
        if self.compared:
            name = "" if chosen.name in (self.backend, "eager") else chosen.name
            steps = [part for part in (name, *steps, _times(self.compared)) if part]
        return ", ".join(steps)

    def __str__(self) -> str:
        """The problem, the choice, and a line for each algorithm beside it and each backend that is not chosen."""
        chosen = f"{self.backend}: chosen" + (f", {self.plan}" if self.plan else "")
        others = (f"{name}: {why}" for name, why in self.rejected.items())
        own = (f"{self.backend}, {name}: {why}" for name, why in self.passed_over.items())
        return "\n".join([str(self.problem), chosen, *own, *others])


@dataclass(frozen=True)
class JointPlan:
    """The plans of projections that read one x, and the products of all; None where each is to be computed for itself."""

    plans: tuple[Plan, ...]
    products: ProjectionProducts | None

    @functools.cached_property
    def adjoint(self) -> ProjectionProducts | None:
        """The products of the backward, likewise."""
        return _together([plan.adjoint for plan in self.plans], trains=True)


@contextmanager
def use_backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Within the block every call that says backend="auto" uses `name`, in every thread of the process.

    Of blocks that are open at one time, of one thread or several, that which was entered last counts.
    `strict` with name "auto" raises RuntimeError where auto would fall back to eager because no faster backend can
    compute the problem. ValueError for an unknown name. Enter it outside of compiled functions.
    """
    check_name(name)
    own = _Request((name, strict))
    _requests.append(own)
    try:
        yield
    finally:
        _requests.remove(own)  # not the last one where blocks of threads overlap


def check_name(name: str, argument: str = "backend") -> None:
    """ValueError unless `name` is "auto" or a backend's name."""
    if name != "auto" and name not in backends.BACKENDS:
        raise ValueError(f"{argument} must be one of {('auto', *backends.BACKENDS)}, got {name!r}")


def plan_call(
    backend: str,
    x: Tensor,
    weight: Weight,
    A: Tensor,
    bias: Tensor | None,
    dropout: bool,
    groups: Groups | None = None,
) -> Plan:
    """The plan of a forward call on x [..., K], weight [N, K] and A [K, R]; kept for the next call like it.

    RuntimeError where an explicit or strict choice cannot compute it.
    """
    N, K = weight.shape if groups is None else weight.shape[-2:]
    M = x.numel() // K if K else x.shape[:-1].numel()
    w_k_major, weight_format = layout_of(weight)
    sizes = M, N, K, A.shape[-1]
    stacks = (0, 1) if groups is None else (groups.count, groups.weights)
    traits = bias is not None, dropout, w_k_major, False, weight_format, *stacks
    return _planned(_asked(backend), x.device, x.dtype, A.dtype, sizes, traits)


def plan_backward(
    backend: str,
    dy: Tensor,
    weight: Weight | None,
    N: int,
    R: int,
    adapter_dtype: torch.dtype,
    dropout: bool,
    groups: Groups | None,
) -> Plan:
    """The plan of a registered operator's backward, which has no plan of its forward; of dx [M, N] for dy [M, K]."""
    M, K = dy.shape
    n_major, weight_format = (True, DENSE) if weight is None else layout_of(weight)
    stacks = (0, 1) if groups is None else (groups.count, groups.weights)
    traits = False, dropout, not n_major, True, weight_format, *stacks
    return _planned(_asked(backend), dy.device, dy.dtype, adapter_dtype, (M, N, K, R), traits)


@functools.lru_cache(maxsize=_MOST_PLANS)
def _planned(
    asked: tuple[str, bool],
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    traits: tuple[Any, ...],
) -> Plan:
    """The plan of the `Problem` that has these fields, in its order: `sizes`, dtypes and device, `traits`."""
    names = name_of(dtype), name_of(adapter_dtype), device.type
    return make_plan(Problem(*sizes, *names, *traits), device, asked)


def plan_projections(
    backend: str,
    x: Tensor,
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dropout: Sequence[bool],
    trains: bool,
) -> JointPlan:
    """The `JointPlan` of a forward call on x [M, K]; kept for the next call like it. `trains`: a backward may follow.

    RuntimeError where an explicit or strict choice cannot compute one of them.
    """
    M, K = x.shape
    each = []
    for w, a, b, p in zip(weights, A, biases, dropout, strict=True):
        traits = b is not None, p, w.stride(1) == 1, False, DENSE, 0, 1
        each.append((a.dtype, (M, w.shape[0], K, a.shape[1]), traits))
    return _planned_together(_asked(backend), x.device, x.dtype, tuple(each), trains)


@functools.lru_cache(maxsize=_MOST_PLANS)
def _planned_together(
    asked: tuple[str, bool],
    device: torch.device,
    dtype: torch.dtype,
    each: tuple[tuple[Any, ...], ...],
    trains: bool,
) -> JointPlan:
    """The `JointPlan` of projections, of which `each` has what `_planned` takes after `dtype`."""
    plans = tuple(_planned(asked, device, dtype, *one) for one in each)
    return JointPlan(plans, _together(plans, trains))


def _together(plans: Sequence[Plan], trains: bool) -> ProjectionProducts | None:
    if len({plan.backend for plan in plans}) > 1 or any(plan.problem.empty for plan in plans):
        return None
    each = [(plan.problem, plan.products) for plan in plans]
    return plans[0].products.together(each, trains)


def forget() -> None:
    """Forget every plan: the next call of each kind makes a new one."""
    _planned.cache_clear()
    _planned_together.cache_clear()


def explain(problem: Problem, backend: str = "auto", algorithm: str | None = None) -> Plan:
    """The plan of `problem` on its device; `algorithm` leaves one algorithm of the backend to choose from.

    ValueError for an unknown name of a backend, RuntimeError where a choice cannot compute the problem.
    """
    check_name(backend)
    try:
        device = torch.device(problem.device)
    except RuntimeError:
        raise ValueError(f"device must be a torch device type, got {problem.device!r}") from None
    return make_plan(problem, device, _asked(backend), algorithm)


def predict(problem: Problem, target: Target) -> list[Candidate]:
    """The candidates that a machine with this GPU and every GPU backend would compare."""
    every = map(backends.get, backends.BACKENDS)
    able = (each for each in every if each.groups or not problem.groups)
    on_gpu = (each for each in able if _runs_on(each, torch.device("cuda")))
    offered = [each for backend in on_gpu for each in _candidates(backend, problem, target)]
    return [candidate for candidate in offered if candidate.refusal is None]


def _candidates(backend: Backend, problem: Problem, target: Target | None) -> list[Candidate]:
    """The backend's candidates for `problem`, with the time of the dense copy that it may need."""
    offered = backend.candidates(problem, target)
    if problem.weight_format in backend.formats:
        return offered
    return [_after_dequantising(candidate, problem, target) for candidate in offered]


def make_plan(
    problem: Problem, device: torch.device, asked: tuple[str, bool], algorithm: str | None = None
) -> Plan:
    """The plan of `problem`, made anew: compares every backend's candidates on the operands' own device."""
    indexed = device.type == "cuda" and device.index is not None
    with torch.cuda.device(device) if indexed else nullcontext():
        return _plan(problem, device, asked, algorithm)


def _plan(
    problem: Problem, device: torch.device, asked: tuple[str, bool], algorithm: str | None
) -> Plan:
    name, strict = asked
    refused: dict[str, str] = {}
    offered: dict[str, list[Candidate]] = {}
    target = _target(device)
    for each in backends.BACKENDS if name == "auto" else (name,):
        reason, candidates = _offers(backends.get(each), problem, device, target, algorithm)
        if reason is None:
            offered[each] = candidates
        else:
            refused[each] = reason
    if name != "auto" and not offered:
        raise RuntimeError(
            f"backend {name!r} was asked for and cannot compute {problem}: {refused[name]}"
        )
    if strict and name == "auto" and offered.keys() == {"eager"}:
        reasons = [
            f"{each} cannot compute {problem}: {why}"
            for each, why in refused.items()
            if _runs_on(backends.get(each), device)
        ]
        if reasons:
            raise RuntimeError(f"strict: {'; '.join(reasons)}")
    compared = [candidate for candidates in offered.values() for candidate in candidates]
    chosen = fastest(compared)
    assert chosen is not None  # each list of `offered` has one that can
    backend = next(each for each, candidates in offered.items() if chosen in candidates)
    rejected = {}
    for each in backends.BACKENDS:
        if name not in ("auto", each):
            rejected[each] = f"{name} was asked for"
        elif each != backend:
            rejected[each] = refused.get(each) or _why_not(offered[each], chosen, backend)
    own = [candidate for candidate in offered[backend] if candidate is not chosen]
    why = {candidate.name: candidate.refusal or candidate.slower for candidate in own}
    return Plan(
        problem,
        device,
        asked,
        backend,
        chosen,
        tuple(candidate for candidate in compared if candidate.refusal is None),
        rejected,
        {each: reason for each, reason in why.items() if reason is not None},
        algorithm=algorithm,
        dequantises=problem.weight_format not in backends.get(backend).formats,
    )


def _offers(
    backend: Backend,
    problem: Problem,
    device: torch.device,
    target: Target | str,
    algorithm: str | None,
) -> tuple[str | None, list[Candidate]]:
    """(why the backend cannot compute `problem` here, or None, and its candidates)."""
    if not _runs_on(backend, device):
        where = " and ".join(backend.devices)
        return f"runs on {where} tensors only, not on {device.type}", []
    reason = backend.unavailable()
    if reason is not None:
        return reason, []
    if problem.groups and not backend.groups:
        return "it has no products over groups of rows", []
    known = None if isinstance(target, str) else target
    if backend.needs_target and known is None:
        return str(target), []
    candidates = _candidates(backend, problem, known)
    if algorithm is not None:
        candidates = [c for c in candidates if c.name == algorithm]
    if not candidates:
        return f"it has no algorithm {algorithm!r} for this problem", []
    if fastest(candidates) is None:
        return candidates[0].refusal, []
    if device.type == "cuda" and backend.name != "eager":
        reason = selftest.trusted(backend, device)
        if reason is not None:
            return reason, []
    return None, candidates


def _after_dequantising(candidate: Candidate, problem: Problem, target: Target | None) -> Candidate:
    """The candidate with the time of making a dense copy of the weight added to the predicted one.

    A measured time has it already: `tune` measures what a call does with a weight of this format.
    """
    if candidate.predicted_us is None or target is None:
        return candidate
    us = _DENSE_BYTES * problem.N * problem.K / (target.bandwidth_gbs * 1e3)
    least, most = candidate.predicted_range or (candidate.predicted_us,) * 2
    return replace(
        candidate,
        predicted_us=candidate.predicted_us + us,
        predicted_range=(least + us, most + us),
    )


def _target(device: torch.device) -> Target | str:
    """The target of the current GPU, or why there is none."""
    if device.type != "cuda":
        return f"it needs a GPU, got {device.type}"
    try:
        return current_target()
    except ValueError as error:
        return str(error)


def _runs_on(backend: Backend, device: torch.device) -> bool:
    return not backend.devices or device.type in backend.devices


def _why_not(candidates: list[Candidate], chosen: Candidate, backend: str) -> str:
    """Why the best of `candidates`, which could compute the problem, is not chosen."""
    best = fastest(candidates)
    assert best is not None
    if best.slower is not None:
        return best.slower
    for kind in ("measured", "predicted"):
        time, least = getattr(best, f"{kind}_us"), getattr(chosen, f"{kind}_us")
        if least is not None:
            rival = "it has no such time" if time is None else f"not {time:.1f} us"
            return f"{chosen.name} is {kind} faster: {least:.1f} us, {rival}"
    return f"{backend} comes first"


def _times(candidates: tuple[Candidate, ...]) -> str:
    """The compared times, in words; "" where none is known."""
    for kind in ("measured", "predicted"):
        known = [(us, c) for c in candidates if (us := getattr(c, f"{kind}_us")) is not None]
        if known:
            known.sort(key=lambda each: (each[0], each[1].name))
            ranged = kind == "predicted"
            return f"{kind}: " + ", ".join(_time(us, c, ranged) for us, c in known)
    return ""


def _time(us: float, candidate: Candidate, ranged: bool) -> str:
    """A candidate's time, and the range of a predicted one."""
    text = f"{candidate.name} {us:.1f} us"
    least, most = candidate.predicted_range or (us, us)
    return text + f" ({least:.1f} to {most:.1f})" * (ranged and most > least)


def _asked(name: str) -> tuple[str, bool]:
    """(name, strict) that a call's backend argument means now: its own, else use_backend's, else the environment's."""
    if name != "auto":
        return name, False
    for request in _requests[-1:]:
        if request.asked != ("auto", False):
            return request.asked
    name = env.backend()
    check_name(name, "LORA_KERNELS_BACKEND")
    return name, False
