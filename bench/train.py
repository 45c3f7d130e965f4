"""Measure the speed and memory of training: `python -m bench.train`, or `make bench`.

Every measurement runs in its own process, so that none inherits memory from another. Each round measures all
variants, and a variant is compared with the recipe of the same round, so that a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.bases import BASES, model_setting
from job.dataset import tokenization

WARM_UP = 1
"""Uncounted steps before the measured ones."""
KEY = ("base", "quantize", "variant", "round", "data", "steps", "seed", "device")
"""The fields that identify a measurement."""
BASELINE = "recipe"
COLUMNS = (
    *("variant", "real tokens/s", f"{BASELINE} = 1", "GiB above weights", f"{BASELINE} = 1"),
    *("share of peak", "first step, s"),
)

Record = dict[str, Any]


def main() -> None:
    from bench.variants import variants

    options = _parser(list(variants())).parse_args()
    if options.one:
        print(json.dumps(_measure(options)))
        return
    records: list[Record] = []
    for base in options.bases:
        for quantize in options.quantize:
            records += _rounds(base, quantize, options)
    print(report(records, options.variants))


def _parser(variants: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description="Measure the speed of training.")
    parser.add_argument("--bases", nargs="+", default=list(BASES), help=f"{', '.join(BASES)}, or a TAGGER_BASE_MODEL")
    parser.add_argument("--quantize", nargs="+", default=["int8", "none"], choices=["int8", "nf4", "none"])
    parser.add_argument("--variants", nargs="+", default=variants, choices=variants)
    parser.add_argument("--data", default="package:job/dataset/sayings.jsonl", help="a TAGGER_DATA_DATASET")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help=f"measured steps, after {WARM_UP} warm-up step")
    parser.add_argument("--seed", type=int, default=42, help="seed of the choice of examples")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="append measurements to FILE; skip those it has")
    parser.add_argument("--one", nargs=3, metavar=("BASE", "QUANTIZE", "VARIANT"), help="print one measurement as JSON")
    return parser


def _rounds(base: str, quantize: str, options: argparse.Namespace) -> list[Record]:
    done = _read(options.json)
    records = []
    for number in range(1, options.rounds + 1):
        for variant in options.variants:
            key = {"base": base, "quantize": quantize, "variant": variant, "round": number}
            key |= {name: getattr(options, name) for name in KEY if name not in key}
            record = next((r for r in done if all(r[name] == key[name] for name in KEY)), None)
            record = record or _measure_in_process(key, options.json)
            if record is not None:
                _log(_summary(record))
                records.append(record)
    return records


def _read(file: Path | None) -> list[Record]:
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def _measure_in_process(key: Record, file: Path | None) -> Record | None:
    """Measure in a new process and append the record to the file; on a failure log it and return None."""
    command = [sys.executable, "-m", "bench.train", "--one", *(key[name] for name in ("base", "quantize", "variant"))]
    for name in ("data", "steps", "seed", "device"):
        command += [f"--{name}", str(key[name])]
    # if more GPUs are visible, a Trainer distributes the rows over them
    environment = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        _log(f"{_name(key)}: failed with {done.returncode}\n{done.stderr[-2000:]}")
        return None
    record: Record = key | json.loads(done.stdout.splitlines()[-1])
    if file is not None:
        with file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
    return record


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- one measurement -----------------------------------------------------------------------------------------------


def _measure(options: argparse.Namespace) -> Record:
    from bench import measure
    from bench.variants import variants

    base, quantize, variant = options.one
    with tempfile.TemporaryDirectory() as folder:
        work = _work(base, quantize, options, Path(folder))
        run = variants()[variant](work)
        peaks = [measure.peak_gflops(work.compute)]
        memory = measure.watch_memory(work.compute.device)
        clock = measure.Clock(work.compute.device)
        losses = run(clock.tick)
        gib = memory()
        peaks.append(measure.peak_gflops(work.compute))
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": measure.describe(work.compute),
        "seconds": clock.seconds,
        "tokens": [sum(len(example.input_ids) for example in step) for step in work.steps],
        "useful_gflop": [measure.useful_gflop(work.model, step) for step in work.steps],
        "losses": losses,
        "memory_gib": gib,
        "peak_gflops": peaks,
    }


def _work(base: str, quantize: str, options: argparse.Namespace, folder: Path) -> Any:
    from bench.variants import Work
    from job import data
    from job.freeze import freeze
    from job.lora import add_adapters
    from job.quantize import load_model, load_tokenizer
    from job.settings import Lora, Settings, Train
    from job.system.device import ComputeSpec

    # adapters and steps are the recipe's; the environment sets only how the data is read
    groups: Any = {"base": {"model": model_setting(base), "quantize": quantize}, "data": {"dataset": options.data}}
    settings = Settings(**groups, lora=Lora().model_dump(), train=Train().model_dump())
    compute = ComputeSpec.resolve(options.device, "auto")
    tokenizer = load_tokenizer(settings.base)
    encoded = tokenization.encode(tokenizer, data.load(settings.data).train, settings)
    rng = random.Random(options.seed)
    size = settings.train.batch_size * settings.train.gradient_accumulation_steps
    steps = [rng.sample(encoded, size) for _ in range(WARM_UP + options.steps)]
    model = load_model(settings.base, compute)
    freeze(model)
    adapted = add_adapters(model, settings.lora, seed=settings.train.seed)
    return Work(adapted, tokenizer, compute, settings, steps, folder)


# ---- the report ----------------------------------------------------------------------------------------------------


def report(records: list[Record], variants: list[str]) -> str:
    """Format a Markdown table for each base and quantization: medians over the rounds, ratios within a round."""
    if not records:
        return "nothing was measured"
    lines = [f"{records[-1]['when']}; {records[-1]['machine']}"]
    for base, quantize in dict.fromkeys((record["base"], record["quantize"]) for record in records):
        group = [record for record in records if (record["base"], record["quantize"]) == (base, quantize)]
        lines += ["", f"### {base}, {quantize}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [_row(variant, group) for variant in variants if any(r["variant"] == variant for r in group)]
    return "\n".join(lines)


def _row(variant: str, records: list[Record]) -> str:
    own = {record["round"]: record for record in records if record["variant"] == variant}
    baseline = {record["round"]: record for record in records if record["variant"] == BASELINE}
    speed = _ratios([_rate(own[n]) / _rate(baseline[n]) for n in own if n in baseline])
    memory_ratio = _ratios([own[n]["memory_gib"] / baseline[n]["memory_gib"] for n in own if n in baseline])
    rate, share_of_peak = _median(own, _rate), _median(own, _share_of_peak)
    memory, first = _median(own, lambda record: record["memory_gib"]), _median(own, lambda record: record["seconds"][0])
    return f"| {variant} | {rate:.0f} | {speed} | {memory:.2f} | {memory_ratio} | {share_of_peak:.0%} | {first:.1f} |"


def _ratios(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})" if ratios else "-"


def _median(rounds: dict[int, Record], value: Callable[[Record], float]) -> float:
    return statistics.median(map(value, rounds.values()))


def _summary(record: Record) -> str:
    losses = " ".join(f"{loss:.4f}" for loss in record["losses"])
    seconds = " ".join(f"{second:.2f}" for second in record["seconds"])
    return (
        f"{_name(record)}: {_rate(record):.0f} tokens/s, {record['memory_gib']:.2f} GiB, {_share_of_peak(record):.0%} "
        f"of {statistics.mean(record['peak_gflops']):.0f} GFLOP/s; seconds {seconds}; losses {losses}"
    )


def _name(key: Record) -> str:
    return f"{key['base']}, {key['quantize']}, {key['variant']}, round {key['round']}"


def _rate(record: Record) -> float:
    return float(sum(record["tokens"][WARM_UP:]) / sum(record["seconds"][WARM_UP:]))


def _share_of_peak(record: Record) -> float:
    reached = sum(record["useful_gflop"][WARM_UP:]) / sum(record["seconds"][WARM_UP:])
    return float(reached / statistics.mean(record["peak_gflops"]))


if __name__ == "__main__":
    main()
