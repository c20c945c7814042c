"""The folder that holds an adapter, in PEFT's layout: written, read and checked.

A folder holds `adapter_config.json` and `adapter_model.safetensors`; a layer P has the tensors
`base_model.model.P.lora_A.weight` [rank, in] and `base_model.model.P.lora_B.weight` [out, rank]: our A and B, transposed.
PEFT's scale is lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA. A folder of DoRA layers ("use_dora") has their magnitudes
beside them, `base_model.model.P.lora_magnitude_vector` [out].
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_kernels.bases import is_sharded
from lora_kernels.modules import SCALINGS, LoRALayer, fits_float32

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?s)(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?:(?P<side>[AB])\.weight|magnitude_vector)"
)
_MAGNITUDE = "magnitude"
_SCRATCH = ".saving-"
_UNSUPPORTED = {  # fields of a PEFT configuration that change what a layer computes, with the value that does not
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
}
# Values of init_lora_weights with which PEFT, when it loads, leaves the base as it is: not PiSSA, OLoRA, CorDA and LoftQ.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "lora_ga", "mica")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and fits_float32(value)


_SETTINGS: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {  # PEFT's default, the rule
    "r": (8, "a positive integer", _is_rank),
    "lora_alpha": (8, "a number within float32", _is_number),
    "lora_dropout": (0.0, "a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1),
    "use_rslora": (False, "true or false", lambda value: isinstance(value, bool)),
    "use_dora": (False, "true or false", lambda value: isinstance(value, bool)),
}
_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}


@dataclass(frozen=True)
class Adapter:
    """One layer's part of a file."""

    A: Tensor  # [in, rank]
    B: Tensor  # [rank, out]
    scale: float
    dropout: float
    rslora: bool
    magnitude: Tensor | None  # [out] of DoRA


def write(
    path: str | os.PathLike[str], layers: Mapping[str, LoRALayer], fan_in_fan_out: bool
) -> Path:
    """Write the adapters of these names into a folder; both files are put in their places when both are complete.

    `fan_in_fan_out`: whether a base stores W transposed, as a Conv1D. One save at a time writes in a folder, where its file
    system has locks. What a killed save left behind is removed.
    """
    folder = _folder(path)
    if "" in layers:
        raise ValueError(
            "model must contain named layers to save, but it is itself one: put it in a module"
        )
    config = json.dumps(_config(layers, fan_in_fan_out), indent=2, sort_keys=True) + "\n"
    tensors = {}
    for name, lora in layers.items():
        parts = {"lora_A.weight": lora.A, "lora_B.weight": lora.B}
        if lora.magnitude is not None:
            parts["lora_magnitude_vector"] = lora.magnitude
        for part, t in parts.items():
            if t.is_meta:
                raise ValueError(
                    f"layer {name!r} must have values to save, but is on the meta device"
                )
            t = t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]
            turned = t.detach().t() if t.ndim == 2 else t.detach()
            copy = turned.clone(memory_format=torch.contiguous_format)
            tensors[f"{_PREFIX}{name}.{part}"] = copy.cpu()
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder) as alone:
        for left in folder.glob(_SCRATCH + "*") if alone else ():
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_SCRATCH) as scratch:
            weights_file, config_file = Path(scratch, WEIGHTS_FILE), Path(scratch, CONFIG_FILE)
            save_file(tensors, weights_file, metadata={"format": "pt", "adapter_config": config})
            config_file.write_text(config)
            os.replace(weights_file, folder / WEIGHTS_FILE)
            os.replace(config_file, folder / CONFIG_FILE)
    return folder


def _folder(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise TypeError(
            f"path must be a string or os.PathLike, got {type(path).__name__}"
        ) from None


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Wait until no other save, of any process or thread, writes in `folder`; False where folders cannot be locked."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)  # which unlocks it, as the end of the process does


def _config(layers: Mapping[str, LoRALayer], fan_in_fan_out: bool) -> dict[str, Any]:
    """PEFT's configuration of these layers: the commonest rank and alpha as defaults, the others as patterns."""
    dora = {lora.magnitude is not None for lora in layers.values()}
    if len(dora) > 1:
        raise ValueError(
            "the layers must all be DoRA or all plain LoRA: PEFT's layout has one use_dora"
        )
    rslora = all(lora.scaling == "alpha/sqrt(rank)" for lora in layers.values())
    ranks = {name: lora.rank for name, lora in layers.items()}
    convention = "alpha/sqrt(rank)" if rslora else "alpha/rank"
    alphas = {
        name: lora.alpha
        if lora.scaling == convention
        else alpha_for(lora.scale, convention, lora.rank)
        for name, lora in layers.items()
    }
    for name, alpha in alphas.items():
        if not fits_float32(alpha):
            raise ValueError(
                f"layer {name!r} must have an alpha within float32 where the scale is {convention}, got {alpha}"
            )
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    dropouts = [lora.dropout for lora in layers.values()]
    dropout = mode(dropouts)
    if len(set(dropouts)) > 1:
        warnings.warn(
            f"PEFT's layout has one lora_dropout: {dropout} is saved, the layers have {sorted(set(dropouts))}",
            stacklevel=4,
        )
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "lora_dropout": dropout,
        "bias": "none",
        # How the base stores W, which PEFT reads from the model: A and B are alike in both.
        "fan_in_fan_out": fan_in_fan_out,
        "use_dora": dora == {True},
        "modules_to_save": None,
        # Regular expressions that match these names whole: PEFT lets a plain name match the end of longer ones too.
        "target_modules": "|".join(re.escape(name) for name in layers),
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
    }


def read(path: str | os.PathLike[str]) -> dict[str, Adapter]:
    """The adapters in a folder by layer name; ValueError for anything that is damaged or of another kind."""
    folder = _folder(path)
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for file in (config_file, weights_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file} must exist: {folder} is not an adapter's folder")
    config = _parse(config_file.read_bytes(), str(config_file))
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f'{config_file} must have "peft_type": "LORA"')
    for key, plain in _UNSUPPORTED.items():
        if config.get(key, plain) not in (plain, [], None):
            raise ValueError(f"{config_file}: {key} must be {plain!r}, got {config[key]!r}")
    if (init := config.get("init_lora_weights")) not in _INITS:
        raise ValueError(
            f"{config_file}: init_lora_weights must be one of {_INITS}, which leave the base as it is, got {init!r}"
        )
    try:
        with safe_open(weights_file, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights_file} must be a safetensors file: {error}") from None
    copy = metadata.get("adapter_config")
    if (
        copy is not None
        and _parse(copy, f"{weights_file}: the copy of the configuration") != config
    ):
        raise ValueError(
            f"{folder} must come from one save, but its two files are of different ones"
        )
    return _by_layer(_pairs(tensors, weights_file), _settings(config, config_file), weights_file)


def _parse(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON: {error}") from None


def _settings(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The fields that this file reads, with PEFT's defaults; ValueError for a value that PEFT's field cannot have."""
    settings = {}
    for field, (default, rule, holds) in _SETTINGS.items():
        settings[field] = config.get(field, default)
        if not holds(settings[field]):
            raise ValueError(f"{file}: {field} must be {rule}, got {settings[field]!r}")
    for field, of in _PATTERNS.items():
        patterns = config.get(field)
        settings[field] = patterns = {} if patterns is None else patterns
        if not isinstance(patterns, dict):
            raise ValueError(f"{file}: {field} must be an object, got {patterns!r}")
        _, rule, holds = _SETTINGS[of]
        for pattern, value in patterns.items():
            try:
                _end_of_name(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"{file}: {field} must have regular expressions as keys, got {pattern!r}: {error}"
                ) from None
            if _ways(f"({pattern})") > _MOST_WAYS:
                raise ValueError(
                    f"{file}: {field} must have patterns that are tried in at most {_MOST_WAYS} ways (a choice of n "
                    f"counts n, a repeat of a character {_REPEAT}, no repeat of a group, no (? but (?:), got {pattern!r}"
                )
            if not holds(value):
                raise ValueError(f"{file}: {field}[{pattern!r}] must be {rule}, got {value!r}")
    return settings


def _pairs(tensors: dict[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """A, B and the magnitude of each layer."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{file}: every tensor must be a LoRA A or B or a DoRA magnitude, got {key!r}"
            )
        side = match["side"] or _MAGNITUDE
        if tensor.ndim != (1 if side == _MAGNITUDE else 2) or tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{file}: {key!r} must be a {'vector' if side == _MAGNITUDE else 'matrix'} of one of {_DTYPES}, "
                f"got {list(tensor.shape)} of {tensor.dtype}"
            )
        pair = pairs.setdefault(match["layer"], {})
        if side in pair:
            raise ValueError(
                f"{file}: layer {match['layer']!r} must be there once, "
                f"but is there with and without {_PREFIX!r}"
            )
        pair[side] = tensor.t() if tensor.ndim == 2 else tensor
    if not pairs:
        raise ValueError(f"{file} must hold at least one layer, but it is empty")
    return pairs


def _by_layer(
    pairs: dict[str, dict[str, Tensor]], settings: dict[str, Any], file: Path
) -> dict[str, Adapter]:
    rslora = settings["use_rslora"]
    adapters = {}
    for name, pair in pairs.items():
        wanted = {"A", "B", _MAGNITUDE} if settings["use_dora"] else {"A", "B"}
        if set(pair) != wanted:
            dora = (
                " and a magnitude, as use_dora says"
                if settings["use_dora"]
                else " and no magnitude"
            )
            raise ValueError(
                f"{file}: layer {name!r} must have both A and B{dora}, has only {list(pair)}"
            )
        if _MAGNITUDE in pair and len(pair[_MAGNITUDE]) != pair["B"].shape[1]:
            raise ValueError(
                f"{file}: layer {name!r} must have a magnitude for each of {pair['B'].shape[1]} outputs,"
                f" got {len(pair[_MAGNITUDE])}"
            )
        A, B = pair["A"], pair["B"]
        rank, alpha = (_setting(settings, field, name) for field in _PATTERNS)
        if A.shape[1] != rank or B.shape[0] != rank:
            raise ValueError(
                f"{file}: layer {name!r} must have rank {rank} as its configuration says, "
                f"got A {list(A.shape)} and B {list(B.shape)}"
            )
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        rest = settings["lora_dropout"], rslora, pair.get(_MAGNITUDE)
        adapters[name] = Adapter(A, B, scale, *rest)
    return adapters


def _setting(settings: dict[str, Any], field: str, name: str) -> Any:
    """PEFT's rule: the value of the first pattern that matches the name or its end after a dot, else the name's own."""
    patterns = settings[field]
    for pattern, value in patterns.items():
        if _end_of_name(pattern).match(name):
            return value
    return patterns.get(name, settings[_PATTERNS[field]])


def _end_of_name(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


# A name of 40 characters has 9880 places for three repeats: some milliseconds for a pattern that fails.
_REPEAT, _MOST_WAYS = 32, 50_000
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:?|.", re.DOTALL)


def _ways(pattern: str) -> float:
    """An upper estimate of the ways in which a valid regular expression is tried before it fails, to bound its time."""
    outer: list[tuple[int, int]] = []
    choices, ways = 0, 1  # of the branches before and of this branch of the group
    after_group = False
    for token in _TOKEN.findall(pattern):
        if token == "(?" or (after_group and token in ("*", "+", "{")):
            return math.inf
        if token[0] == "(":
            outer.append((choices, ways))
            choices, ways = 0, 1
        elif token == ")":
            inside = choices + ways
            choices, ways = outer.pop()
            ways *= inside
        elif token == "|":
            choices, ways = choices + ways, 1
        elif token in ("*", "+", "{"):
            ways *= _REPEAT
        elif token == "?":
            ways *= 2
        if choices + ways > _MOST_WAYS:
            return math.inf
        after_group = token == ")"
    return choices + ways


def alpha_for(scale: float, scaling: str, rank: int) -> float:
    """The alpha whose scale is `scale` under a convention; an integer where it is one."""
    alpha = scale / SCALINGS[scaling](1.0, rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
