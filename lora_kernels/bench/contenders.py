"""The implementations that are compared: each way to compute a LoRA linear, built on the same operands.

frozen        the layer without LoRA: the floor
reference     linear(x) + alpha·(x·A·B), one operation after the other
compiled      torch.compile of the reference
addmm         the product, then addmm_ of the low-rank one onto it, gradients by hand: the form of hand-tuned training code
peft          PEFT's layer, over bitsandbytes' Linear4bit where the weight is nf4
dense         this package's layer over the dense weight, where the problem's is quantised
two_kernel    this package's Triton kernels, forced into shrink and product: what published fused kernels do
one_launch    likewise, forced into one launch of both
persistent    likewise, forced into the persistent product
persistent_one_launch  likewise, which computes s too
loop          the frozen layer by Triton's product, without LoRA: what its loop reaches of the vendor's; forward only
ours[NAME]    `lora_linear` with that backend

Where the weight is quantised, what reads no packed weight has it dequantised, once, before it is measured.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import autograd, backends, plan
from lora_kernels.autograd import Call
from lora_kernels.functional import lora_linear
from lora_kernels.operands import Adapter, QuantizedWeight, problem_of
from lora_kernels.problem import DENSE, Problem
from lora_kernels.quantized import BLOCK, BLOCK2
from lora_kernels.samples import sample

Function = Callable[[Tensor], Tensor]
OURS = {f"ours[{name}]": name for name in backends.BACKENDS}
FLOORS = ("frozen", "loop")  # without LoRA
FORCED = ("two_kernel", "one_launch", "persistent", "persistent_one_launch")  # of Triton's
NAMES = ("frozen", "loop", "reference", "compiled", "addmm", "peft", "dense", *FORCED, *OURS)


@dataclass(frozen=True)
class Layer:
    """Frozen weight [N, K] and bias [N], adapters A [K, R] and B [R, N], and alpha; `packed`: what weight was made of."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    alpha: float
    packed: QuantizedWeight | None = None

    def double(self) -> Layer:
        """The same in float64, without what was packed."""

        def wide(t: Tensor) -> Tensor:
            return t.detach().double().requires_grad_(t.requires_grad)

        bias = None if self.bias is None else wide(self.bias)
        return Layer(wide(self.weight), bias, wide(self.A), wide(self.B), self.alpha)


@dataclass(frozen=True)
class Built:
    """y = function(x), and the trained tensors, A and B; `transposed` says that they are stored [R, K] and [N, R]."""

    function: Function
    trained: tuple[Tensor, ...]
    transposed: bool = False


def make_layer(problem: Problem, seed: int = 0) -> Layer:
    """Random operands of a problem, as trained layers have them: x·A·B is not small beside x·W."""
    normal, spread = _normal(problem, seed), 1 / math.sqrt(max(problem.K, 1))
    packed = None
    if problem.weight_format != DENSE:
        kind, dtype = problem.weight_format, getattr(torch, problem.dtype)
        packed = sample(kind, problem.N, problem.K, dtype, problem.device)
        weight = packed.dense()
    else:
        weight = normal(problem.N, problem.K, scale=spread)
    return Layer(
        weight=weight,
        bias=normal(problem.N) if problem.bias else None,
        A=normal(problem.K, problem.R, scale=spread, dtype=problem.adapter_dtype).requires_grad_(),
        B=normal(problem.R, problem.N, scale=0.5, dtype=problem.adapter_dtype).requires_grad_(),
        alpha=0.5,
        packed=packed,
    )


def make_input(problem: Problem) -> tuple[Tensor, Tensor]:
    """x [M, K], which requires a gradient as inside of a network, and dy [M, N]."""
    normal = _normal(problem, seed=1)
    return normal(problem.M, problem.K).requires_grad_(), normal(problem.M, problem.N)


def _normal(problem: Problem, seed: int) -> Callable[..., Tensor]:
    """What draws tensors of a shape on the problem's device, and in its dtype where none is given."""
    generator = torch.Generator(problem.device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: str = problem.dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, device=problem.device)
        return (scale * values).to(getattr(torch, dtype))

    return normal


def build(name: str, layer: Layer) -> Built:
    """The contender `name` on these operands. ValueError for an unknown name."""
    if name in OURS:
        backend = OURS[name]
        return Built(lambda x: ours(x, layer, backend), (layer.A, layer.B))
    if name not in _BUILDERS:
        raise ValueError(f"contender must be one of {NAMES}, got {name!r}")
    return _BUILDERS[name](layer)


def left_out(name: str, problem: Problem) -> str | None:
    """Why a contender cannot be measured on this problem here, or None."""
    packs = problem.weight_format != DENSE
    for package in ("peft", *(["bitsandbytes"] if packs else [])):
        if name == "peft" and importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if name == "peft" and problem.weight_format not in (DENSE, "nf4"):
        return f"it has no layer over {problem.weight_format} here"
    if name == "dense" and not packs:
        return "the weight is dense"
    if name == "compiled" and problem.device == "cpu" and shutil.which("c++") is None:
        return "torch.compile needs a C++ compiler"
    if name in ("loop", *FORCED) and problem.device != "cuda":
        return "measured on cuda only"
    try:
        if name in OURS:
            plan.explain(problem, OURS[name])
        elif name in ("loop", *FORCED):
            plan.explain(problem, "triton", "two_kernel" if name == "loop" else name)
    except RuntimeError as error:
        return str(error).rpartition(": ")[2]
    return None


def backends_on(device: str) -> list[str]:
    """Our backends of a device type, in the order of the tables."""
    every = {name: backends.get(name).devices for name in reversed(backends.BACKENDS)}
    return [name for name, devices in every.items() if not devices or device in devices]


def with_backends(names: Iterable[str], device: str) -> tuple[str, ...]:
    """`names`, where "ours" stands for each of our backends that a device type has."""
    ours = [f"ours[{backend}]" for backend in backends_on(device)]
    return tuple(dict.fromkeys(n for name in names for n in (ours if name == "ours" else [name])))


def reference(x: Tensor, layer: Layer) -> Tensor:
    """The formula, one operation after the other, each rounded to its operands' dtype."""
    lora = layer.alpha * (x.to(layer.A.dtype) @ layer.A @ layer.B)
    return F.linear(x, layer.weight, layer.bias) + lora.to(x.dtype)


def ours(x: Tensor, layer: Layer, backend: str = "auto") -> Tensor:
    """By this package."""
    weight = layer.weight if layer.packed is None else layer.packed
    return lora_linear(x, weight, layer.A, layer.B, layer.alpha, layer.bias, backend=backend)


def _compiled(layer: Layer) -> Built:
    # Each layer is compiled for itself, as one layer of a model is; without a reset the ninth would run uncompiled.
    torch._dynamo.reset()
    function = torch.compile(lambda x: reference(x, layer), dynamic=False, fullgraph=True)
    return Built(function, (layer.A, layer.B))


def _addmm(layer: Layer) -> Built:
    def function(x: Tensor) -> Tensor:
        A, B = layer.A.to(x.dtype), layer.B.to(x.dtype)
        y: Tensor = _Addmm.apply(x, layer.weight, layer.bias, A, B, layer.alpha)  # type: ignore
        return y

    return Built(function, (layer.A, layer.B))


class _Addmm(torch.autograd.Function):
    """The addmm_ form with gradients written out, everything in x's dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor, alpha: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.alpha = alpha
        return F.linear(x, weight, bias).addmm_(x @ A, B, alpha=alpha)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, A, B = ctx.saved_tensors
        q = (dy @ B.t()).mul_(ctx.alpha)
        dx = (dy @ weight).addmm_(q, A.t())
        dB = ((x @ A).t() @ dy).mul_(ctx.alpha)
        return dx, None, None, x.t() @ q, dB, None


def peft(layer: Layer, use_dora: bool = False) -> Built:
    """PEFT's layer over the same operands; its magnitude, with DoRA, is that of the base."""
    base = dense_base(layer) if layer.packed is None else _bitsandbytes_base(layer)
    if layer.bias is not None:
        base.bias = nn.Parameter(layer.bias, requires_grad=False)
    model = nn.Sequential(base)
    model.is_loaded_in_4bit = layer.packed is not None  # type: ignore[assignment]
    trained = add_peft_adapter(model, layer, use_dora=use_dora)
    return Built(model[0], trained, transposed=True)


def add_peft_adapter(
    model: nn.Sequential, layer: Layer, name: str = "default", **options: Any
) -> tuple[Tensor, Tensor]:
    """Add the adapter of `layer` to the one layer of `model`, as PEFT does; returns A and B, as PEFT stores them."""
    from peft import LoraConfig, inject_adapter_in_model

    rank = layer.A.shape[1]
    alpha: Any = layer.alpha * rank
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], **options)
    inject_adapter_in_model(config, model, adapter_name=name)
    inner: Any = model[0]
    A, B = (nn.Parameter(t.detach().t().contiguous()) for t in (layer.A, layer.B))
    inner.lora_A[name].weight, inner.lora_B[name].weight = A, B
    return A, B


def dense_base(layer: Layer) -> nn.Linear:
    N, K = layer.weight.shape
    base = nn.Linear(K, N, bias=layer.bias is not None, device="meta")
    base.weight = nn.Parameter(layer.weight, requires_grad=False)
    return base


def _bitsandbytes_base(layer: Layer) -> Any:
    """A Linear4bit over the packed tensors themselves."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    packed: Any = layer.packed
    N, K = packed.shape
    second = QuantState(packed.absmax2, blocksize=BLOCK2, code=packed.code2, dtype=torch.float32)
    state = QuantState(
        packed.absmax,
        shape=torch.Size((N, K)),
        code=packed.code,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=packed.dtype,
        offset=packed.offset[0],
        state2=second,
    )
    options = {"compute_dtype": packed.dtype, "quant_type": "nf4", "device": "meta"}
    base: Any = Linear4bit(K, N, bias=layer.bias is not None, **options)
    codes = packed.packed.view(-1, 1)
    base.weight = Params4bit(codes, quant_state=state, bnb_quantized=True, module=base)
    base.quant_state = state
    return base


def _planned(algorithm: str) -> Callable[[Problem], plan.Plan]:
    """Triton's plans by one algorithm, each made once, as those of calls are."""
    return functools.cache(lambda problem: plan.explain(problem, "triton", algorithm))


def _forced(algorithm: str, layer: Layer) -> Built:
    planned = _planned(algorithm)

    def function(x: Tensor) -> Tensor:
        problem = problem_of(x, layer.weight, layer.A, layer.bias, dropout=False)
        call = Call("triton", planned(problem))
        y, _ = autograd.apply(
            x, layer.weight, layer.A, layer.B, layer.bias, layer.alpha, 0.0, None, call
        )
        return y

    return Built(function, (layer.A, layer.B))


def _loop(layer: Layer) -> Built:
    nothing = Adapter(layer.A.detach()[:, :0], layer.B.detach()[:0], 0.0)
    planned = _planned("two_kernel")

    def function(x: Tensor) -> Tensor:
        problem = problem_of(x, layer.weight, layer.A, layer.bias, dropout=False)
        products = planned(problem).products
        s = x.new_empty((x.shape[0], 0), dtype=torch.float32)
        return products.expand(x, layer.weight.t(), s, nothing, layer.bias)

    return Built(function, ())


_BUILDERS: dict[str, Callable[[Layer], Built]] = {
    "frozen": lambda layer: Built(lambda x: F.linear(x, layer.weight, layer.bias), ()),
    "reference": lambda layer: Built(lambda x: reference(x, layer), (layer.A, layer.B)),
    "compiled": _compiled,
    "addmm": _addmm,
    "peft": peft,
    "dense": lambda layer: Built(
        lambda x: ours(x, replace(layer, packed=None)), (layer.A, layer.B)
    ),
    "loop": _loop,
    **{algorithm: partial(_forced, algorithm) for algorithm in FORCED},
}
