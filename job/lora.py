"""Add LoRA adapters to the frozen model, count their parameters, and save them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from job.errors import InvalidInputError
from job.quantize import hub_identity
from job.settings import Base, Lora
from job.types import ParameterCount

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALL_LINEAR = "all-linear"


def add_adapters(model: PreTrainedModel, settings: Lora, *, seed: int) -> peft.PeftModel:
    """Add LoRA adapters (Hu et al., 2021) to the target modules.

    The adapters are fp32 and the only trainable parameters. Raises InvalidInputError when the model has no
    module of a configured name, or peft knows no default targets for its architecture.
    """
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft only computes alpha / r; it declares an integer by convention
        lora_dropout=settings.dropout,
        target_modules=_target_modules(model, settings),
        bias="none",
        task_type=peft.TaskType.CAUSAL_LM,
    )
    transformers.set_seed(seed)
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise InvalidInputError(
            f"TAGGER_LORA_TARGETS={','.join(settings.targets or ())} does not fit the model: {error}"
        ) from error
    assert isinstance(adapted, peft.PeftModel)
    return adapted


def _target_modules(model: PreTrainedModel, settings: Lora) -> list[str] | str:
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
    if settings.targets == (ALL_LINEAR,):
        return ALL_LINEAR
    if settings.targets is not None:
        missing = [target for target in settings.targets if target.rpartition(".")[2] not in names]
        if missing:
            raise InvalidInputError(
                f"TAGGER_LORA_TARGETS: the model has no module named {', '.join(missing)}; "
                f"it has {', '.join(sorted(names))}"
            )
        return list(settings.targets)
    architecture = model.config.model_type
    if architecture not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise InvalidInputError(
            f"peft knows no default LoRA targets for the architecture {architecture!r}; set TAGGER_LORA_TARGETS "
            f"to all-linear or to some of {', '.join(sorted(names))}"
        )
    return list(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[architecture])


def count_parameters(model: peft.PeftModel) -> ParameterCount:
    """Count trainable and all parameters as peft does, which counts each value of a packed 4-bit weight."""
    return ParameterCount(*model.get_nb_trainable_parameters())


def digest(model: peft.PeftModel) -> str:
    """Return the SHA-256 of the adapters' weights."""
    sha256 = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            sha256.update(parameter.detach().cpu().numpy().tobytes())
    return sha256.hexdigest()


def save_adapter(model: peft.PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, base: Base) -> None:
    """Save adapter and tokenizer into `folder`, with the base model's name and revision on the Hub.

    The embedding is never trained, so it is not saved. To find that out by itself, peft would send a request
    to the Hub.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = hub_identity(base)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(str(folder))
