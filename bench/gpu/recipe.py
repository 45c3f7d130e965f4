"""The complete job as a user starts it: from the command to the first step, to the end, and what that costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.gpu.harness import Row, Rows
from bench.gpu.models import BLOOM, Work, config, random_weights
from bench.gpu.texts import make_tokenizer, quotes
from job.cloud.gpus import GPUS, price_per_second

ROOT = Path(__file__).parents[2]
SHOWN_PRICES = ("T4", "L4", "A10", "A100", "H100")
"""GPUs whose price is shown where the device is not in the table."""


def base_folder(work: Work, shape: str) -> Path:
    """Save a model with random weights in fp16 and its tokenizer; return the folder."""
    from safetensors.torch import save_file

    folder = work.folder / "bases" / shape
    if folder.is_dir():
        return folder
    folder.mkdir(parents=True)
    model_config = config(shape, toy=work.toy)
    weights = work.weights.get(shape) or random_weights(model_config, work.device)
    tensors = {name: tensor.half().cpu() for name, tensor in weights.items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model_config.architectures = ["BloomForCausalLM" if model_config.model_type == "bloom" else "LlamaForCausalLM"]
    model_config.save_pretrained(folder)
    make_tokenizer(min(4000, model_config.vocab_size)).save_pretrained(folder)
    return folder


def command(work: Work, folder: Path, **settings: object) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of a job on quotes, without the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    data = work.folder / "quotes.jsonl"
    if not data.exists():
        rows = quotes(120 if work.toy else 2000)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    variables = {
        "TAGGER_BASE_MODEL": base_folder(work, BLOOM),
        "TAGGER_BASE_QUANTIZE": work.quantizations[0],
        "TAGGER_DATA_DATASET": data,
        "TAGGER_RUN_DEVICE": work.device.type,
        "TAGGER_RUN_DIR": folder / "runs",
        "TAGGER_RUN_ID": "check",
        "TAGGER_HUB_PUSH": "never",
        "HF_HUB_OFFLINE": 1,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **{f"TAGGER_{name.upper()}": value for name, value in settings.items()},
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TAGGER_")}
    return [sys.executable, "-m", "job"], environment | {name: str(value) for name, value in variables.items()}


def check_recipe(work: Work) -> Rows:
    """Run the job with the recipe's settings in a process of its own, and measure it from outside."""
    steps = 6 if work.toy else work.complete_steps
    eval_size = 8 if work.toy else min(100, steps)
    folder = work.folder / "recipe"
    small = {"train_max_steps": steps, "train_warmup_steps": steps // 2, "data_eval_size": eval_size}
    words, environment = command(work, folder, **small)
    work.release()
    started = time.monotonic()
    first: float | None = None
    lines = []
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=folder, env=environment, text=True, **pipes) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if first is None and "step 1/" in line:
                first = time.monotonic() - started
        process.wait()
    seconds = time.monotonic() - started
    if process.returncode:
        yield Row("", False, f"ended with {process.returncode}: {' '.join(''.join(lines[-5:]).split())}")
        return
    manifest = json.loads((folder / "runs" / "check" / "manifest.json").read_text(encoding="utf-8"))
    timings = ", ".join(f"{name} {value:.1f}" for name, value in manifest["timings"].items())
    data = {"seconds": seconds, "first_step": first, "timings": manifest["timings"], "steps": steps}
    figure = f"{steps} steps and {eval_size} texts evaluated in {seconds:.0f} s, the first step after {first:.1f} s "
    figure += f"({timings}); peak {manifest['peak_memory']}; {_price(work.device, seconds)}"
    yield Row(f"{BLOOM}, {work.quantizations[0]}", manifest["status"] == "complete", figure, data)


def _price(device: torch.device, seconds: float) -> str:
    own = price_per_second(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if own is not None:
        return f"${own * seconds:.3f} at the list price"
    prices = ", ".join(f"{name} {GPUS[name].dollars_per_second * seconds:.3f}" for name in SHOWN_PRICES)
    return f"as many seconds of another GPU would cost, in dollars: {prices}"
