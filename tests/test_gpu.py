"""The job on a real GPU: gradients, complete runs, interruption, memory.

Where PyTorch sees no GPU, what can only be checked on one is skipped, and the gradients in fp32 are checked on the CPU,
so that these checks still fit the job when a GPU is there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from conftest import SAYINGS, make_settings
from safetensors.torch import load_file

from bench.gpu.gradients import difference, own, plain
from bench.gpu.models import fill_adapters, texts_of_length
from job import pipeline
from job.dataset.tokenization import IGNORE_INDEX
from job.freeze import freeze
from job.lora import add_adapters
from job.quantize import load_model
from job.settings import Base, Lora
from job.system.device import ComputeSpec
from job.types import EncodedExample

ROOT = Path(__file__).parents[1]
HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="PyTorch sees no GPU on this machine")
pytestmark = pytest.mark.gpu


def gpu(precision: str) -> ComputeSpec:
    return ComputeSpec.resolve("cuda" if HAS_GPU else "cpu", precision)  # type: ignore[arg-type]


def examples(count: int = 11, vocabulary: int = 500, longest: int = 28) -> list[EncodedExample]:
    """Make texts of many lengths with labels on their last tokens."""
    generator = torch.Generator().manual_seed(count)
    made = []
    for i in range(count):
        ids = torch.randint(10, vocabulary, (5 + (7 * i) % (longest - 5),), generator=generator).tolist()
        unlabelled = len(ids) - 2 - i % 3
        made.append(EncodedExample(ids, [IGNORE_INDEX] * unlabelled + ids[unlabelled:]))
    return made


def adapted(folder: Path, quantize: str, compute: ComputeSpec) -> peft.PeftModel:
    model = load_model(Base.model_validate({"model": str(folder), "quantize": quantize}), compute)
    freeze(model)
    model = add_adapters(model, Lora(dropout=0.0), seed=42).train()
    fill_adapters(model)
    return model


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_gradients_in_fp32_equal_plain_transformers_and_peft(
    request: pytest.FixtureRequest, architecture: str, quantize: str, recompute: bool
) -> None:
    compute = gpu("fp32")
    model = adapted(request.getfixturevalue(architecture), quantize, compute)
    loss, expected = plain(model, examples(), compute)
    own_loss, found = own(model, examples(), compute, recompute=recompute)
    print(f"{own_loss=} {loss=} {difference(found, expected)=:.2e}")
    # int8 rounds activations: a difference in the last bit of a float can become one of a complete step
    assert own_loss == pytest.approx(loss, rel=1e-3 if quantize == "int8" else 1e-5)
    assert difference(found, expected) < (2e-2 if quantize == "int8" else 1e-4)


@needs_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_half_precision_gradients_are_as_close_as_plain_ones(
    request: pytest.FixtureRequest, architecture: str, quantize: str, precision: str
) -> None:
    folder = request.getfixturevalue(architecture)
    _, exact = plain(adapted(folder, quantize, gpu("fp32")), examples(), gpu("fp32"))
    compute = gpu(precision)
    model = adapted(folder, quantize, compute)
    loss, expected = plain(model, examples(), compute)
    own_loss, found = own(model, examples(), compute)
    theirs, ours = difference(expected, exact), difference(found, exact)
    print(f"{own_loss=} {loss=} {theirs=:.2e} {ours=:.2e} {difference(found, expected)=:.2e}")
    assert own_loss == pytest.approx(loss, rel=1e-2)
    assert ours < max(1.3 * theirs, 1e-3)


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_micro_batches_change_no_gradient(request: pytest.FixtureRequest, architecture: str) -> None:
    compute = gpu("fp32")
    model = adapted(request.getfixturevalue(architecture), "none", compute)
    _, at_once = own(model, examples(), compute)
    _, in_parts = own(model, examples(), compute, limit=40)
    assert difference(in_parts, at_once) < 1e-4


@needs_gpu
@pytest.mark.parametrize(
    ("quantize", "precision"), [("int8", "auto"), ("nf4", "auto"), ("none", "auto"), ("int8", "fp16"), ("none", "fp32")]
)
def test_a_run_completes_and_its_reloaded_adapter_answers_alike(
    llama: Path, tmp_path: Path, quantize: str, precision: str
) -> None:
    wanted = {
        "base": {"model": str(llama), "quantize": quantize},
        "train": {"max_steps": 4, "warmup_steps": 1, "logging_steps": 1, "save_steps": 2, "precision": precision},
        "run": {"dir": tmp_path / "runs", "device": "cuda"},
    }
    summary = pipeline.run(make_settings(llama, tmp_path, **wanted))  # the last chapter compares the answers
    manifest = json.loads((summary.folder / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert torch.cuda.get_device_name() in manifest["device"]
    assert manifest["peak_memory"]["gpu_gib"] > 0


def command(llama: Path, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    variables = {
        "TAGGER_BASE_MODEL": str(llama),
        "TAGGER_DATA_DATASET": str(SAYINGS),
        "TAGGER_DATA_LIMIT": "60",
        "TAGGER_DATA_EVAL_SIZE": "8",
        "TAGGER_TRAIN_MAX_STEPS": "120",
        "TAGGER_TRAIN_SAVE_STEPS": "50",
        "TAGGER_TRAIN_LOGGING_STEPS": "10",
        "TAGGER_SAMPLE_MAX_NEW_TOKENS": "12",
        "TAGGER_RUN_DEVICE": "cuda",
        "TAGGER_RUN_ID": "tiny",
        "TAGGER_HUB_PUSH": "never",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return [sys.executable, "-m", "job"], os.environ | variables


@needs_gpu
def test_sigterm_saves_within_ten_seconds_and_the_run_resumes(llama: Path, tmp_path: Path) -> None:
    words, environment = command(llama, tmp_path)
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 60/120" in line:
                process.send_signal(signal.SIGTERM)
                break
        sent = time.monotonic()
        rest = process.stderr.read()
        process.wait()
    assert process.returncode == 75, rest
    assert time.monotonic() - sent < 10
    again = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    resumed = re.search(r"resuming after step (\d+) of 120", again.stderr)
    assert resumed and int(resumed[1]) >= 60, again.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs" / "tiny" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, *range(10, 121, 10)]


@needs_gpu
@pytest.mark.parametrize("quantize", ["int8", "none"])
def test_two_processes_on_one_gpu_train_what_one_trains(llama: Path, tmp_path: Path, quantize: str) -> None:
    """Start them as a launcher would that does not count GPUs; each sees the same one."""
    words, environment = command(llama, tmp_path)
    environment |= {"TAGGER_TRAIN_MAX_STEPS": "20", "TAGGER_TRAIN_MICRO_BATCH_TOKENS": "300"}
    environment["TAGGER_BASE_QUANTIZE"] = quantize
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    started = {}
    for folder, more in {"alone": {}, "0": {"RANK": "0", **meeting}, "1": {"RANK": "1", **meeting}}.items():
        (tmp_path / folder).mkdir()
        started[folder] = subprocess.Popen(
            words, cwd=tmp_path / folder, env=environment | more, stderr=subprocess.PIPE, text=True
        )
    errors = {folder: process.communicate()[1] for folder, process in started.items()}
    assert [process.returncode for process in started.values()] == [0, 0, 0], errors
    runs = [tmp_path / folder / "runs" / "tiny" for folder in ("alone", "0")]
    alone, together = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    apart = {name: float((together[name] - tensor).abs().max()) for name, tensor in alone.items()}
    print(f"{max(apart.values())=:.2e}, bitwise equal: {all(torch.equal(together[n], alone[n]) for n in alone)}")
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-5)
    losses = [[json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@needs_gpu
def test_training_survives_running_out_of_gpu_memory(llama: Path, tmp_path: Path) -> None:
    """Train in a process that may use 60 MB of GPU memory in addition to the model."""
    done = subprocess.run(
        [sys.executable, __file__, str(llama), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "train: out of memory; micro-batches now have at most" in done.stderr
    enough, scarce = (json.loads(line) for line in done.stdout.splitlines())
    assert scarce["loss"] == pytest.approx(enough["loss"], rel=1e-3)
    assert scarce["micro_batch_tokens"] < 25_000


def train_with_little_memory(folder: Path, scratch: Path) -> None:
    import gc

    from job.quantize import load_tokenizer
    from job.runs.run_folder import RunFolder
    from job.settings import Train
    from job.system import logging_setup
    from job.train import train

    logging_setup.configure()
    compute = gpu("fp32")
    long = texts_of_length(64, 400)
    for micro_batch_tokens in (1000, 100_000):
        manifest = {"schema_version": 1, "status": "running", "settings": {}, "dataset": {"fingerprint": "f"}}
        run = RunFolder(scratch / str(micro_batch_tokens), {**manifest, "versions": {}, "timings": {}})
        run.begin("cuda")
        model = adapted(folder, "none", compute)
        settings = Train(
            max_steps=2,
            warmup_steps=0,
            batch_size=64,
            gradient_accumulation_steps=1,
            micro_batch_tokens=micro_batch_tokens,
        )
        if micro_batch_tokens == 100_000:
            gc.collect()
            torch.cuda.empty_cache()
            most = torch.cuda.memory_reserved() + 60 * 2**20
            torch.cuda.set_per_process_memory_fraction(most / torch.cuda.mem_get_info()[1])
        trained = train(
            model, long, settings, tokenizer=load_tokenizer(Base(model=str(folder))), compute=compute, run=run
        )
        print(
            json.dumps(
                {"loss": trained.last_loss, "micro_batch_tokens": run.manifest["batch_plan"]["micro_batch_tokens"]}
            )
        )


if __name__ == "__main__":
    train_with_little_memory(Path(sys.argv[1]), Path(sys.argv[2]))
