"""The model card that is published with an adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from job import quantize
from job.config.redaction import mask_urls
from job.dataset import prompts
from job.hub.licences import card_entries
from job.runs import markup
from job.runs.markup import Table
from job.settings import Settings, to_env
from job.system.paths import DATA_SUFFIXES, WEIGHT_SUFFIXES, is_local, is_on_hub
from job.types import Scores


def model_card(
    settings: Settings, scores: Mapping[str, Scores], versions: Mapping[str, str], licence: str | None
) -> str:
    """Return README.md of the adapter: metadata that the Hub validates, usage, scores, loss, settings and versions.

    `scores` has an entry for each tagger, `adapter` among them; `versions` one for each library.
    """
    base, revision = quantize.hub_identity(settings.base)
    on_hub = not is_local(base, WEIGHT_SUFFIXES)
    prompt = prompts.prompt("some text", settings.data.separator)
    metadata = _metadata(base if on_hub else None, base, settings, scores["adapter"], licence)
    return markup.render(
        "model_card.md.jinja",
        metadata=yaml.dump(metadata, Dumper=_OneLine, sort_keys=False, allow_unicode=True, width=math.inf).rstrip(),
        base=base,
        revision=revision if on_hub else None,
        on_hub=on_hub,
        licence=licence,
        prompt=prompt,
        prompt_literal=repr(prompt),
        answer=prompts.target(["a tag", "another"], settings.data.separator),
        max_new_tokens=settings.sample.max_new_tokens,
        score_table=score_table(scores),
        settings={name: to_env(value, name) for name, value in settings.result_values().items()},
        versions=versions,
    )


class _OneLine(yaml.SafeDumper):
    """Writes each text on one line: one of several lines could look like the end of the metadata."""


_OneLine.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),
)


def score_table(scores: Mapping[str, Scores]) -> Table:
    """Return a header and a row for each tagger; micro-F1 with its 95% interval."""
    rows = [["", "n", "precision", "recall", "micro-F1", "95%", "macro-F1", "Jaccard", "exact", "well_formed"]]
    for name, s in scores.items():
        low, high = s.intervals["f1"]
        micro, others = (s.precision, s.recall, s.f1), (s.macro_f1, s.jaccard, s.exact_match, s.well_formed)
        figures = [*(f"{x:.3f}" for x in micro), f"{low:.3f} to {high:.3f}", *(f"{x:.3f}" for x in others)]
        rows.append([name, str(s.n), *figures])
    return rows


def _metadata(
    hub_base: str | None, base: str, settings: Settings, scores: Scores, licence: str | None
) -> dict[str, Any]:
    """Return the card's metadata; a base model or data set is named only if it is on the Hub.

    The Hub rejects cards that name a local path.
    """
    dataset = mask_urls(settings.data.dataset)
    entries: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "tagger", "text-classification"],
        **card_entries(licence, hub_base),
        **({"base_model": hub_base} if hub_base else {}),
        **({"datasets": [dataset]} if is_on_hub(dataset, DATA_SUFFIXES) else {}),
    }
    results = _eval_results(dataset, settings.data.revision, scores)
    card = ModelCardData(**entries, model_name=f"{base.rpartition('/')[2]}-tagger", eval_results=results)
    metadata: dict[str, Any] = card.to_dict()  # type: ignore[no-untyped-call]
    return metadata


def _eval_results(dataset: str, revision: str | None, scores: Scores) -> list[EvalResult]:
    """Return the scores in the form that the Hub shows on a model's page."""
    metrics = {"f1": scores.f1, "precision": scores.precision, "recall": scores.recall}
    return [
        EvalResult(
            task_type="text-classification",
            task_name="Tagging",
            dataset_type=dataset.rpartition(":")[2],
            dataset_name=dataset,
            dataset_revision=revision,
            dataset_split="held out",
            metric_type=kind,
            metric_value=round(value, 4),
            metric_name=f"micro-averaged {kind}",
        )
        for kind, value in metrics.items()
    ]
