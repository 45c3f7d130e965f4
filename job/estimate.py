"""How much memory and disk a run will need, from the shapes alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from job import quantize
from job.lora import add_adapters, count_parameters
from job.settings import Settings
from job.system.device import ComputeSpec, gpu_unavailable_reason
from job.training.batching import num_label_tokens
from job.training.memory_budget import CUDA_OVERHEAD, GIB, LOGIT_BYTES, activation_bytes
from job.types import EncodedExample

CPU_PARAMETERS = 250_000_000
"""The largest base model that `auto` trains on a CPU. On two cores a step of SmolLM2-135M takes about 5 s and the
recipe a quarter of an hour, which grows with the size: beyond this, a GPU was meant to be there more often than not."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes at its largest micro-batch, and those that a run leaves on disk."""

    parameters: int
    """Of the base model."""
    weights: float
    adapters: float
    activations: float
    logits: float
    disk: float

    @property
    def memory(self) -> float:
        """Bytes on the device."""
        return self.weights + self.adapters + self.activations + self.logits

    def __str__(self) -> str:
        parts = {name: getattr(self, name) / GIB for name in ("weights", "adapters", "activations", "logits")}
        return f"{self.memory / GIB:.1f} GiB: " + ", ".join(f"{name} {size:.2f}" for name, size in parts.items())


def estimate(settings: Settings, machine: ComputeSpec, longest: Sequence[EncodedExample]) -> MemoryEstimate:
    """What a run with these settings needs, `longest` being its largest micro-batch.

    With recomputation, which `auto` falls back to, the layers' inputs alone are kept. An adapter parameter takes 16
    bytes (itself, its gradient, two moments of Adam), and four more if its mean is kept too.
    """
    model = quantize.meta_model(settings.base)
    config = model.config.get_text_config()
    with torch.device("meta"):
        head = model.get_output_embeddings()
        linear = sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        )
        rest = sum(parameter.numel() for parameter in model.parameters()) - linear
        trainable = count_parameters(add_adapters(model, settings.lora, seed=0)).trainable
    averaged = settings.train.weight_averaging > 0
    itemsize = machine.dtype.itemsize
    quantized = {"int8": 1.0, "nf4": 0.5625, "none": float(itemsize)}[settings.base.quantize]  # nf4: and its scales
    width = max(len(example.input_ids) for example in longest)
    tokens = len(longest) * width
    return MemoryEstimate(
        parameters=linear + rest,
        weights=linear * quantized + rest * itemsize,
        adapters=(16.0 + 4.0 * averaged) * trainable,
        activations=tokens
        * activation_bytes(config, width, itemsize, recompute=settings.train.gradient_checkpointing != "off"),
        logits=LOGIT_BYTES * num_label_tokens(longest) * config.vocab_size,
        # an adapter, two checkpoints with Adam's moments and the mean; the rest
        disk=4.0 * trainable * (1 + 2 * (3 + averaged)) + 64 * 2**20,
    )


def cpu_problems(need: MemoryEstimate, settings: Settings, machine: ComputeSpec) -> list[str]:
    """What is wrong if the model is one for a GPU and there is none, unless the CPU was asked for."""
    if settings.run.device != "auto" or machine.device.type != "cpu" or need.parameters <= CPU_PARAMETERS:
        return []
    return [
        f"{settings.base.model} has {need.parameters / 1e6:.0f} million parameters, TAGGER_RUN_DEVICE=auto trains "
        f"at most {CPU_PARAMETERS / 1e6:.0f} million on a CPU, and {gpu_unavailable_reason()}, "
        "or set TAGGER_RUN_DEVICE=cpu to train on the CPU all the same"
    ]


def memory_problems(need: MemoryEstimate, machine: ComputeSpec) -> list[str]:
    """What is wrong if the run does not fit into the GPU's free memory. Not asked of a CPU, which can swap."""
    if machine.device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(machine.device)
    if need.memory + CUDA_OVERHEAD <= free:
        return []
    return [
        f"one example at a time needs {need} and the GPU has {free / GIB:.1f} of {total / GIB:.1f} GiB free; lower "
        "TAGGER_DATA_MAX_LENGTH, leave TAGGER_TRAIN_GRADIENT_CHECKPOINTING at auto, or take a larger GPU"
    ]


def disk_problems(need: MemoryEstimate, folder: Path) -> list[str]:
    """What is wrong if the run's files do not fit on the disk."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need.disk <= free:
        return []
    return [
        f"the run leaves about {need.disk / GIB:.2f} GiB in {folder} and the disk has {free / GIB:.2f} GiB free; "
        "make room, or set TAGGER_RUN_DIR to another disk"
    ]
