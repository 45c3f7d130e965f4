"""Models with random weights in the shapes of the recipe's bases, adapters, and texts of the lengths of quotes."""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from bench.gpu.harness import installed
from job.dataset.tokenization import IGNORE_INDEX
from job.system.device import ComputeSpec
from job.types import EncodedExample

BLOOM, SMOLLM2 = "bloomz-560m", "SmolLM2-135M"
SHAPES = (BLOOM, SMOLLM2)
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


@dataclass
class Work:
    """What the checks work on: the device, the size, and a folder that is deleted afterwards."""

    device: torch.device
    folder: Path
    toy: bool
    """Whether models are tiny and steps few: on a CPU."""
    steps: int = 4
    """Steps that the speed is measured over in a round."""
    rounds: int = 3
    """Rounds, in which all ways to train take turns."""
    complete_steps: int = 200
    """Steps of the complete recipe."""
    weights: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def precisions(self) -> list[str]:
        """The precisions that the device has; the first is the one that `auto` chooses."""
        if self.device.type == "cpu":
            return ["fp32", "bf16"]
        bf16 = ["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else []
        return [*bf16, "fp16", "fp32"]

    @property
    def quantizations(self) -> list[str]:
        """The quantizations that can be computed here."""
        return ["int8", "nf4", "none"] if installed("bitsandbytes") else ["none"]

    def compute(self, precision: str | None = None) -> ComputeSpec:
        """Return the device with a precision, by default that of `auto`."""
        return ComputeSpec(self.device, precision or self.precisions[0])  # type: ignore[arg-type]

    def model(self, shape: str, quantize: str, compute: ComputeSpec, *, dropout: float = 0.0) -> peft.PeftModel:
        """Return a model of a shape, with the same random weights each time, and adapters that are not zero."""
        if shape not in self.weights:
            self.weights[shape] = random_weights(config(shape, toy=self.toy), self.device)
        return adapted(config(shape, toy=self.toy), self.weights[shape], quantize, compute, dropout=dropout)

    def release(self) -> None:
        """Give back the memory that checks have left behind."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def config(shape: str, *, toy: bool) -> PreTrainedConfig:
    """Return the configuration of bloomz-560m or SmolLM2-135M, or a tiny one of its architecture."""
    if shape == BLOOM:
        size: dict[str, Any] = {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16}
        tiny: dict[str, Any] = {"vocab_size": 600, "hidden_size": 64, "n_layer": 2, "n_head": 4}
        return BloomConfig(**(tiny if toy else size), **SPECIAL)
    size = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    size |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    tiny = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    return LlamaConfig(**(tiny if toy else size), tie_word_embeddings=True, **SPECIAL)


def random_weights(config: PreTrainedConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Return random weights in fp32, on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return dict(model.state_dict())


def adapted(
    config: PreTrainedConfig,
    weights: dict[str, torch.Tensor],
    quantize: str,
    compute: ComputeSpec,
    *,
    dropout: float = 0.0,
) -> peft.PeftModel:
    """Load weights as `job.quantize` does, freeze them as `job.freeze`, and add the recipe's adapters."""
    from job.freeze import freeze

    architecture = BloomForCausalLM if isinstance(config, BloomConfig) else LlamaForCausalLM
    model = architecture.from_pretrained(
        None,
        config=config,
        state_dict=dict(weights),
        dtype=compute.dtype,
        device_map={"": compute.device},
        quantization_config=_quantization(quantize, compute.dtype),
    )
    freeze(model)
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[config.model_type]
    torch.manual_seed(42)
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=dropout, target_modules=list(targets), task_type=peft.TaskType.CAUSAL_LM
    )
    model = peft.get_peft_model(model, lora).train()
    fill_adapters(model)
    return model


def fill_adapters(model: torch.nn.Module) -> None:
    """Set every lora_B to random values: it starts at zero, and lora_A would get no gradient."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = torch.empty(parameter.shape).normal_(std=0.02)
            parameter.data.copy_(values)


def _quantization(quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantize == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return None


def dequantize(model: torch.nn.Module) -> None:
    """Replace each quantized layer by a linear layer with the same weights in fp32: the reference for it."""
    if not installed("bitsandbytes"):
        return
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear8bitLt):
                values, scale = int8_state(layer)
                weight = values.float() * (scale / 127)[:, None]
            elif isinstance(layer, Linear4bit):
                weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            else:
                continue
            linear = torch.nn.Linear(layer.in_features, layer.out_features, device="meta")
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            linear.bias = layer.bias
            setattr(parent, name, linear)


def int8_state(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the int8 weight of a layer [out, in] and the absolute maxima of its rows [out]."""
    if layer.weight.CB is not None:
        layer.init_8bit_state()
    return layer.state.CB, layer.state.SCB


def examples(
    count: int, *, seed: int = 0, vocabulary: int = 500, median: float = 45.0, longest: int = 256
) -> list[EncodedExample]:
    """Make texts of random tokens, as long as quotes (log-normal), with labels on the last tokens of each."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        length = min(longest, max(8, round(rng.lognormvariate(0, 0.6) * median)))
        ids = [rng.randrange(10, vocabulary) for _ in range(length)]
        labelled = min(length - 2, rng.randrange(3, 20))
        made.append(EncodedExample(ids, [IGNORE_INDEX] * (length - labelled) + ids[length - labelled :]))
    return made


def texts_of_length(count: int, length: int) -> list[EncodedExample]:
    """Make texts of one length with ten label tokens each."""
    ids = [[10 + (7 * i + j) % 500 for j in range(length)] for i in range(count)]
    return [EncodedExample(row, [IGNORE_INDEX] * (length - 10) + row[-10:]) for row in ids]
