"""The model card that is published with an adapter."""

from __future__ import annotations

from collections.abc import Mapping

from job import data, quantize
from job.locate import is_local
from job.results import Scores
from job.settings import Settings, show


def card(settings: Settings, scores: Mapping[str, Scores]) -> str:
    """README.md of the adapter: metadata that the Hub validates, then use, scores and settings.

    A base model or data set is named in the metadata only when it is on the Hub: the Hub refuses
    cards that name a local path.
    """
    metadata = ["library_name: peft", "pipeline_tag: text-generation", "tags: [lora, tagger]"]
    if not is_local(settings.base.model, quantize.WEIGHTS):
        metadata.append(f"base_model: {settings.base.model}")
    if not is_local(settings.data.dataset, data.FORMATS):
        metadata.append(f"datasets: [{settings.data.dataset}]")
    prompt = data.prompt("some text", settings.data.separator)
    lines = [
        "---",
        *metadata,
        "---",
        "",
        f"# A tagger on {settings.base.model}",
        "",
        f"A LoRA adapter that answers a text with a list of tags. It is asked `{prompt}` and continues with",
        f"`{data.target(['tag', 'another tag'], settings.data.separator)}` and the end of sequence.",
        "",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer",
        "",
        'adapter = "..."  # this repo\'s name, or its folder',
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
        "model = AutoPeftModelForCausalLM.from_pretrained(adapter)",
        f'inputs = tokenizer("{prompt}", return_tensors="pt")',
        f"answer = model.generate(**inputs, max_new_tokens={settings.sample.max_new_tokens}, do_sample=False)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
        "",
        "## Scores on held-out examples",
        "",
        "| | n | precision | recall | micro-F1 | Jaccard | parsed |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {s.n} | "
            + " | ".join(f"{x:.3f}" for x in (s.precision, s.recall, s.f1, s.jaccard, s.parse_rate))
            + " |"
            for name, s in scores.items()
        ),
        "",
        "## Settings",
        "",
        "| variable | value |",
        "|---|---|",
        *(f"| `{name}` | `{show(value)}` |" for name, value in settings.result_values().items()),
    ]
    return "\n".join(lines) + "\n"
