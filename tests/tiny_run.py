"""A run that takes seconds: its variables, and what it reads from the local Hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SAYINGS
from hub import WRITE_TOKEN, Hub, Repo

from job.runs.objects import open_objects
from job.runs.stored_run import SEAL_VERSION, StoredRun

REPO = "ada/tiny-tagger"
TINY_ON_THE_HUB = {
    "TAGGER_BASE_MODEL": "tiny/llama",
    "TAGGER_BASE_QUANTIZE": "none",
    "TAGGER_DATA_DATASET": "tiny/sayings",
    "TAGGER_DATA_LIMIT": "100",
    "TAGGER_DATA_EVAL_SIZE": "30",
    "TAGGER_DATA_MAX_LENGTH": "128",
    "TAGGER_TRAIN_MAX_STEPS": "99",
    "TAGGER_TRAIN_WARMUP_STEPS": "1",
    "TAGGER_TRAIN_LOGGING_STEPS": "1",
    "TAGGER_TRAIN_SAVE_STEPS": "2",
    "TAGGER_SAMPLE_PROMPTS": '["a song about rain"]',
    "TAGGER_SAMPLE_MAX_NEW_TOKENS": "4",
    "TAGGER_RUN_DEVICE": "cpu",
    "TAGGER_HUB_REPO": REPO,
}
"""A run for `fill_hub` that is long enough to be interrupted."""


def fill_hub(hub: Hub, llama: Path) -> None:
    """Put the tiny base model and the sayings on a Hub."""
    base = hub.models["tiny/llama"] = Repo("tiny/llama", licence="apache-2.0")
    base.commit("main", "weights", {file.name: file.read_bytes() for file in llama.iterdir()})
    sayings = hub.datasets["tiny/sayings"] = Repo("tiny/sayings")
    sayings.commit("main", "data", {"train.jsonl": SAYINGS.read_bytes()})


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def store_manifest(store: str, run_id: str, content: bytes) -> None:
    """Put a run that has only a manifest into a store."""
    copy = StoredRun(open_objects(store), run_id)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "modified_ns": 0}
    copy.put(f"000001/files/{entry['sha256']}", content)
    seal = {"schema_version": SEAL_VERSION, "files": {"manifest.json": entry}}
    copy.put("000001/seals/000001.json", json.dumps(seal).encode())


def set_tiny_environment(monkeypatch: pytest.MonkeyPatch, llama: Path) -> pytest.MonkeyPatch:
    """Set the variables of a run that takes seconds."""
    variables = {
        "TAGGER_BASE_MODEL": str(llama),
        "TAGGER_DATA_DATASET": str(SAYINGS),
        "TAGGER_DATA_LIMIT": "60",
        "TAGGER_DATA_EVAL_SIZE": "8",
        "TAGGER_TRAIN_MAX_STEPS": "3",
        "TAGGER_TRAIN_WARMUP_STEPS": "1",
        "TAGGER_TRAIN_LOGGING_STEPS": "1",
        "TAGGER_SAMPLE_MAX_NEW_TOKENS": "12",
        "TAGGER_SAMPLE_PROMPTS": '["a song about rain", "two coins ->: "]',
        "TAGGER_RUN_DEVICE": "cpu",
        "TAGGER_RUN_ID": "tiny",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def move_to_hub(tiny: pytest.MonkeyPatch, hub: Hub, llama: Path) -> Hub:
    """Put base model and data set of the tiny run on a Hub, and set the variables that name them, repo and token."""
    fill_hub(hub, llama)
    pickle = {"pytorch_model.bin": b"never read", "own.py": b"never run"}
    hub.models["tiny/llama"].commit("main", "a pickle too", pickle)
    tiny.setenv("HF_TOKEN", WRITE_TOKEN)
    tiny.setenv("TAGGER_BASE_MODEL", "tiny/llama")
    tiny.setenv("TAGGER_DATA_DATASET", "tiny/sayings")
    tiny.setenv("TAGGER_HUB_REPO", REPO)
    tiny.setenv("TAGGER_HUB_RETRY_MINUTES", "0.02")
    return hub
