"""Merge the adapter into the unquantized base model, for servers that load no adapters."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import peft

from job import quantize
from job.data import inference_texts
from job.decoding.config import load_config
from job.decoding.equivalence import same_answer
from job.errors import JobError
from job.sample import Tagger
from job.system.device import ComputeSpec

if TYPE_CHECKING:
    from job.runs.run_folder import RunFolder
    from job.settings import Settings

log = logging.getLogger(__name__)


def merge(run: RunFolder, settings: Settings, compute: ComputeSpec) -> None:
    """Write the merged model and its tokenizer to the run's `merged/`.

    The merge is computed in fp32 with base weights that were never quantized, so that only rounding changes the
    result. Raises JobError if the merged model tags the sample texts differently from base model and adapter.
    """
    exact = dataclasses.replace(compute, precision="fp32")
    base = quantize.load_model(settings.base.model_copy(update={"quantize": "none"}), exact)
    tokenizer = quantize.load_tokenizer(settings.base)
    texts = inference_texts(settings.sample)
    adapted = peft.PeftModel.from_pretrained(base, str(run.adapter))
    decoding = load_config(settings.with_published_decoding().sample, run.adapter)
    expected = Tagger(adapted, tokenizer, settings, exact, decoding).tag(texts)
    merged = adapted.merge_and_unload()
    answers = Tagger(merged, tokenizer, settings, exact, decoding).tag(texts)
    pairs = zip(map(dataclasses.asdict, expected), map(dataclasses.asdict, answers), strict=True)
    if not all(same_answer(old, new, decoding) for old, new in pairs):
        raise JobError("the merged model gives other tags than base model and adapter; it is not saved or pushed")
    with run.folder("merged") as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    run.record_checksums("merged")
    log.info("merge: %s", run.path / "merged")
