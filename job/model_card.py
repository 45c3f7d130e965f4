"""The model card that is published with an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from job import quantize
from job.dataset import prompts
from job.runs.markup import Table, markdown_table
from job.settings import Settings, to_env
from job.system.paths import DATA_SUFFIXES, WEIGHT_SUFFIXES, is_local
from job.types import Scores


def model_card(
    settings: Settings, scores: Mapping[str, Scores], versions: Mapping[str, str], licence: str | None
) -> str:
    """README.md of the adapter: metadata that the Hub validates, then use, scores, loss, settings, versions.

    A base model or data set is named in the metadata only when it is on the Hub: the Hub refuses
    cards that name a local path.
    """
    base, revision = quantize.hub_identity(settings.base)
    on_hub = not is_local(base, WEIGHT_SUFFIXES)
    data_on_hub = not is_local(settings.data.dataset, DATA_SUFFIXES)
    metadata: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "tagger", "text-classification"],
        **({"license": licence} if licence else {}),
        **({"base_model": base} if on_hub else {}),
        **({"datasets": [settings.data.dataset]} if data_on_hub else {}),
        "model-index": [_model_index(base, settings, scores["adapter"])],
    }
    prompt = prompts.prompt("some text", settings.data.separator)
    at = f" at revision `{revision}`" if on_hub and revision else ""
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# A tagger on {base}",
        "",
        f"A LoRA adapter for `{base}`{at} that answers a text with a list of tags. It is asked `{prompt}` and goes",
        f"on with `{prompts.target(['a tag', 'another'], settings.data.separator)}` and the end of sequence.",
        f"Whoever uses it is bound by the licence of the base model{f' ({licence})' if licence else ''}.",
        "",
        *(
            _snippet(prompt, settings)
            if on_hub
            else ["Use it with `tagger-job sample`: its base model is not on the Hub."]
        ),
        "",
        "`tagger-job sample` answers by `tagger.json`: which tags, from which confidence on. The scores are of that.",
        "",
        "## Scores on held-out examples",
        "",
        *markdown_table(score_table(scores)),
        "",
        "![training loss](loss.svg)",
        "",
        "## Settings",
        "",
        "| variable | value |",
        "|---|---|",
        *(f"| `{name}` | `{to_env(value)}` |" for name, value in settings.result_values().items()),
        "",
        "Made with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def score_table(scores: Mapping[str, Scores]) -> Table:
    """A row for each tagger; micro-F1 with its 95% interval."""
    rows = [["", "n", "precision", "recall", "micro-F1", "95%", "macro-F1", "Jaccard", "exact", "well_formed"]]
    for name, s in scores.items():
        low, high = s.intervals["f1"]
        before, after = (s.precision, s.recall, s.f1), (s.macro_f1, s.jaccard, s.exact_match, s.well_formed)
        figures = [*(f"{x:.3f}" for x in before), f"{low:.3f} to {high:.3f}", *(f"{x:.3f}" for x in after)]
        rows.append([name, str(s.n), *figures])
    return rows


def _model_index(base: str, settings: Settings, scores: Scores) -> dict[str, Any]:
    """The scores in the form that the Hub shows on a model's page."""
    name = f"{base.rpartition('/')[2]}-tagger"
    metrics = {"f1": scores.f1, "precision": scores.precision, "recall": scores.recall}
    result = {
        "task": {"type": "text-classification", "name": "Tagging"},
        "dataset": {
            "type": settings.data.dataset.rpartition(":")[2],
            "name": settings.data.dataset,
            "split": "held out",
        },
        "metrics": [
            {"type": kind, "value": round(value, 4), "name": f"micro-averaged {kind}"}
            for kind, value in metrics.items()
        ],
    }
    return {"name": name, "results": [result]}


def _snippet(prompt: str, settings: Settings) -> list[str]:
    """Lines that tag a text with nothing but peft and transformers."""
    return [
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer",
        "",
        'adapter = "owner/name"  # the name of this repo',
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
        "model = AutoPeftModelForCausalLM.from_pretrained(adapter)",
        f'inputs = tokenizer({prompt!r}, return_tensors="pt")',
        f"answer = model.generate(**inputs, max_new_tokens={settings.sample.max_new_tokens}, do_sample=False)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
    ]
