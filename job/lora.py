"""Add LoRA adapters to the frozen model, count their parameters, and save them."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import transformers
from transformers.pytorch_utils import Conv1D

from job.quantize import hub_identity
from job.settings import Base, Lora
from job.training.targets import choose_targets
from job.types import ParameterCount

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def add_adapters(model: PreTrainedModel, settings: Lora, *, seed: int) -> peft.PeftModel:
    """Add LoRA adapters (Hu et al., 2021) to the target modules.

    The adapters are fp32 and the only trainable parameters. Raises InvalidInputError when the model has no layer of a
    configured name, or peft cannot adapt it with these settings.
    """
    targets = choose_targets(model, settings)
    # an integer where it is one, so that the same settings always write the same adapter_config.json; peft declares an
    # integer by convention, and only computes alpha / r
    alpha: Any = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=alpha,
        lora_dropout=settings.dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if settings.init == "true" else settings.init,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's transposed layers
        bias="none",
        task_type=peft.TaskType.CAUSAL_LM,
    )
    if targets.note and model.device.type != "meta":  # the estimate of memory is on no device
        log.info("lora: %s", targets.note)
    transformers.set_seed(seed)
    adapted = peft.get_peft_model(model, config)
    assert isinstance(adapted, peft.PeftModel)
    return adapted


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
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = hub_identity(base)
    config.init_lora_weights = True  # the weights are loaded, whatever they began as
    if isinstance(config.target_modules, set):  # its order differs from process to process
        config.target_modules = sorted(config.target_modules)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(str(folder))
