"""The shared suite, against PEFT: projections that share x, experts that share a batch, adapters that share a weight, DoRA.

frozen             the layers without LoRA: the floor
reference          the formula, one operation after the other
peft               PEFT's layers; of experts with Transformers' "eager" loop
peft, grouped_mm   PEFT's experts with Transformers' `grouped_mm`
peft, lora         PEFT's layer without DoRA
apart              `lora_linear` for each projection, or for each adapter's samples
lora               `lora_linear` without DoRA
ours               `lora_projections`, experts after `accelerate`, `mixed_lora_linear`, `lora_linear(magnitude=m)`
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.bench import contenders, results
from lora_kernels.bench.check import relative_error
from lora_kernels.bench.clock import Call, clock_for, interleaved
from lora_kernels.bench.contenders import Layer
from lora_kernels.bench.linear import MODES, Effort, first_line
from lora_kernels.bench.results import Row
from lora_kernels.functional import lora_linear
from lora_kernels.mixed import mixed_lora_linear
from lora_kernels.problem import Problem
from lora_kernels.projections import Projection, lora_projections

PRESETS = ("projections", "experts", "adapters", "dora")
DTYPES = ("float32", "bfloat16")
ROWS = (1, 16, 512)
PROJECTIONS = {
    "q, k, v of 768": (768, (768, 768, 768)),
    "q, k, v of 2048": (2048, (2048, 512, 512)),
}
RANK = 16
EXPERTS, HIDDEN, INTERMEDIATE, SLOTS, EXPERT_RANK = 32, 512, 256, 4, 8
TOKENS = (16, 256)
WIDTH, ADAPTERS, SAMPLES = 768, 8, 16
DORA_ROWS, DORA_WIDTH = (16, 512), 1024
LENGTHS = (1, 32)  # rows of a sample, each of which has one of the adapters

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """ys = function(x), and the tensors that are trained beside x.

    `trains`: its step can be measured. `alike`: it computes what the case defines, and is checked.
    """

    function: Callable[[Tensor], Results]
    trained: tuple[Tensor, ...] = ()
    trains: bool = True
    alike: bool = True


@dataclass(frozen=True)
class Case:
    """Contenders by name on one x; `exact` is the definition in float64, `plain` names the contender in x's dtype."""

    label: str
    problem: Problem
    x: Tensor
    contenders: dict[str, Contender]
    exact: Callable[[Tensor], Results]
    plain: str


def cases(preset: str) -> dict[str, Callable[[str, str], Case]]:
    """What makes each case of a preset for a device and a dtype, by its label; none where `left_out` says why."""
    if preset in ("experts", "dora") and left_out(preset):
        return {}
    every: dict[str, tuple[Callable[..., Case], dict[str, tuple[Any, ...]]]] = {
        "projections": (
            _projections_case,
            {f"{label}, {M}": (M, *of) for label, of in PROJECTIONS.items() for M in ROWS},
        ),
        "experts": (_experts_case, {f"Qwen3-MoE, {n} tokens": (n,) for n in TOKENS}),
        "adapters": (
            _adapters_case,
            {f"{ADAPTERS} adapters, {SAMPLES}x{length}": (length,) for length in LENGTHS},
        ),
        "dora": (_dora_case, {f"DoRA of {DORA_WIDTH}, {M}": (M,) for M in DORA_ROWS}),
    }
    make, sizes = every[preset]
    return {label: partial(make, label, *of) for label, of in sizes.items()}


def measure(case: Case, effort: Effort, left_out: dict[str, str]) -> list[Row]:
    """The rows of a case, each contender checked against float64 first. RuntimeError where ours is wrong."""
    rows: list[Row] = []
    for name in [*case.contenders]:
        reason = _why_wrong(case, name)
        if reason is not None and name in ("ours", "apart"):
            raise RuntimeError(f"{case.label}: {reason}")
        if reason is not None:
            left_out[f"{case.label}: {name}"] = reason
            del case.contenders[name]
    clock = clock_for(case.problem.device)
    for mode in MODES:
        calls = {
            name: _as_call(each, case.x, mode)
            for name, each in case.contenders.items()
            if each.trains or mode == "forward"
        }
        taken = interleaved(calls, clock, seconds=effort.seconds, rounds=effort.rounds)
        rows += [
            results.row(
                *("shared", case.label, mode, name, taken, case.problem),
                auto=True if name == "ours" else None,
            )
            for name in taken
        ]
    return rows


def left_out(preset: str) -> dict[str, str]:
    """What cannot be measured here, and why."""
    needs = ("peft", "transformers") if preset == "experts" else ("peft",)
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    return {f"{preset}: peft": f"{' and '.join(missing)} is not installed"} if missing else {}


def _as_call(contender: Contender, x: Tensor, mode: str) -> Call:
    if mode == "forward":
        still = x.detach()

        def forward() -> object:
            with torch.no_grad():
                return contender.function(still)

        return forward

    def step() -> object:
        ys = contender.function(x)
        return torch.autograd.grad(ys, (x, *contender.trained), [torch.ones_like(y) for y in ys])

    return step


def _why_wrong(case: Case, name: str) -> str | None:
    """What is wrong with a contender's results and dx, or None."""
    if not case.contenders[name].alike:
        return None
    try:
        found = _values(case.contenders[name].function, case.x)
        plain = _values(case.contenders[case.plain].function, case.x)
        exact = _values(case.exact, case.x.detach().double().requires_grad_())
        longest = max(case.problem.K, case.problem.N, case.problem.M)
        for place, each in enumerate(zip(found, exact, plain, strict=True)):
            relative_error(f"{name}: {'dx' if place == 0 else 'y'}", *each, longest)
    except Exception as error:
        return first_line(error)
    return None


def _values(function: Callable[[Tensor], Results], x: Tensor) -> list[Tensor]:
    """dx and ys."""
    ys = function(x)
    (dx,) = torch.autograd.grad(ys, (x,), [torch.ones_like(y) for y in ys])
    return [dx, *(y.detach() for y in ys)]


def _frozen(x: Tensor, layer: Layer) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _trained(layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    return tuple(t for layer in layers for t in (layer.A, layer.B))


def _projections_case(
    label: str, M: int, K: int, widths: tuple[int, ...], device: str, dtype: str
) -> Case:
    problems = [Problem(M, N, K, RANK, dtype, dtype, device, bias=True) for N in widths]
    layers = [contenders.make_layer(problem, seed) for seed, problem in enumerate(problems)]
    parts = [Projection(y.weight, y.A, y.B, y.alpha, y.bias) for y in layers]

    def each(
        function: Callable[[Tensor, Layer], Tensor], layers: Sequence[Layer] = layers
    ) -> Callable[[Tensor], Results]:
        return lambda x: tuple(function(x, layer) for layer in layers)

    every = {
        "frozen": Contender(each(_frozen), alike=False),
        "reference": Contender(each(contenders.reference), _trained(layers)),
        "apart": Contender(each(contenders.ours), _trained(layers)),
        "ours": Contender(lambda x: lora_projections(x, parts), _trained(layers)),
    }
    if not left_out("projections"):
        built = [contenders.build("peft", layer) for layer in layers]
        theirs = tuple(t for one in built for t in one.trained)
        every["peft"] = Contender(lambda x: tuple(one.function(x) for one in built), theirs)
    exact = each(contenders.reference, [layer.double() for layer in layers])
    problem = Problem(M, sum(widths), K, RANK, dtype, dtype, device, bias=True)
    x, _ = contenders.make_input(problem)
    return Case(label, problem, x, every, exact, "reference")


def _adapters_case(label: str, length: int, device: str, dtype: str) -> Case:
    """Samples in any order, of which each has one of several adapters over one weight; PEFT's layer does not train them."""
    M, N = SAMPLES * length, WIDTH
    one = Problem(M, N, N, RANK, dtype, dtype, device)
    layers = [contenders.make_layer(one, seed) for seed in range(ADAPTERS)]
    index = [(5 * sample) % ADAPTERS for sample in range(SAMPLES)]
    samples = [[s for s, of in enumerate(index) if of == g] for g in range(ADAPTERS)]
    mine = [torch.tensor(of_one, device=device) for of_one in samples]
    weight = layers[0].weight
    parts = [(layer.A, layer.B, layer.alpha) for layer in layers]

    def by_adapter(
        function: Callable[[Tensor, Layer], Tensor],
        layers: Sequence[Layer] = layers,
        weight: Tensor = weight,
    ) -> Callable[[Tensor], Results]:
        def computed(x: Tensor) -> Results:
            y = x.new_empty(*x.shape[:2], N)
            for rows, layer in zip(mine, layers, strict=True):
                own = Layer(weight, None, layer.A, layer.B, layer.alpha)
                y = y.index_copy(0, rows, function(x[rows], own))
            return (y,)

        return computed

    every = {
        "frozen": Contender(lambda x: (F.linear(x, weight),), alike=False),
        "reference": Contender(by_adapter(contenders.reference), _trained(layers)),
        "apart": Contender(by_adapter(contenders.ours), _trained(layers)),
        "ours": Contender(
            lambda x: (mixed_lora_linear(x, weight, parts, index),), _trained(layers)
        ),
    }
    if not left_out("adapters"):
        every["peft"] = _peft_adapters(layers, index)
    exact = by_adapter(contenders.reference, [layer.double() for layer in layers], weight.double())
    x, _ = contenders.make_input(one)
    x = x.detach().view(SAMPLES, length, N).requires_grad_()
    return Case(label, replace(one, groups=ADAPTERS), x, every, exact, "reference")


def _peft_adapters(layers: list[Layer], index: list[int]) -> Contender:
    """PEFT's layer over the first one's weight."""
    model = nn.Sequential(contenders.dense_base(layers[0]))
    for g, layer in enumerate(layers):
        contenders.add_peft_adapter(model, layer, str(g))
    inner = model.eval()[0]
    names = [str(g) for g in index]
    return Contender(lambda x: (inner(x, adapter_names=names),), trains=False)


class _Experts(nn.Module):
    """The experts of a Qwen3-MoE block with a routing of their own, as a model that PEFT can take."""

    def __init__(self, implementation: str) -> None:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        config: Any = SimpleNamespace(
            num_experts=EXPERTS,
            hidden_size=HIDDEN,
            moe_intermediate_size=INTERMEDIATE,
            hidden_act="silu",
            _experts_implementation=implementation,
        )
        self.experts = Qwen3MoeExperts(config)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def _experts_case(label: str, tokens: int, device: str, dtype: str) -> Case:
    generator = torch.Generator().manual_seed(2)
    draws = [torch.randperm(EXPERTS, generator=generator)[:SLOTS] for _ in range(tokens)]
    index = torch.stack(draws).to(device)
    weights = torch.rand(tokens, SLOTS, generator=generator).to(device, getattr(torch, dtype))
    x = torch.randn(tokens, HIDDEN, generator=generator).to(weights).requires_grad_()

    def contender(model: Any, weights: Tensor = weights, alike: bool = True) -> Contender:
        return Contender(lambda x: (model(x, index, weights),), _lora_of(model), alike=alike)

    loop, grouped = (_expert_model(name, device, dtype) for name in ("eager", "grouped_mm"))
    every = {
        "frozen": contender(_expert_model("grouped_mm", device, dtype).unload(), alike=False),
        "peft": contender(loop),
        "peft, grouped_mm": contender(grouped),
        "ours": contender(_accelerated(_expert_model("grouped_mm", device, dtype))),
    }
    exact = contender(copy.deepcopy(loop).double(), weights.double()).function
    sizes = tokens * SLOTS, 2 * INTERMEDIATE, HIDDEN, EXPERT_RANK
    problem = Problem(*sizes, dtype, dtype, device, groups=EXPERTS, weights=EXPERTS)
    return Case(label, problem, x, every, exact, "peft")


def _expert_model(implementation: str, device: str, dtype: str) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = _Experts(implementation)
    for p in base.parameters():
        nn.init.normal_(p, 0.0, 1 / math.sqrt(p.shape[-1]))
    config = LoraConfig(
        r=EXPERT_RANK,
        lora_alpha=EXPERT_RANK,
        init_lora_weights=False,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    kind = getattr(torch, dtype)
    return get_peft_model(base.to(device, kind), config, autocast_adapter_dtype=False)  # type: ignore[arg-type]


def _lora_of(model: nn.Module) -> tuple[Tensor, ...]:
    return tuple(p for name, p in model.named_parameters() if "lora_" in name)


def _accelerated(model: Any) -> Any:
    from lora_kernels.integrations.peft import accelerate

    accelerate(model)
    return model


def _dora_case(label: str, M: int, device: str, dtype: str) -> Case:
    problem = Problem(M, DORA_WIDTH, DORA_WIDTH, RANK, dtype, dtype, device, bias=True)
    layer = contenders.make_layer(problem)
    x, _ = contenders.make_input(problem)
    models: list[Any] = [contenders.peft(layer, use_dora).function for use_dora in (True, False)]
    theirs, plain = models
    magnitude = theirs.lora_magnitude_vector["default"].weight
    with torch.no_grad():  # c is not 1
        magnitude.mul_(torch.linspace(0.5, 2.0, DORA_WIDTH).to(magnitude))
    m = magnitude.detach().clone().requires_grad_()
    operands = layer.weight, layer.A, layer.B, layer.alpha, layer.bias

    def contender(model: nn.Module, alike: bool = True) -> Contender:
        return Contender(lambda x: (model(x),), _lora_of(model), alike=alike)

    every = {
        "frozen": Contender(lambda x: (_frozen(x, layer),), alike=False),
        "lora": Contender(lambda x: (contenders.ours(x, layer),), (layer.A, layer.B), alike=False),
        "ours": Contender(
            lambda x: (lora_linear(x, *operands, magnitude=m),), (layer.A, layer.B, m)
        ),
        "peft": contender(theirs),
        "peft, lora": contender(plain, alike=False),
    }
    exact = contender(copy.deepcopy(theirs).double()).function
    return Case(label, problem, x, every, exact, "peft")
