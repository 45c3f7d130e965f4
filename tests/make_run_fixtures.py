"""Write small run folders of this version into tests/fixtures, where the tests of later versions read them.

    PYTHONPATH=. .venv/bin/python tests/make_run_fixtures.py

Run it once for each release, and keep the folders of the earlier ones.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import conftest

from job import __version__, pipeline
from job.config import environment
from job.runs.run_folder import RunFolder

FIXTURES = Path(__file__).parent / "fixtures"
ENVIRONMENT = {
    "TAGGER_BASE_MODEL": "./tiny-llama",
    "TAGGER_BASE_QUANTIZE": "none",
    "TAGGER_DATA_DATASET": "package:job/dataset/sayings.jsonl",
    "TAGGER_DATA_LIMIT": "60",
    "TAGGER_DATA_EVAL_SIZE": "8",
    "TAGGER_DATA_MAX_LENGTH": "128",
    "TAGGER_LORA_R": "2",
    "TAGGER_TRAIN_MAX_STEPS": "4",
    "TAGGER_TRAIN_WARMUP_STEPS": "1",
    "TAGGER_TRAIN_LOGGING_STEPS": "1",
    "TAGGER_TRAIN_SAVE_STEPS": "2",
    "TAGGER_SAMPLE_PROMPTS": '["a song about rain"]',
    "TAGGER_SAMPLE_MAX_NEW_TOKENS": "8",
    "TAGGER_RUN_DEVICE": "cpu",
}
"""The settings of the runs. ./tiny-llama is the tiny Llama of conftest.py."""


def stop_after_a_checkpoint(run: RunFolder) -> None:
    if (run.checkpoints / "checkpoint-2").is_dir():
        raise KeyboardInterrupt


def main() -> None:
    there = FIXTURES / f"run-{__version__}"
    shutil.rmtree(there, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = [conftest.json.loads(line) for line in conftest.SAYINGS.read_text(encoding="utf-8").splitlines()]
        conftest.make_llama(conftest.make_llama_tokenizer(rows), Path("tiny-llama"))
        os.environ |= ENVIRONMENT
        for name in ("complete", "interrupted"):
            os.environ["TAGGER_RUN_ID"] = name
            try:
                pipeline.run(environment.load(), stop_after_a_checkpoint if name == "interrupted" else None)
            except KeyboardInterrupt:
                assert name == "interrupted"
            shutil.copytree(Path("runs", name), there / name, ignore=shutil.ignore_patterns("lock", "report.html"))
        shutil.rmtree(there / "complete" / "checkpoints" / "checkpoint-2")
    print(f"{there}: {sum(file.stat().st_size for file in there.rglob('*') if file.is_file()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
