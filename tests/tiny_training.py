"""Models, examples and runs on which training takes a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from conftest import CPU

from job.dataset.tokenization import IGNORE_INDEX
from job.freeze import freeze
from job.lora import add_adapters
from job.quantize import load_model, load_tokenizer
from job.runs.run_folder import RunFolder
from job.settings import Base, Lora, Train
from job.system.device import ComputeSpec
from job.train import train
from job.types import EncodedExample, TrainResult


def make_examples(n: int, *, label_all: bool = False) -> list[EncodedExample]:
    """Examples of many lengths; the last tokens carry loss, or all."""
    generator = torch.Generator().manual_seed(n)
    examples = []
    for i in range(n):
        ids = torch.randint(10, 500, (5 + (7 * i) % 23,), generator=generator).tolist()
        unlabelled = 0 if label_all else len(ids) - 2 - i % 3
        examples.append(EncodedExample(ids, [IGNORE_INDEX] * unlabelled + ids[unlabelled:]))
    return examples


def make_model(
    folder: Path,
    quantize: str = "none",
    *,
    dropout: float = 0.0,
    std: float = 0.02,
    compute: ComputeSpec = CPU,
    **lora: object,
) -> peft.PeftModel:
    """A base model with adapters; `std` is that of lora_B, which is zero at first and would hide lora_A."""
    model = load_model(Base.model_validate({"model": str(folder), "quantize": quantize}), compute)
    freeze(model)
    model = add_adapters(model, Lora.model_validate({"dropout": dropout, **lora}), seed=42)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=std)
    return model


def make_run(path: Path) -> RunFolder:
    manifest = {"schema_version": 1, "status": "running", "settings": {}, "dataset": {"fingerprint": "f"}}
    run = RunFolder(path, {**manifest, "versions": {}, "timings": {}})
    run.begin("cpu")
    return run


def train_tiny(
    path: Path,
    base: Path,
    *,
    model: peft.PeftModel | None = None,
    examples: Sequence[EncodedExample] | None = None,
    **settings: object,
) -> TrainResult:
    """Train for six steps on 20 examples, by default, in the run folder `path`."""
    defaults = {"max_steps": 6, "warmup_steps": 2, "logging_steps": 2, "save_steps": 2}
    return train(
        model or make_model(base),
        make_examples(20) if examples is None else examples,
        Train.model_validate({**defaults, **settings}),
        tokenizer=load_tokenizer(Base(model=str(base))),
        compute=CPU,
        run=make_run(path),
    )


def read_log(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def trained_weights(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
