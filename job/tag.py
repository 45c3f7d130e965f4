"""Tag files of any size: check input and output, schedule the parts, join them, and summarize."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from job.dataset.slices import SlicedData
from job.decoding.config import load_config
from job.errors import InvalidInputError, JobError
from job.hub import client as hub
from job.runs.budget import price_per_hour
from job.runs.checksums import file_digest
from job.runs.run_folder import check_writable
from job.settings import Settings
from job.system.paths import exists, is_remote
from job.system.progress import duration
from job.tagging import shards, storage, worker
from job.tagging.engines import check_engine, work_with_ray
from job.tagging.formats import OWN_COLUMNS
from job.tagging.plan import PLAN, Job, Parts, restart
from job.tagging.progress import Progress
from job.tagging.stream import batches_of_data, batches_of_lines, tag_stream
from job.tagging.worker import TextTagger

log = logging.getLogger(__name__)

STREAM = "-"
TRAINED_WITH = ("BASE", "DATA_SEPARATOR", "DATA_MAX_LENGTH")
"""Settings of the adapter's training that tagging needs."""


def tag(
    settings: Settings,
    adapter: str | Path,
    load: Callable[[Settings, str | Path], TextTagger],
    *,
    from_the_start: bool = False,
    sync: worker.Sync = worker.no_sync,
) -> list[str]:
    """Tag TAGGER_TAG_INPUT into TAGGER_TAG_OUTPUT with an adapter that `load` loads; return the lines of a summary.

    Raises InvalidInputError, before anything is written, for settings, an input or an output that cannot be used.
    """
    job = new_job(settings)
    settings, tagger = describe_tagger(settings, adapter)
    job = Job(job.data, job.columns, job.output, job.part_rows, tagger)
    if STREAM in (job.data.dataset, job.output):
        return _stream(job, settings, lambda: load(settings, adapter))
    shard = shards.resolve(settings.tag.shard)
    check_engine(settings.tag.engine, shards=shard.count)
    check_output(job)
    if from_the_start:
        if shard.count > 1:
            raise InvalidInputError(
                f"--restart with TAGGER_TAG_SHARD={shard} would delete the parts of the other workers; remove "
                f"{job.parts_folder}, or name another output"
            )
        restart(job)
    progress, success = Progress(), None
    work = _engine(settings, adapter, load, shard, sync)
    while success is None:  # again, if a part was torn
        parts = work(job, progress=progress)
        success = worker.finish(parts, settings.tag.max_errors, verify=shard.count == 1)
    return _summary(success, progress, job, settings)


def _engine(
    settings: Settings,
    adapter: str | Path,
    load: Callable[[Settings, str | Path], TextTagger],
    shard: shards.Shard,
    sync: worker.Sync,
) -> Callable[..., Parts]:
    """Return what tags the parts of a job: Ray, this process, or one for each GPU."""
    from job import inference, tag_workers
    from job.system.device import ComputeSpec

    if settings.tag.engine == "ray":
        return partial(work_with_ray, load=partial(load, settings, adapter))
    compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
    processes = inference.count_processes(settings, compute)
    if processes == 1:
        return partial(worker.work, load=partial(load, settings, adapter), own=shard.own, sync=sync)
    return partial(tag_workers.work, settings=settings, adapter=adapter, processes=processes, own=shard.own, sync=sync)


def new_job(settings: Settings) -> Job:
    """Return the job that the settings describe; raises InvalidInputError for settings that do not fit together."""
    given, output = settings.tag.input, settings.tag.output
    if given is None:
        raise InvalidInputError(
            "TAGGER_TAG_INPUT is not set; set it to a file, folder, URL or Hub data set, or to - for standard input"
        )
    output = STREAM if output is None and given == STREAM else output
    if output is None:
        raise InvalidInputError(
            "TAGGER_TAG_OUTPUT is not set; set it to a .jsonl, .csv or .parquet file, to a folder that ends in /, or "
            "to - for standard output"
        )
    for variable, name in (("TAGGER_TAG_INPUT", given), ("TAGGER_TAG_OUTPUT", output)):
        scheme = name.partition("://")[0]
        if "://" in name and not is_remote(name):
            raise InvalidInputError(f"{variable}={name}: {scheme}:// is unknown; expected s3, gs, az or hf")
    if output.startswith("hf://") and not output.startswith(storage.BUCKETS):
        raise InvalidInputError(
            f"TAGGER_TAG_OUTPUT={output}: hf:// can only be read, because each part would be a commit; write to a "
            "bucket (hf://buckets/), a folder, s3://, gs:// or az://"
        )
    if given == STREAM and output != STREAM:
        raise InvalidInputError(
            "TAGGER_TAG_INPUT=- cannot be read a second time, so nothing could be resumed; set TAGGER_TAG_OUTPUT to - "
            "and redirect it, or name a file"
        )
    columns = settings.tag.columns
    if clash := [name for name in columns or () if name in OWN_COLUMNS]:
        raise InvalidInputError(
            f"TAGGER_TAG_COLUMNS names {', '.join(clash)}, which the output has of its own ({', '.join(OWN_COLUMNS)}); "
            "leave it out, or rename it in the input"
        )
    if not is_remote(output) and output != STREAM and Path(output).expanduser().is_dir():
        output = f"{output.rstrip('/')}/"
    data = settings.data.model_copy(update={"dataset": given})
    if data.dataset != settings.data.dataset and (is_remote(given) or exists(given)):
        data = data.model_copy(update={"config": None, "split": None, "revision": None})
    return Job(data, columns, output, settings.tag.part_rows)


def check_output(job: Job) -> None:
    """Raise InvalidInputError when the output cannot be written, is the input, or would replace something else."""
    name = job.output
    _ = job.format  # raises for a name whose end says none
    data = worker.open_data(job)
    folder = storage.open_folder(job.parts_folder)
    if is_remote(name):
        own = name.partition("://")[2].rstrip("/")
        inputs = [file.path for file in data.files if file.system is not None]
        same = any(path == own or (job.is_folder and path.startswith(f"{own}/")) for path in inputs)
    else:
        target = Path(name).expanduser().resolve()
        inputs = [str(Path(file.path).resolve()) for file in data.files if file.system is None]
        same = any(Path(p) == target or (job.is_folder and target in Path(p).parents) for p in inputs)
    if same:
        raise InvalidInputError(f"TAGGER_TAG_OUTPUT={name} is also the input; name another file or folder")
    if _is_inside(name, job.data.dataset):
        raise InvalidInputError(
            f"TAGGER_TAG_OUTPUT={name} is in the folder of the input and would be read as input the next time; name "
            "another place"
        )
    if not job.is_folder:
        _check_file(job, folder)
    if isinstance(folder, storage.LocalFolder):
        check_writable(folder.path, "the folder of TAGGER_TAG_OUTPUT", "TAGGER_TAG_OUTPUT to a path")


def _is_inside(output: str, given: str) -> bool:
    """Check whether the output would be among the data files of an input folder."""
    if is_remote(given):
        return output.startswith(f"{given.rstrip('/')}/")
    folder = Path(given).expanduser()
    return not is_remote(output) and folder.is_dir() and folder.resolve() in Path(output).expanduser().resolve().parents


def _check_file(job: Job, folder: storage.Folder) -> None:
    """Refuse to replace a file that this job did not write, and anything that is not a regular file."""
    if not is_remote(job.output):
        path = Path(job.output).expanduser()
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise InvalidInputError(
                f"TAGGER_TAG_OUTPUT={job.output} is not a regular file, and it would be replaced; name another"
            )
    parent, name = storage.open_parent(job.output)
    if parent.exists(name) and not folder.exists(PLAN):
        raise InvalidInputError(
            f"TAGGER_TAG_OUTPUT={job.output} exists and was not written by this job; remove it, or name another file"
        )


def describe_tagger(settings: Settings, adapter: str | Path) -> tuple[Settings, dict[str, Any]]:
    """Return what the answers depend on, and the settings with the commit of the adapter.

    Raises InvalidInputError when the adapter or its tagger.json cannot be read.
    """
    if isinstance(adapter, Path):
        identity = _file_identity(adapter / "adapter_model.safetensors")
    else:
        commit = _commit(adapter, settings.hub.revision)
        settings = settings.model_copy(update={"hub": settings.hub.model_copy(update={"revision": commit})})
        identity = f"{adapter}@{commit}"
    decoding = load_config(settings.sample, adapter, settings.hub.revision).as_json()
    tags = json.dumps(decoding.pop("tags"), ensure_ascii=False)
    decoding["tags"] = f"sha256:{hashlib.sha256(tags.encode()).hexdigest()[:16]}"
    if isinstance(adapter, Path):  # a commit identifies all files
        decoding |= {name: _file_identity(adapter / decoding[name]) for name in ("head", "tfidf") if name in decoding}
    return settings, {
        "adapter": identity,
        "base_model": settings.base.model,
        "quantize": settings.base.quantize,
        **decoding,
        "separator": settings.data.separator,
        "max_length": settings.data.max_length,
        "max_new_tokens": settings.sample.max_new_tokens,
        "batch_size": settings.sample.batch_size,
    }


def _file_identity(file: Path) -> str:
    """Return the digest of a file of an adapter; raises InvalidInputError when it cannot be read."""
    try:
        return f"sha256:{file_digest(file)[:16]}"
    except OSError as error:
        raise InvalidInputError(
            f"the weights of the adapter in {file.parent} cannot be read: {file.name}: {error.strerror}; train or "
            "fetch it again"
        ) from error


def _commit(repo: str, revision: str | None) -> str:
    """Return the commit of an adapter on the Hub, or in the cache where the Hub may not be asked."""
    import httpx2

    try:
        return hub.download_metadata(repo, revision, "adapter_config.json").parent.name
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise InvalidInputError(
            f"there is no adapter to read in {repo}: {hub.error_message(error)}. Check TAGGER_HUB_REPO and HF_TOKEN, "
            "or train one first"
        ) from error


def _stream(job: Job, settings: Settings, load: Callable[[], TextTagger]) -> list[str]:
    """Write the answers to standard output, batch by batch; the summary goes to the log."""
    from job.system.device import choose_device, texts_per_batch

    rows = texts_per_batch(settings.sample.batch_size, choose_device(settings.run.device))
    if job.data.dataset == STREAM:
        tagger = load()
        batches = batches_of_lines(sys.stdin.buffer, job, rows)
    else:
        data: SlicedData = worker.open_data(job)
        data.slices(job.part_rows)  # refuses an input without rows or columns before the model is loaded
        tagger = load()
        batches = batches_of_data(data, job.part_rows, rows)
    progress = Progress()
    with open(1, "wb", closefd=False) as to:
        try:
            tally = tag_stream(batches, job, tagger, to)
        except BrokenPipeError as error:
            raise JobError("the reader of standard output has gone; the rest of the input is not tagged") from error
    for line in worker.describe(tally.summary()):
        log.info("tag: %s in %s", line, duration(progress.seconds))
    tally.check(settings.tag.max_errors)
    return []


def _summary(success: dict[str, Any], progress: Progress, job: Job, settings: Settings) -> list[str]:
    lines = worker.describe(success)
    if progress.rows:
        lines.append(f"rate: {progress.rows:,} rows here in {duration(progress.seconds)}, {progress.rate:,.1f} rows/s")
        lines += _price(settings, progress)
    else:
        lines.append("nothing was left to do: all parts were sealed")
    return [*lines, f"the answers are in {job.output}"]


def _price(settings: Settings, progress: Progress) -> list[str]:
    """Return the line with the price of this worker's rows; none where it is unknown, as on a Ray cluster."""
    from job.system.device import ComputeSpec

    if settings.tag.engine == "ray":
        return []
    compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
    price = price_per_hour(settings.run, str(compute), compute.gpus)
    if price is None:
        return []
    dollars = price[0] / 3600 * progress.seconds
    return [f"price: ${dollars:.2f} here, ${dollars / progress.rows * 1e6:,.2f} for a million rows (by {price[1]})"]
