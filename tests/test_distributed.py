"""Several processes train the adapter that one would have trained, and a lost one loses no complete step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU
from processes import LOST, Processes, free_port, run_together
from tiny_training import make_examples, make_model, make_run, read_log, train_tiny, trained_weights

from job import train
from job.distributed import group as groups
from job.distributed.group import Group, PeerLost, compare, connect, prefixed
from job.errors import InvalidInputError
from job.quantize import load_tokenizer
from job.settings import Base, Train
from job.training import checkpoints, gradients
from job.training.gradients import GradientComputer

DEFAULTS = {"max_steps": 6, "warmup_steps": 2, "logging_steps": 2, "save_steps": 2, "micro_batch_tokens": 60}


def train_in(group: Group | None, base: Path, path: Path, quantize: str = "none", **settings: Any) -> dict[str, Any]:
    """Train as process 0, or help it; return a digest of what came of it."""
    model = make_model(base, quantize, dropout=0.1)
    values = Train.model_validate({**DEFAULTS, **settings})
    inputs: dict[str, Any] = {"tokenizer": load_tokenizer(Base(model=str(base))), "compute": CPU}
    if group is None or group.rank == 0:
        train.train(model, make_examples(20), values, run=make_run(path), exchange=group, **inputs)
    else:
        train.follow(model, make_examples(20), values, exchange=group, **inputs)
    return {name: tensor.flatten().tolist() for name, tensor in trained_weights(model).items()}


@pytest.mark.parametrize("quantize", ["int8", "nf4", "none"])
def test_two_processes_train_bitwise_what_one_trains(llama: Path, tmp_path: Path, quantize: str) -> None:
    alone = train_in(None, llama, tmp_path / "1", quantize)
    together = run_together(2, lambda group: train_in(group, llama, tmp_path / "2", quantize), tmp_path / "out")
    assert together == alone
    assert read_log(tmp_path / "2") == read_log(tmp_path / "1")


@pytest.mark.parametrize(("size", "quantize"), [(3, "none"), (5, "none"), (5, "int8"), (5, "nf4")])
def test_every_number_of_processes_trains_the_same(llama: Path, tmp_path: Path, size: int, quantize: str) -> None:
    """With five processes, some have no micro-batch; all have the trained weights at the end."""
    alone = train_in(None, llama, tmp_path / "1", quantize, weight_averaging=0.5)
    processes = Processes(
        size, lambda group: train_in(group, llama, tmp_path / "n", quantize, weight_averaging=0.5), tmp_path / "out"
    )
    assert processes.wait() == [0] * size
    for rank in range(size):
        assert processes.result(rank) == alone, rank


@pytest.mark.parametrize("quantize", ["int8", "nf4", "none"])
def test_without_a_set_size_the_split_differs_only_in_rounding(llama: Path, tmp_path: Path, quantize: str) -> None:
    def train_with(size: int) -> Any:
        def work(group: Group | None) -> Any:
            return train_in(group, llama, tmp_path / str(size), quantize, micro_batch_tokens=None)

        return work(None) if size == 1 else run_together(size, work, tmp_path / f"out-{size}")

    weights = {}
    for size in (1, 2, 3, 5):
        weights[size], path = train_with(size), tmp_path / str(size)
        plan = json.loads((path / "manifest.json").read_text())["batch_plan"]
        assert plan["parts"] == size
    for size in (2, 3, 5):
        for name, values in weights[1].items():
            found = torch.tensor(weights[size][name])
            torch.testing.assert_close(found, torch.tensor(values), rtol=1e-4, atol=1e-6)


def test_a_run_resumes_with_another_number_of_processes(llama: Path, tmp_path: Path) -> None:
    """The split is that of the number that the run began with."""

    def resumed(group: Group | None, path: Path) -> Any:
        return train_in(group, llama, path, micro_batch_tokens=None)

    begun = tmp_path / "begun"
    complete = run_together(2, lambda group: resumed(group, begun), tmp_path / "out")
    log = read_log(begun)
    shutil.rmtree(begun / "checkpoints" / "checkpoint-6")
    shutil.copytree(begun, tmp_path / "alone")
    assert resumed(None, tmp_path / "alone") == complete
    assert run_together(3, lambda group: resumed(group, begun), tmp_path / "out") == complete
    assert read_log(tmp_path / "alone") == log == read_log(begun)


def test_out_of_memory_in_one_process_is_answered_for_all(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a single process would do if memory ran out for the same micro-batch."""
    backward = GradientComputer._backward

    def scarce(self: GradientComputer, micro_batch: Any, step: int, *rest: Any) -> torch.Tensor:
        if step == 2 and 0 in micro_batch.indices and len(micro_batch.lengths) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(self, micro_batch, step, *rest)

    monkeypatch.setattr(gradients.GradientComputer, "_backward", scarce)
    alone = train_in(None, llama, tmp_path / "1")
    together = run_together(3, lambda group: train_in(group, llama, tmp_path / "3"), tmp_path / "out")
    assert together == alone
    plan = json.loads((tmp_path / "3" / "manifest.json").read_text())["batch_plan"]
    assert plan["micro_batch_tokens"] < 60
    assert plan == json.loads((tmp_path / "1" / "manifest.json").read_text())["batch_plan"]


def newest_step(path: Path) -> int:
    found = checkpoints.load_newest(path / "checkpoints")
    return 0 if found is None else found[1].step


def wait_for_log(path: Path) -> None:
    """Wait until some steps are complete; no checkpoint has been written by then."""
    deadline = time.monotonic() + 60
    while not (path / "log.jsonl").exists() or len(read_log(path)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_last_complete_step_is_saved(llama: Path, tmp_path: Path, victim: int) -> None:
    path, many = tmp_path / "run", {"max_steps": 10_000, "save_steps": 10_000}
    processes = Processes(2, lambda group: train_in(group, llama, path, **many), tmp_path / "out")
    wait_for_log(path)
    os.kill(processes.pids[victim], signal.SIGKILL)
    started = time.monotonic()
    codes = processes.wait()
    assert time.monotonic() - started < 10
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == LOST
    assert newest_step(path) >= 4 * victim, "process 0 saves the step at which it loses the other one"


def test_a_stopped_process_is_noticed(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.distributed.group.LOST_SECONDS", 3.0)
    path, many = tmp_path / "run", {"max_steps": 10_000, "save_steps": 10_000}
    processes = Processes(2, lambda group: train_in(group, llama, path, **many), tmp_path / "out")
    wait_for_log(path)
    os.kill(processes.pids[1], signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 20
        while os.waitid(os.P_PID, processes.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            assert time.monotonic() < deadline, "process 0 waits for a process that does not respond"
            time.sleep(0.05)
    finally:
        os.kill(processes.pids[1], signal.SIGKILL)
    assert processes.wait() == [LOST, -signal.SIGKILL]
    assert newest_step(path) >= 4


def test_messages_and_values_of_any_size_arrive(tmp_path: Path) -> None:
    messages = [{"do": "x"}, {"text": "ü" * 100_000}, {"n": 1.5, "list": [1, None]}, {"text": "a" * 4060}]

    def work(group: Group) -> Any:
        for message in messages:
            if group.rank == 0:
                group.send(message)
            else:
                assert group.receive() == message
        total = group.sum(torch.full((1000,), 2**40 + group.rank, dtype=torch.int64))
        return [group.gather(["é" * (10**group.rank), group.rank]), int(total[0])]

    assert run_together(3, work, tmp_path) == [[["é", 0], ["é" * 10, 1], ["é" * 100, 2]], 3 * 2**40 + 3]


def test_other_settings_in_one_process_are_refused_by_all(tmp_path: Path) -> None:
    def facts(rank: int) -> dict[str, str]:
        return {"TAGGER_LORA_R": str(16 + rank // 2), "torch": "2.13.0"}

    processes = Processes(3, lambda group: None, tmp_path, facts=facts)
    assert processes.wait() == [1, 1, 1]
    for rank in range(3):
        assert "TAGGER_LORA_R is 17 and not 16" in processes.error(rank), rank
        assert processes.error(rank).startswith("InvalidInputError: process 2 does not see what process 0 sees")


def test_an_address_that_does_not_respond_is_named_with_the_time_waited() -> None:
    with pytest.raises(InvalidInputError, match=r"127\.0\.0\.1:\d+ did not respond within [1-9]\d* s") as caught:
        connect("127.0.0.1", free_port(), hosts=False, seconds=1.0)
    assert len(str(caught.value)) <= 300


def test_a_process_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "HEAR_SECONDS", 0.1)
    store = connect("127.0.0.1", 0, hosts=True, seconds=5)
    with pytest.raises(InvalidInputError, match="process 1, 2 did not start within"):
        compare(prefixed(store, "x"), "process", 0, 3, {}, time.monotonic() + 0.2)


def test_losing_a_process_is_an_interruption() -> None:
    assert issubclass(PeerLost, KeyboardInterrupt)


def test_training_alone_needs_no_exchange(tmp_path: Path, llama: Path) -> None:
    train_tiny(tmp_path, llama)
    assert not torch.distributed.is_initialized()
