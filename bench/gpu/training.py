"""The training loop on a GPU: fp16's overflow, memory that runs out, interruption and resume, a GPU that fails."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch

from bench.gpu.harness import Row, Rows
from bench.gpu.models import BLOOM, SHAPES, SPECIAL, Work, examples, texts_of_length
from job.system.device import ComputeSpec
from job.training.batching import num_label_tokens
from job.training.gradients import GradientComputer
from job.training.kernels import Kernels
from job.training.optimizer import LossScale, make_optimizer, update_weights
from job.types import EncodedExample

if TYPE_CHECKING:
    from job.runs.run_folder import RunFolder
    from job.training.gradients import StepRequest
    from job.types import TrainResult

Weights = dict[str, torch.Tensor]


def trained_weights(model: peft.PeftModel) -> Weights:
    """Return the weights of the adapters on the CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(first: Weights, second: Weights) -> float:
    """Return the largest absolute difference of two sets of weights; 0.0 if they are bitwise equal."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# ---- fp16's overflow -----------------------------------------------------------------------------------------------


def check_overflow(work: Work) -> Rows:
    """Start with a loss scale at which gradients overflow: these steps are skipped, the scale is halved each time."""
    precision = "fp16" if work.device.type == "cuda" else "fp32"
    compute = work.compute(precision)
    for shape in SHAPES:
        model = work.model(shape, "none", compute)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kernels = Kernels.for_device(work.device)
        computer = GradientComputer(model, SPECIAL["pad_token_id"], compute, seed=42)
        optimizer = make_optimizer(parameters, kernels)
        first = 2.0**30 if precision == "fp16" else 2.0**127
        loss_scale = LossScale(enabled=True)
        loss_scale.scale = first
        step, skipped, kept = examples(8), 0, True
        with computer.installed():
            while True:
                before, scale = trained_weights(model), loss_scale.scale
                batches = computer.split(step, limit=10**6)
                # gradients in fp32 are far from the largest number, so they are made larger
                labels: Any = num_label_tokens(step) * (1 if precision == "fp16" else 1e-6)
                sums = computer.compute(batches, step=0, label_tokens=labels, count=len(batches), loss_scale=scale)
                outcome = computer.exact.load(sums)
                finite = outcome.finite
                if finite:
                    norm = outcome.grad_norm
                    update_weights(optimizer, computer.exact.gradient, grad_norm=norm, learning_rate=1e-3)
                loss_scale.update(finite=finite)
                changed = largest_difference(trained_weights(model), before) > 0
                kept = kept and changed == finite and loss_scale.scale == (scale if finite else scale / 2)
                if finite or skipped == 60:
                    break
                skipped += 1
        passed = kept and 0 < skipped < 60
        figure = f"{skipped} steps skipped from a scale of {first:.1e}, then one taken at {scale:.1e}"
        yield Row(f"{shape}, {precision}", passed, figure, {"skipped": skipped, "scale": scale})


# ---- the loop ------------------------------------------------------------------------------------------------------


def make_run(folder: Path) -> RunFolder:
    """Return a run folder for the training loop alone."""
    from job.runs.run_folder import RunFolder

    manifest = {"schema_version": 1, "status": "running", "settings": {}, "dataset": {"fingerprint": "f"}}
    run = RunFolder(folder, {**manifest, "versions": {}, "timings": {}})
    run.begin("")
    return run


def train(
    model: peft.PeftModel,
    texts: Sequence[EncodedExample],
    compute: ComputeSpec,
    run: RunFolder,
    **settings: Any,
) -> TrainResult:
    """Train with the job's loop."""
    from types import SimpleNamespace

    from job import train as chapter
    from job.settings import Train

    tokenizer: Any = SimpleNamespace(pad_token_id=SPECIAL["pad_token_id"])
    defaults = {"warmup_steps": 0, "save_steps": 10**6, "logging_steps": 10**6, "learning_rate": 2e-4}
    wanted = Train.model_validate({**defaults, **settings})
    return chapter.train(model, texts, wanted, tokenizer=tokenizer, compute=compute, run=run)


# ---- memory that runs out ------------------------------------------------------------------------------------------


def check_out_of_memory(work: Work) -> Rows:
    """Let memory run out for real: the job halves micro-batches, recomputes, or ends with a sentence."""
    from job.errors import JobError

    texts = texts_of_length(8, 64 if work.toy else 1024)
    options = {"max_steps": 1, "batch_size": 8, "gradient_accumulation_steps": 1, "micro_batch_tokens": 10**5}
    enough = _train_within(work, texts, "enough", None, options)
    for name, share in (("halves", 0.45), ("recomputes", 0.3 / len(texts))):
        with caught_log() as lines:
            scarce = _train_within(work, texts, name, share * enough["peak"], options)
        # where recomputation is planned from the beginning, because memory is known to be scarce, it is not logged
        did = any("micro-batches now have" in entry for entry in lines) if name == "halves" else scarce["recompute"]
        close = abs(scarce["loss"] / enough["loss"] - 1) < 1e-3
        figure = f"{scarce['micro_batch_tokens']} tokens, recompute {scarce['recompute']}, loss {scarce['loss']:.4f} "
        figure += f"(with enough memory {enough['loss']:.4f})"
        yield Row(name, did and close, figure, scarce)
    try:
        # even recomputed, one of these texts takes more than the memory that the adapters need in any case
        _train_within(work, texts_of_length(1, 64 if work.toy else 8000), "gives up", 0.0, options)
    except JobError as error:
        yield Row("gives up", "out of memory with one example of" in str(error), str(error))
    else:
        yield Row("gives up", False, "training had enough memory")


def _train_within(
    work: Work, texts: Sequence[EncodedExample], name: str, above: float | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Train with so many bytes above those of the model; return loss, batch plan, and bytes used above the model."""
    compute = work.compute("fp32")
    model = work.model(SHAPES[1], "none", compute)
    run = make_run(work.folder / "oom" / name)
    work.release()
    with little_memory(work.device, model, above) as peak:
        result = train(model, texts, compute, run, **options)
        used = peak()
    plan = run.manifest["batch_plan"]
    return {"loss": result.last_loss, "peak": used, **plan}


@contextmanager
def little_memory(device: torch.device, model: peft.PeftModel, above: float | None) -> Iterator[Any]:
    """Leave so many bytes on the GPU, taken by a tensor that fills it; None leaves all.

    On a CPU, where the limit would hit the rest of the process too, larger micro-batches raise PyTorch's own error.
    Yields a function that returns the peak of the bytes used within the block.
    """
    if device.type == "cpu":
        with _limited_tokens(model, above) as largest:
            yield largest
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    filler = None
    if above is not None:
        # needed in any case: the adapters' gradients, exact sums and moments of Adam; and the allocator rounds up
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        room = above + 48 * trainable + 64 * 2**20
        filler = _fill(device, int(room))
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    try:
        yield lambda: torch.cuda.max_memory_allocated(device) - before
    finally:
        del filler
        torch.cuda.empty_cache()


def _fill(device: torch.device, room: int) -> list[torch.Tensor]:
    """Allocate all memory of the GPU but `room` bytes."""
    fillers: list[torch.Tensor] = []
    torch.cuda.empty_cache()
    while (excess := torch.cuda.mem_get_info(device)[0] - room) > 2**20:
        fillers.append(torch.empty(excess, dtype=torch.uint8, device=device))
        # the allocator gives memory of earlier CUDA graphs back only when an allocation fails
        with suppress(torch.OutOfMemoryError):
            torch.empty(2 * room + 2**30, dtype=torch.uint8, device=device)
        torch.cuda.empty_cache()
    return fillers


@contextmanager
def _limited_tokens(model: peft.PeftModel, above: float | None) -> Iterator[Any]:
    """Raise torch's error of a GPU for micro-batches of more than `above` tokens; with recomputation, eight times."""
    base: Any = model.get_base_model()
    largest = 0

    def forward(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        nonlocal largest
        tokens = inputs["input_ids"].numel()
        largest = max(largest, tokens)
        kept = tokens / 8 if base.is_activation_checkpointing else tokens
        if above is not None and kept > above:
            raise torch.OutOfMemoryError("CUDA out of memory (forged)")

    handle = base.base_model.register_forward_pre_hook(forward, with_kwargs=True)
    try:
        yield lambda: largest
    finally:
        handle.remove()


@contextmanager
def caught_log() -> Iterator[list[str]]:
    """Yield the lines that the job logs within the block."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("job")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


# ---- interruption and resume ---------------------------------------------------------------------------------------


def check_resume(work: Work) -> Rows:
    """Send SIGTERM in training, resume, and compare the adapter with that of a run without an interruption.

    Each step has the same texts in another order, so that where CUDA graphs are used, the uninterrupted run replays the
    steps from the third on, and the resumed run computes its first ones without a recording.
    """
    steps = 12
    texts = examples(8)
    for shape, quantize in ((BLOOM, work.quantizations[0]), (SHAPES[1], "none")):
        compute = work.compute()
        options = {"max_steps": steps, "batch_size": 4, "gradient_accumulation_steps": 2}
        folder = work.folder / f"resume-{shape}"
        runs = {}
        for name in ("uninterrupted", "repeated"):
            model = work.model(shape, quantize, compute, dropout=0.05)
            train(model, texts, compute, make_run(folder / name), **options)
            runs[name] = trained_weights(model)
            del model
        run = make_run(folder / "interrupted")
        model = work.model(shape, quantize, compute, dropout=0.05)
        stopped, seconds = _interrupt(model, texts, compute, run, options)
        del model
        model = work.model(shape, quantize, compute, dropout=0.05)
        with caught_log() as lines:
            train(model, texts, compute, run, **options)
        resumed = next((int(m[1]) for m in map(re.compile(r"resuming after step (\d+)").search, lines) if m), None)
        apart = largest_difference(trained_weights(model), runs["uninterrupted"])
        repeated = largest_difference(runs["repeated"], runs["uninterrupted"])
        figure = f"SIGTERM ended training after {seconds:.2f} s, resumed after step {resumed} of {steps}; adapter "
        figure += (
            _apart(apart, "the uninterrupted one's") + "; repeated without interruption, " + _apart(repeated, "it")
        )
        passed = stopped and resumed is not None and seconds < 8 and apart <= max(1e-5, 2 * repeated)
        data = {"difference": apart, "repeated": repeated, "seconds": seconds, "resumed_after": resumed}
        yield Row(f"{shape}, {quantize}, {compute.precision}", passed, figure, data)


def _apart(difference: float, what: str) -> str:
    return f"bitwise equal to {what}" if difference == 0 else f"differs from {what} by at most {difference:.1e}"


def _interrupt(
    model: peft.PeftModel,
    texts: Sequence[EncodedExample],
    compute: ComputeSpec,
    run: RunFolder,
    options: dict[str, Any],
) -> tuple[bool, float]:
    """Train until a SIGTERM that is sent in the middle of the sixth step; return whether it ended it, and how soon."""
    from job.runs import shutdown
    from job.training.gradients import StepComputer

    sent = 0.0
    compute_share = StepComputer.share

    def share(self: StepComputer, request: StepRequest, rank: int, size: int) -> torch.Tensor:
        if request.step == 5:
            threading.Thread(target=send).start()
        return compute_share(self, request, rank, size)

    def send() -> None:
        nonlocal sent
        sent = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)

    StepComputer.share = share  # type: ignore[method-assign]
    try:
        with shutdown.handled():
            train(model, texts, compute, run, **options)
    except KeyboardInterrupt:
        return True, time.monotonic() - sent
    finally:
        StepComputer.share = compute_share  # type: ignore[method-assign]
    return False, 0.0
