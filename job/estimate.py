"""Estimate the memory and disk that a run needs from the model's shapes alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.pytorch_utils import Conv1D

from job import quantize
from job.errors import InvalidInputError
from job.lora import add_adapters, count_parameters
from job.settings import Settings
from job.system.device import ComputeSpec, gpu_unavailable_reason
from job.training.batching import num_label_tokens
from job.training.memory_budget import CUDA_OVERHEAD, GIB, LOGIT_BYTES, activation_bytes, packed_layer_bytes
from job.types import EncodedExample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_PARAMETERS = 250_000_000
"""Largest base model, in parameters, that device `auto` trains on a CPU.

On two cores, a step of SmolLM2-135M takes about 5 s and the default recipe a quarter of an hour, and both grow with
the size of the model. For a larger model, a missing GPU is more likely a mistake than intended.
"""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory at the largest micro-batch, and bytes that a run writes to disk."""

    parameters: int
    """Number of parameters of the base model."""
    weights: float
    adapters: float
    activations: float
    logits: float
    disk: float

    @property
    def memory(self) -> float:
        """Bytes of memory on the device."""
        return self.weights + self.adapters + self.activations + self.logits

    def __str__(self) -> str:
        parts = {name: getattr(self, name) / GIB for name in ("weights", "adapters", "activations", "logits")}
        return f"{self.memory / GIB:.1f} GiB: " + ", ".join(f"{name} {size:.2f}" for name, size in parts.items())


def estimate(settings: Settings, compute: ComputeSpec, micro_batch: Sequence[EncodedExample]) -> MemoryEstimate:
    """Estimate what a run with these settings needs, where `micro_batch` is the largest one.

    With gradient checkpointing, which `auto` falls back to, only the inputs of the layers are kept. An adapter
    parameter takes 24 bytes (itself, its gradient and its exact sum, two moments of Adam), and 4 more if weights are
    averaged.
    Raises InvalidInputError when the base model's config.json cannot be read, or a setting does not fit the model.
    """
    if settings.lora.use_dora and settings.base.quantize == "int8" and compute.device.type == "cpu":
        raise InvalidInputError(  # peft 0.21 loses the scales of the int8 weights there, and the second step fails
            "TAGGER_LORA_USE_DORA cannot be used with TAGGER_BASE_QUANTIZE=int8 on a CPU; use nf4 or none, or a GPU"
        )
    linear, other, trainable, model = _count_parameters(settings)
    config = model.config.get_text_config()
    averaging = settings.train.weight_averaging > 0
    itemsize = compute.dtype.itemsize
    # nf4: half a byte, and an fp32 scale for each block of 64 weights
    linear_bytes = {"int8": 1.0, "nf4": 0.5625, "none": float(itemsize)}[settings.base.quantize]
    width = max(len(example.input_ids) for example in micro_batch)
    recompute = settings.train.gradient_checkpointing != "off" and model.supports_gradient_checkpointing
    if settings.train.gradient_checkpointing == "on" and not recompute:
        raise InvalidInputError(
            "TAGGER_TRAIN_GRADIENT_CHECKPOINTING=on: transformers cannot recompute the activations of the architecture "
            f"{model.config.model_type}; use auto or off"
        )
    layer_bytes = packed_layer_bytes(model, itemsize) if compute.device.type == "cuda" else None
    token_bytes = activation_bytes(config, width, itemsize, recompute=recompute, layer_bytes=layer_bytes)
    return MemoryEstimate(
        parameters=linear + other,
        weights=linear * linear_bytes + other * itemsize,
        adapters=(24.0 + 4.0 * averaging) * trainable,
        activations=len(micro_batch) * width * token_bytes,
        logits=LOGIT_BYTES * num_label_tokens(micro_batch) * config.vocab_size,
        # the adapter, two checkpoints with Adam's moments and the averaged weights, and 64 MiB for all other files
        disk=4.0 * trainable * (1 + 2 * (3 + averaging)) + 64 * 2**20,
    )


def _count_parameters(settings: Settings) -> tuple[int, int, int, PreTrainedModel]:
    """Count the parameters of the linear layers without the head, all others, and the adapters' trainable ones.

    The fourth value is the model, on the meta device.
    """
    model = quantize.meta_model(settings.base)
    with torch.device("meta"):
        head = model.get_output_embeddings()
        linear = sum(
            module.get_parameter("weight").numel()
            for module in model.modules()
            if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and module is not head
        )
        total = sum(parameter.numel() for parameter in model.parameters())
        trainable = count_parameters(add_adapters(model, settings.lora, seed=0)).trainable
    return linear, total - linear, trainable, model


def cpu_problems(need: MemoryEstimate, settings: Settings, compute: ComputeSpec) -> list[str]:
    """Report a base model that is too large for a CPU when there is no GPU, unless the settings choose the CPU."""
    if settings.run.device != "auto" or compute.device.type != "cpu" or need.parameters <= CPU_PARAMETERS:
        return []
    return [
        f"{settings.base.model} has {need.parameters / 1e6:.0f} million parameters, TAGGER_RUN_DEVICE=auto trains "
        f"at most {CPU_PARAMETERS / 1e6:.0f} million on a CPU, and {gpu_unavailable_reason(advice=True)}, "
        "or set TAGGER_RUN_DEVICE=cpu to train on the CPU all the same"
    ]


def memory_problems(need: MemoryEstimate, compute: ComputeSpec, processes: int = 1) -> list[str]:
    """Report a run that does not fit into the free memory of the GPU, or `processes` that do not fit into the CPU's.

    A single process on a CPU is not checked, because it can swap.
    """
    if compute.device.type != "cuda":
        total = compute.free_memory()
        if processes == 1 or need.memory * processes <= total:
            return []
        return [
            f"TAGGER_RUN_PROCESSES={processes}: each holds the base model and needs {need.memory / GIB:.1f} GiB, "
            f"and this machine has {total / GIB:.1f} GiB free; use at most {max(1, int(total // need.memory))}"
        ]
    free, total = torch.cuda.mem_get_info(compute.device)
    if need.memory + CUDA_OVERHEAD <= free:
        return []
    return [
        f"a micro-batch of one example needs {need} and the GPU has {free / GIB:.1f} of {total / GIB:.1f} GiB free; "
        "lower TAGGER_DATA_MAX_LENGTH, set TAGGER_TRAIN_GRADIENT_CHECKPOINTING=auto, or use a larger GPU"
    ]


def disk_problems(need: MemoryEstimate, folder: Path) -> list[str]:
    """Report a run whose files do not fit on the disk of `folder`, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if need.disk <= free:
        return []
    return [
        f"the run writes about {need.disk / GIB:.2f} GiB to {folder} and the disk has {free / GIB:.2f} GiB free; "
        "free some space, or set TAGGER_RUN_DIR to a folder on another disk"
    ]
