"""Triton's interpreter made right for bfloat16 and as strict as a GPU; `install` patches it once, for the whole process.

Right: bfloat16 arithmetic goes through float32 and rounds to nearest even; a TF32 product drops thirteen bits of its
operands, three of them form a "tf32x3" product. Strict, with an error at the first offence: a masked lane without `other` is
poison; every address must be an element of the very tensor its pointer came from, whatever that tensor's strides; products
have the sizes that tensor cores take; grids have a GPU's limits and are not empty; a dependent launch reads nothing of the
kernel before it until it has waited. Programs can run in any order, and loads and stores are counted per tensor.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "the interpreter needs a process of its own, with TRITON_INTERPRET=1",
        allow_module_level=True,
    )

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorDescHandle,
    TensorHandle,
)

from tests.interpreter.arithmetic import (
    binary_op_by,
    cast_impl_by,
    create_dot,
    poison,
    unary_op_by,
)

GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class View:
    """One tensor argument of a launch: which addresses are its elements."""

    name: str
    base: int
    extents: tuple[
        tuple[int, int], ...
    ]  # (bytes between neighbours, size), the widest stride first
    storage: int

    @classmethod
    def of(cls, name: str, t: torch.Tensor) -> View:
        pairs = [
            (stride * t.itemsize, size)
            for size, stride in zip(t.shape, t.stride(), strict=True)
            if stride and size > 1
        ]
        extents = tuple(sorted(pairs, reverse=True)) if t.numel() else ((1, 0),)
        return cls(name, t.data_ptr(), extents, t.untyped_storage().data_ptr())

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        rest = addresses.astype(np.int64) - self.base
        inside = rest >= 0
        for step, size in self.extents:
            index = np.minimum(rest // step, size - 1)
            inside &= index >= 0
            rest = rest - index * step
        return inside & (rest == 0)


@dataclass
class Launch:
    """What was launched, and what it did: elements loaded and stored, by argument."""

    kernel: str
    function: InterpretedFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)  # both, by name
    loads: Counter = field(default_factory=Counter)
    stores: Counter = field(default_factory=Counter)
    written: dict[str, np.ndarray] = field(default_factory=dict)  # addresses, one entry a store


@dataclass
class State:
    """The launch that runs, and what the process remembers between launches."""

    views: dict[int, View] = field(default_factory=dict)  # by id of a pointer's attribute
    launch: Launch | None = None
    dependent: bool = False
    waited: bool = True
    written_before: frozenset[int] = frozenset()  # storages that the launch before stored to
    order: str = "ascending"
    chosen: dict[str, Sequence[int]] = field(
        default_factory=dict
    )  # by kernel: the programs that run
    mapped: Sequence[int] | None = None  # those of the launch that runs
    recorded: list[Launch] | None = None


state = State()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """The launches inside, in order, with their counts."""
    before, state.recorded = state.recorded, []
    try:
        yield state.recorded
    finally:
        state.recorded = before


@contextmanager
def program_order(order: str) -> Iterator[None]:
    """Run programs "ascending", "descending" or "shuffled" (the same shuffle every time)."""
    before, state.order = state.order, order
    try:
        yield
    finally:
        state.order = before


@contextmanager
def programs(**chosen: Sequence[int]) -> Iterator[None]:
    """Of the kernels named run only the programs with these numbers; a negative one counts from the grid's end."""
    before, state.chosen = state.chosen, chosen
    try:
        yield
    finally:
        state.chosen = before


def _view_of(pointers: TensorHandle) -> View:
    view = pointers.attr.get("view")
    if view is None:
        raise IndexError("a pointer whose tensor is unknown: the interpreter lost its origin")
    return view


def _check(pointers: TensorHandle, mask: TensorHandle, what: str) -> View:
    view = _view_of(pointers)
    lanes = np.broadcast_to(mask.data, pointers.data.shape)
    addresses = pointers.data[lanes]
    outside = ~view.holds(addresses)
    if outside.any():
        raise IndexError(
            f"{what} of {outside.sum()} elements that {view.name} does not have, the first "
            f"{int(addresses[outside][0]) - view.base} bytes from its start"
        )
    return view


def _masked_load(stock):
    def create_masked_load(self, ptrs, mask, other, *policies, **named):
        view = _check(ptrs, mask, "load")
        if state.dependent and not state.waited and view.storage in state.written_before:
            raise RuntimeError(
                f"{view.name} is read before the kernel that writes it was waited for"
            )
        state.launch.loads[view.name] += int(np.broadcast_to(mask.data, ptrs.data.shape).sum())
        if other is None:
            dtype = ptrs.get_element_ty()
            other = TensorHandle(poison(dtype, ptrs.data.shape), dtype)
        return stock(self, ptrs, mask, other, *policies, **named)

    return create_masked_load


def _masked_store(stock):
    def create_masked_store(self, ptrs, value, mask, *policies):
        view = _check(ptrs, mask, "store")
        lanes = np.broadcast_to(mask.data, ptrs.data.shape)
        launch = state.launch
        launch.stores[view.name] += int(lanes.sum())
        if state.recorded is not None:
            earlier = launch.written.get(view.name, np.empty(0, np.uint64))
            launch.written[view.name] = np.concatenate([earlier, ptrs.data[lanes].ravel()])
        return stock(self, ptrs, value, mask, *policies)

    return create_masked_store


def _atomic_rmw(stock):
    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        view = _check(ptr, mask, "atomic")
        if val.dtype.scalar.is_floating():
            raise TypeError(f"a float atomic on {view.name}: its sum would depend on the order")
        return stock(self, op, ptr, val, mask, sem, scope)

    return create_atomic_rmw


def _keeping_view(stock):
    """An operation on a pointer gives a pointer into the same tensor."""

    def operation(self, *args):
        result = stock(self, *args)
        source = next((a for a in args if isinstance(a, TensorHandle) and "view" in a.attr), None)
        if source is not None:
            result.set_attr("view", source.attr["view"])
        return result

    return operation


def _materialize(stock):
    def materialize_pointers(self, offsets):
        pointers, mask = stock(self, offsets)
        pointers.set_attr("view", _view_of(self.base))
        return pointers, mask

    return materialize_pointers


def _implicit_cvt(stock):
    def implicit_cvt(arg):
        result = stock(arg)
        if isinstance(arg, torch.Tensor):
            result.handle.set_attr("view", state.views[id(arg)])
        return result

    return implicit_cvt


def _init_args(stock):
    def init_args(self, args, kwargs):
        host_args, host_kwargs = stock(self, args, kwargs)
        named = {**dict(zip(self.arg_names, host_args, strict=False)), **host_kwargs}
        state.views = {}
        for name, value in named.items():
            base = getattr(value, "base", value)
            if isinstance(base, torch.Tensor):
                state.views[id(base)] = View.of(name, base)
        state.launch.arguments = named
        return host_args, host_kwargs

    return init_args


def _run(stock):
    def run(self, *args, grid, warmup, **kwargs):
        for size, limit in zip(grid, GRID_LIMITS, strict=False):
            if not 1 <= size <= limit:
                raise ValueError(f"a grid of {grid} cannot be launched")
        state.launch = Launch(self.fn.__name__, self, tuple(grid), args, kwargs)
        state.dependent = bool(kwargs.get("launch_pdl"))
        state.mapped = state.chosen.get(self.fn.__name__)
        if state.mapped is not None:
            state.mapped = [number % grid[0] for number in state.mapped]
            grid = (len(state.mapped),)
        stock(self, *args, grid=grid, warmup=warmup, **kwargs)
        stored = state.launch.stores
        state.written_before = frozenset(
            view.storage for view in state.views.values() if stored[view.name]
        )
        if state.recorded is not None:
            state.recorded.append(state.launch)

    return run


def _set_grid_idx(stock):
    def set_grid_idx(self, x, y, z):
        count = self.grid_dim[0]
        if state.order == "descending":
            x = count - 1 - x
        elif state.order == "shuffled":
            x = int(np.random.default_rng(count).permutation(count)[x])
        state.waited = False
        stock(self, x, y, z)
        if state.mapped is not None:
            self.grid_idx = (state.mapped[x], y, z)

    return set_grid_idx


def _patch_lang_tensor(stock):
    def patch_lang_tensor(tensor, scope):
        stock(tensor, scope)
        # Triton 3.6 takes int() of an array with one element, which numpy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_lang_tensor


def _patch_builtin(stock):
    """Once a launch: calls of device functions find all patched; looking at every name again took a third of the time."""

    def patch_builtin(pkg, builder, scope):
        if "_patched" not in vars(pkg):
            stock(pkg, builder, scope)
            scope.set_attr(pkg, "_patched", True)  # until the launch ends

    return patch_builtin


def _gdc_wait() -> None:
    state.waited = True


def _gdc_launch_dependents() -> None:
    """A hint only: the interpreter runs one launch after the other."""


def install() -> None:
    """Patch the interpreter; a second call changes nothing."""
    if getattr(InterpreterBuilder, "strict", False):
        return
    for owner, name, wrap in (
        (InterpreterBuilder, "binary_op", binary_op_by),
        (InterpreterBuilder, "unary_op", unary_op_by),
        (InterpreterBuilder, "cast_impl", cast_impl_by),
        (InterpreterBuilder, "create_dot", lambda stock: create_dot),
        (InterpreterBuilder, "create_masked_load", _masked_load),
        (InterpreterBuilder, "create_masked_store", _masked_store),
        (InterpreterBuilder, "create_atomic_rmw", _atomic_rmw),
        (InterpreterBuilder, "create_addptr", _keeping_view),
        (InterpreterBuilder, "create_splat", _keeping_view),
        (InterpreterBuilder, "create_broadcast", _keeping_view),
        (InterpreterBuilder, "create_expand_dims", _keeping_view),
        (InterpreterBuilder, "set_grid_idx", _set_grid_idx),
        (TensorDescHandle, "materialize_pointers", _materialize),
        (GridExecutor, "_init_args_hst", _init_args),
        (InterpretedFunction, "run", _run),
        (interpreter, "_implicit_cvt", _implicit_cvt),
        (interpreter, "_patch_builtin", _patch_builtin),
        (interpreter, "_patch_lang_tensor", _patch_lang_tensor),
    ):
        setattr(owner, name, wrap(getattr(owner, name)))
    builder = interpreter.interpreter_builder
    builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 90, 32))
    # Of each sum and product of integers it computes in 64 bits whether they overflow, and tells nobody: half of the time.
    builder.options = replace(builder.options, sanitize_overflow=False)
    tl.extra.cuda.gdc_wait = _gdc_wait
    tl.extra.cuda.gdc_launch_dependents = _gdc_launch_dependents
    InterpreterBuilder.strict = True


install()
assert triton.knobs.runtime.interpret
