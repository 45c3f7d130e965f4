"""Merge the adapter into the unquantized base model, for servers that load no adapters."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import peft
import torch

from job import quantize
from job.data import inference_texts
from job.decoding.config import load_config
from job.decoding.equivalence import same_answer
from job.decoding.scorers import load_scorers
from job.errors import JobError
from job.lora import add_adapters
from job.sample import Tagger
from job.system.device import ComputeSpec

if TYPE_CHECKING:
    from job.runs.run_folder import RunFolder
    from job.settings import Settings

log = logging.getLogger(__name__)


def merge_problems(settings: Settings) -> list[str]:
    """Report why the adapters of these settings could not be merged into the base model, if they could not.

    Raises InvalidInputError when config.json of the base model cannot be read.
    """
    model = quantize.meta_model(settings.base)
    if getattr(model.config, "quantization_config", None):
        return [
            f"TAGGER_HUB_MERGE=true needs the base model's original weights, and {settings.base.model} has quantized "
            "ones; set it to false, or TAGGER_BASE_MODEL to the unquantized original"
        ]
    tied = model.get_input_embeddings().weight is getattr(model.get_output_embeddings(), "weight", None)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {name for name, module in model.named_modules() if any(module is end for end in ends)}
    with torch.device("meta"):
        targets = names & set(add_adapters(model, settings.lora, seed=0).targeted_module_names)
    if not tied or not targets:
        return []
    return [
        f"TAGGER_HUB_MERGE=true cannot merge an adapter into {', '.join(sorted(targets))}, because embedding and head "
        "share their weights; leave it out of TAGGER_LORA_TARGETS, or set TAGGER_HUB_MERGE=false"
    ]


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
    scorers = load_scorers(decoding, decoding.tags, run.adapter, None)
    expected = Tagger(adapted, tokenizer, settings, exact, decoding, scorers=scorers).tag(texts)
    merged = adapted.merge_and_unload()
    answers = Tagger(merged, tokenizer, settings, exact, decoding, scorers=scorers).tag(texts)
    pairs = zip(map(dataclasses.asdict, expected), map(dataclasses.asdict, answers), strict=True)
    if not all(same_answer(old, new, decoding) for old, new in pairs):
        raise JobError("the merged model gives other tags than base model and adapter; it is not saved or pushed")
    with run.folder("merged") as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    run.record_checksums("merged")
    log.info("merge: %s", run.path / "merged")
