"""A launch like an earlier one, without Triton's search for its compiled kernel: of 28 arguments that takes 17 us, this 5.

`run` of a Triton function finds the kernel by the device, the options, the constants and of each argument its type, whether
a number is 1, divisible by 16 or past 32 bits, and whether a pointer is divisible by 16. The key here has the numbers
themselves and a pointer's last four bits, so an equal key means the same kernel. It is launched as `run` launches it in the
sources of the versions below, but that no global which a kernel reads is compared with what it was. For any other version,
and where Triton was asked to do more than to launch, `run` is called.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
# What may be given by name: values that are the same wherever they are equal. A tensor would be kept, and launched again.
_VALUES = {int, bool, float, str, type(None)}
_MOST = 4096  # a key has the sizes, so that each new one makes another
_known: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}


def run(kernel: Any, programs: int, device: int, args: tuple, named: dict[str, Any]) -> None:
    """`kernel[(programs,)](*args, **named)` on the current device, which has this index: constants and options by name.

    With another argument by name, a tensor or a descriptor, Triton searches each time.
    """
    if not _VALUES.issuperset(map(type, named.values())):
        kernel.run(*args, grid=(programs,), warmup=False, **named)
        return
    parts = [id(kernel), device, *named, *named.values(), *map(type, named.values())]
    for a in args:
        if a is None or type(a) is int:
            parts.append(a)
        elif isinstance(a, Tensor):
            parts.append(a.dtype)
            parts.append(a.data_ptr() & 15)
        else:
            parts.append(_traits(a))
    key = tuple(parts)
    known, driver = _known.get(key), _driver_of(kernel)
    if known is not None and driver is not None:
        _, it, rest = known
        stream = driver.active.get_current_stream(device)
        # No hooks, and nothing to tell them.
        what = it.function, it.packed_metadata, None, None, None
        it.run(programs, 1, 1, stream, *what, *args, *rest)
        return
    compiled = kernel.run(*args, grid=(programs,), warmup=False, **named)
    if driver is not None and compiled is not None:
        if len(_known) >= _MOST:
            _known.clear()
        rest = tuple(named.get(p.name, p.default) for p in kernel.params[len(args) :])
        _known[key] = kernel, compiled, rest  # while the kernel is here its id is its own


def _traits(a: Any) -> tuple[Any, ...]:
    """What a compiled kernel depends on of another number or of a tensor descriptor; with the type, as 1 == True."""
    if type(a) is float:  # any: an alpha may change in each step
        return (float,)
    if isinstance(a, bool):
        return bool, a
    return type(a), a.base.dtype, tuple(a.block_shape), getattr(a, "layout", None)


def _driver_of(kernel: Any) -> Any:
    """Triton's driver, or None where its `run` does more than to launch: for hooks or a debugger, or in another version."""
    runtime, compilation, driver = _triton()
    run = kernel.run
    # A chain of hooks has `calls`; a hook of the user's own is none.
    more = (
        getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or compilation.instrumentation_mode
        or run.__qualname__ != "JITFunction.run"
        or hasattr(run, "__wrapped__")
        or kernel.pre_run_hooks
        or kernel.debug
    )
    return None if more else driver


@functools.cache
def _triton() -> tuple[Any, Any, Any]:
    import triton
    from triton import knobs
    from triton.runtime import driver

    known = triton.__version__.startswith(_VERSIONS) and torch.version.hip is None
    return knobs.runtime, knobs.compilation, driver if known else None
