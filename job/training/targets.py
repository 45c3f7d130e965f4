"""The layers that get LoRA adapters: those that are configured, peft's defaults, or all linear layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import peft
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers.pytorch_utils import Conv1D

from job.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from job.settings import Lora

ALL_LINEAR = "all-linear"
CROSS_ATTENTION = r"(.*\.)?(encoder_attn|cross_attn|crossattention)(\..*)?"
"""Names of attention to an encoder, which BART's decoder has and a causal model never computes."""
MAX_NAMES = 12
"""Most names that a message lists."""


@dataclass(frozen=True)
class Targets:
    """The layers that get adapters, as peft's LoraConfig takes them."""

    modules: list[str]
    """Names of modules, each as long as it has to be to match no other layer."""
    parameters: list[str]
    """Names of parameters that hold a matrix for each expert."""
    note: str = ""
    """How they were chosen, where the user should know."""


def choose_targets(model: PreTrainedModel, settings: Lora) -> Targets:
    """Choose the targets for the settings.

    Without TAGGER_LORA_TARGETS these are peft's defaults for the architecture, or all linear layers where it has
    none. Raises InvalidInputError when the model has no layer of a configured name, or LoRA cannot adapt it.
    """
    layers = adaptable_layers(model)
    if settings.targets is None:
        return _default_targets(model, layers)
    if settings.targets == (ALL_LINEAR,):
        targets = Targets(_suffixes(model, layers), _leaves(_expert_matrices(model)))
    else:
        targets = _named_targets(model, settings, layers)
    if targets.parameters and (settings.dropout or settings.use_dora):
        needed = "TAGGER_LORA_DROPOUT=0" if settings.dropout else "TAGGER_LORA_USE_DORA=false"
        raise InvalidInputError(
            f"TAGGER_LORA_TARGETS: adapters on experts ({_listed(targets.parameters)}) need {needed}; set it, or "
            f"choose from {_listed(_suffixes(model, layers))}"
        )
    return targets


def adaptable_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers whose adapters have an effect, without the output head.

    Left out are attention to an encoder; the layers of a Mamba mixer after `in_proj`, whose kernels read their weights
    without calling them; layers of RWKV whose weights transformers divides for inference, without their adapters; and
    layers with names that peft takes for the experts'.
    """
    head = model.get_output_embeddings()
    mixers = {name for name, module in model.named_modules() if hasattr(module, "A_log") and hasattr(module, "in_proj")}
    experts = _names_of_experts(model)
    rescaled = ("attention.output", "feed_forward.value") if model.config.model_type == "rwkv" else ()
    return [
        name
        for name, module in model.named_modules()
        if _is_linear(module)
        and module is not head
        and not re.fullmatch(CROSS_ATTENTION, name)
        and not name.endswith(rescaled)
        and (name.rpartition(".")[0] not in mixers or name.endswith(".in_proj"))
        and _leaf(name) not in experts
    ]


def _is_linear(module: torch.nn.Module) -> bool:
    """Return whether a module is a linear layer, quantized or not, and no router, which also returns the choice."""
    return isinstance(module, (torch.nn.Linear, Conv1D)) and "Router" not in type(module).__name__


def _names_of_experts(model: PreTrainedModel) -> set[str]:
    """Return the names of linear layers that peft would replace by the parameters of experts.

    They are the names that the experts' layers had before transformers 5 stacked their weights.
    """
    leaves = {_leaf(name) for name, module in model.named_modules() if _is_linear(module)}
    config = peft.LoraConfig(target_modules=ALL_LINEAR)
    convert_peft_config_for_transformers(config, model, None)
    return leaves - set(config.target_modules or ()) if config.target_parameters else set()


def _default_targets(model: PreTrainedModel, layers: list[str]) -> Targets:
    architecture = model.config.model_type
    defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(architecture, [])
    pattern = defaults if isinstance(defaults, str) else rf"(.*\.)?({'|'.join(map(re.escape, defaults))})"
    if chosen := [name for name in layers if re.fullmatch(pattern, name)]:
        return Targets(_suffixes(model, chosen), [])
    names = _suffixes(model, layers)
    if not names:
        raise InvalidInputError(f"LoRA cannot adapt the architecture {architecture}: it has no linear layers")
    left_out = ""
    if _expert_matrices(model):
        left_out = " except the experts, which need TAGGER_LORA_TARGETS=all-linear and TAGGER_LORA_DROPOUT=0"
    note = f"peft has no default targets for {architecture}; adapters are on all linear layers{left_out}"
    return Targets(names, [], f"{note}: {', '.join(names)}")


def _named_targets(model: PreTrainedModel, settings: Lora, layers: list[str]) -> Targets:
    modules, matrices = dict(model.named_modules()), _expert_matrices(model)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    usable = [*layers, *(name for name, module in modules.items() if module in ends)]
    targets = Targets([], [])
    for target in settings.targets or ():
        if matches := [name for name in usable if _matches(name, target)]:
            uses_all = not any(re.fullmatch(CROSS_ATTENTION, name) for name in modules if _matches(name, target))
            targets.modules.extend([target] if uses_all else _suffixes(model, matches))
        elif any(_matches(name, target) for name in matrices):
            targets.parameters.append(target)
        else:
            why = _why_unusable(model, target)
            hint = _suffixes(model, layers) + ([] if settings.dropout or settings.use_dora else _leaves(matrices))
            raise InvalidInputError(f"TAGGER_LORA_TARGETS: {why}; choose from {_listed(hint)}")
    return targets


def _why_unusable(model: PreTrainedModel, target: str) -> str:
    if not any(_matches(name, target) for name, _ in model.named_modules()):
        return f"the model has no module named {target}"
    if _leaf(target) in _names_of_experts(model):
        return f"peft takes {target} for a former name of the experts"
    return f"{target} is no linear layer that the forward pass calls"


def _expert_matrices(model: PreTrainedModel) -> list[str]:
    """Return the names of parameters that hold one matrix for each expert."""
    return [name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name.split(".")[:-1]]


def _suffixes(model: PreTrainedModel, chosen: list[str]) -> list[str]:
    """Return the shortest ends of the names of `chosen` that match no other module, such as `q_proj`."""
    others = {name for name, _ in model.named_modules()} - set(chosen)
    by_end: dict[str, bool] = {}
    for name in chosen:
        parts = name.split(".")
        for start in range(len(parts) - 1, -1, -1):
            end = ".".join(parts[start:])
            if end not in by_end:
                by_end[end] = not any(_matches(other, end) for other in others)
            if by_end[end]:
                break
    return sorted(end for end, alone in by_end.items() if alone)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({_leaf(name) for name in names})


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
