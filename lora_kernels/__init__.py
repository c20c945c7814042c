"""Fused LoRA layers: y = x·W + bias + alpha·(x·A)·B, forward and backward."""

from lora_kernels.adapters import load_adapter, save_adapter
from lora_kernels.functional import explain, lora_linear
from lora_kernels.grouped import grouped_lora_linear
from lora_kernels.merge import merge_lora, unmerge_lora
from lora_kernels.mixed import LinearWithAdapters, mixed_lora_linear
from lora_kernels.modules import (
    LinearWithLoRA,
    LoRALayer,
    freeze_base,
    lora_parameters,
    lora_state_dict,
    replace_linear_with_lora,
)
from lora_kernels.named import (
    add_adapter,
    load_named_adapter,
    remove_adapter,
    save_named_adapter,
    select_adapters,
)
from lora_kernels.plan import Plan as Explanation
from lora_kernels.plan import use_backend
from lora_kernels.problem import Problem
from lora_kernels.projections import Projection, lora_projections
from lora_kernels.siblings import fuse_projections, unfuse_projections

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "LinearWithAdapters",
    "LinearWithLoRA",
    "LoRALayer",
    "Problem",
    "Projection",
    "add_adapter",
    "explain",
    "freeze_base",
    "fuse_projections",
    "grouped_lora_linear",
    "load_adapter",
    "load_named_adapter",
    "lora_linear",
    "lora_parameters",
    "lora_projections",
    "lora_state_dict",
    "merge_lora",
    "mixed_lora_linear",
    "remove_adapter",
    "replace_linear_with_lora",
    "save_adapter",
    "save_named_adapter",
    "select_adapters",
    "unfuse_projections",
    "unmerge_lora",
    "use_backend",
]
