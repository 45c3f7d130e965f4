"""Tiny random models of many architectures: each is checked, trained, compared with transformers and peft, and merged.

`make zoo` tries all of them and writes the table of docs/models.md; `--only llama mamba` tries a few and writes
nothing. The tests try some.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import json
import logging
import multiprocessing
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conftest  # sets the Hub's address and an empty cache, before huggingface_hub is imported
import peft
import torch
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from job import pipeline, preflight
from job.dataset.tokenization import encode
from job.errors import InvalidInputError
from job.freeze import freeze
from job.lora import add_adapters
from job.quantize import load_model, load_tokenizer
from job.settings import Lora, Settings
from job.system import logging_setup
from job.training import memory_efficient
from job.training.batching import Collator, num_label_tokens
from job.training.loss import mean_loss
from job.training.packing import PackedAttention

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- zoo -->", "<!-- /zoo -->"
PROCESSES = 2
QUANTIZATIONS = ("none", "int8", "nf4")
TOLERANCE = 1e-4
"""Largest difference of loss or gradients, relative to their size; fp32 sums in another order differ by about 1e-6."""

SMALL: dict[str, Any] = {
    # the width, the number of layers and of heads, under the names that configs have for them
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_dim", "lru_width"), 64),
    **dict.fromkeys(("attention_hidden_size", "attention_window_size", "sliding_window"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "dff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    "attention_heads": 4,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("state_size", "mamba_d_state", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank", "chunk_size", "mamba_d_head"), 16),
    **dict.fromkeys(("n_group", "n_groups", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "expand", "mamba_expand"), 2),
    **dict.fromkeys(("conv_kernel", "time_step_rank"), 4),
    "mamba_n_heads": 8,
    # without dropout, so that gradients can be compared
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "embd_pdrop"), 0.0),
    **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embed_dropout", "resid_dropout", "hidden_dropout_prob"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "layerdrop", "attention_dropout_prob", "residual_dropout"), 0.0),
    "vocab_size": 600,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LATENT_ATTENTION = {"head_dim": 8, "num_key_value_heads": 4}
ONE_ATTENTION_LAYER = {"layer_types": ["linear_attention", "full_attention"]}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "axk1": LATENT_ATTENTION,
    "bamba": {"attn_layer_indices": [1], "mamba_chunk_size": 16},
    "bart": {},
    "biogpt": {},
    "bloom": {},
    "codegen": {},
    "cohere": {},
    "cohere2": {},
    "ctrl": {},
    "deepseek_v2": LATENT_ATTENTION,
    "deepseek_v3": LATENT_ATTENTION,
    "diffllama": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "falcon": {},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_chunk_size": 16},
    "falcon_mamba": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT_ATTENTION,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": {},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_chunk_size": 16},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mbart": {},
    "minicpm3": LATENT_ATTENTION,
    "ministral": {},
    "mistral": {},
    "mixtral": {},
    "mpt": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {"vocab_size": 640},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": ONE_ATTENTION_LAYER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rwkv": {"rescale_every": 1},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {},
    "xlstm": {"qk_dim_factor": 1.0},
    "youtu": LATENT_ATTENTION,
    "zamba2": {"layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""For each architecture, under the name of its `model_type`, what its tiny config needs besides SMALL."""

REFUSED: dict[str, dict[str, Any]] = {
    "albert": {},
    "bert": {},
    "distilbert": {},
    "electra": {},
    "mt5": {},
    "roberta": {},
    "t5": {},
    "xlm-roberta": {},
}
"""Architectures that are not causal language models; `check` refuses them."""


def config(name: str, **changes: Any) -> PreTrainedConfig:
    """Return a tiny config of an architecture."""
    config_type = CONFIG_MAPPING[name]
    known = {*inspect.signature(config_type.__init__).parameters, *getattr(config_type, "__dataclass_fields__", ())}
    known |= set(config_type.attribute_map)
    small = {key: value for key, value in SMALL.items() if key in known}
    return config_type(**{**small, **ARCHITECTURES.get(name, REFUSED.get(name, {})), **changes})


def save_model(name: str, folder: Path) -> None:
    """Write a tiny model with random weights and a byte-level tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(name))
    for parameter in model.parameters():
        if parameter.ndim > 1:  # large enough for logits that differ from token to token
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 600 tokens."""
    rows = [json.loads(line) for line in conftest.SAYINGS.read_text(encoding="utf-8").splitlines()]
    return conftest.make_llama_tokenizer(rows)


def make_settings(model: Path, runs: Path, quantize: str, lora: dict[str, object] | None = None) -> Settings:
    """Return the settings of a run of three steps that ends with a merged model."""
    return conftest.make_settings(
        model,
        runs,
        base={"quantize": quantize},
        lora=lora or {},
        data={"limit": 24, "eval_size": 4, "max_length": 96},
        train={
            "max_steps": 3,
            "save_steps": 3,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
        },
        sample={"max_new_tokens": 8},
        hub={"push": "never", "merge": True},
    )


@dataclass(frozen=True)
class Result:
    """What was found out about an architecture."""

    name: str
    packed: bool = False
    recomputes: bool = False
    adapters: tuple[str, ...] = ()
    problems: dict[str, str] = field(default_factory=dict)
    """For each quantization what went wrong; empty if nothing did."""


def try_architecture(
    name: str, folder: Path, quantizations: tuple[str, ...] = QUANTIZATIONS, lora: dict[str, object] | None = None
) -> Result:
    """Check, compare, train and merge a tiny model with each quantization."""
    save_model(name, folder / "model")
    result = describe(name)
    for quantize in quantizations:
        settings = make_settings(folder / "model", folder / quantize, quantize, lora)
        try:
            compare_estimate(settings)
            compare_gradients(settings)
            check_run(settings)
        except Exception as error:  # whatever it is, it is a finding, and the others are still tried
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = "" if isinstance(error, InvalidInputError) else f" ({Path(last.filename).name}:{last.lineno})"
            result.problems[quantize] = f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
    return result


def adapted_model(settings: Settings) -> peft.PeftModel:
    """Return the model with adapters that are not zero."""
    model = load_model(settings.base, conftest.CPU)
    freeze(model)
    adapted = add_adapters(model, settings.lora.model_copy(update={"dropout": 0.0}), seed=1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    return adapted.train()


def describe(name: str) -> Result:
    """Return how an architecture is trained."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config(name))
        adapted = add_adapters(model, Lora(), seed=0)
    targets = {n.partition(".lora_A")[0].rpartition(".")[2] for n, _ in adapted.named_parameters() if ".lora_A" in n}
    return Result(
        name,
        packed=PackedAttention.supports(model),
        recomputes=model.supports_gradient_checkpointing,
        adapters=tuple(sorted(targets)),
    )


def compare_estimate(settings: Settings) -> None:
    """Compare the size of the weights that `check` estimates with that of the loaded model."""
    need = preflight.check_machine(preflight.check(settings)).memory
    loaded = sum(p.numel() * p.element_size() for p in load_model(settings.base, conftest.CPU).parameters())
    assert abs(need.weights / loaded - 1) < 0.1, f"{need.weights} bytes of weights are estimated, {loaded} are loaded"


def compare_gradients(settings: Settings) -> None:
    """Compare loss and gradients of the job with those of transformers and peft, each text computed alone."""
    model = adapted_model(settings)
    tokenizer = load_tokenizer(settings.base)
    examples = encode(tokenizer, preflight.check(settings).examples.train[:6], settings)
    label_tokens = num_label_tokens(examples)
    expected_loss = 0.0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        loss = functional.cross_entropy(logits.float(), labels, reduction="sum") / label_tokens
        loss.backward()
        expected_loss += float(loss.detach())
    expected = take_gradients(model)
    base: Any = model.get_base_model()
    packing = PackedAttention(base) if PackedAttention.supports(base) else None
    collator = Collator(tokenizer.pad_token_id, packed=packing is not None)
    found_loss = 0.0
    with memory_efficient.patched(model), packing.installed() if packing else contextlib.nullcontext():
        for batch in (examples[:4], examples[4:]):
            batch.sort(key=lambda example: len(example.input_ids))
            if packing is not None:
                packing.set_sequence_lengths([len(example.input_ids) for example in batch], conftest.CPU.device)
            loss = mean_loss(model, collator(batch), label_tokens=label_tokens)
            loss.backward()
            found_loss += float(loss.detach())
    found = take_gradients(model)
    assert found.keys() == expected.keys(), f"adapters without a gradient: {sorted(found.keys() ^ expected.keys())}"
    assert abs(found_loss - expected_loss) < TOLERANCE * expected_loss, f"loss {found_loss} instead of {expected_loss}"
    difference = sum(float((found[n] - expected[n]).square().sum()) for n in expected)
    size = sum(float(gradient.square().sum()) for gradient in expected.values())
    assert size > 0
    assert (difference / size) ** 0.5 < TOLERANCE, f"gradients differ by {(difference / size) ** 0.5:.1e} of their norm"


def take_gradients(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def check_run(settings: Settings) -> None:
    """Run the job to its end: train, evaluate, save, load the adapter again, merge it, and use the merged model."""
    folder = pipeline.run(settings).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "complete", manifest["status"]
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3, losses
    base = load_model(settings.base.model_copy(update={"quantize": "none"}), conftest.CPU)
    adapted = peft.PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    merged: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        expected, found = (model(input_ids=ids, use_cache=False).logits for model in (adapted, merged))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def try_refused(name: str, folder: Path) -> Result:
    """Return a result with a problem unless `check` refuses an architecture in one sentence."""
    torch.manual_seed(0)
    AutoModel.from_config(config(name)).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    problem = "not refused"
    try:
        preflight.check_machine(preflight.check(make_settings(folder / "model", folder / "runs", "none")))
    except InvalidInputError as error:
        problem = "" if len(str(error)) <= 300 and "\n" not in str(error) else f"more than one sentence: {error}"
    return Result(name, problems={"none": problem} if problem else {})


def try_one(name: str) -> tuple[Result, float]:
    """Try an architecture, or that it is refused; return the result, and how many seconds it took."""
    logging_setup.configure()
    logging.disable(logging.WARNING)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        result = (try_refused if name in REFUSED else try_architecture)(name, Path(folder))
    return result, time.monotonic() - start


def row(result: Result) -> str:
    """Return the row of an architecture in the table of docs/models.md."""
    batches, recomputes = "packed" if result.packed else "padded", "yes" if result.recomputes else "no"
    return f"| `{result.name}` | {batches} | {recomputes} | {', '.join(f'`{name}`' for name in result.adapters)} |"


def refused_line() -> str:
    """Return the line about refused architectures in docs/models.md."""
    return f"Refused, because they are not causal language models: {', '.join(f'`{name}`' for name in REFUSED)}."


def write_table() -> None:
    """Write the table of docs/models.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    head = [
        "| `model_type` | micro-batches | recomputation | adapters without `TAGGER_LORA_TARGETS` |",
        "|---|---|---|---|",
    ]
    table = "\n".join([BEGIN, *head, *(row(describe(name)) for name in ARCHITECTURES), "", refused_line(), END])
    PAGE.write_text(before + table + rest.partition(END)[2], encoding="utf-8")


def main() -> int:
    """Try architectures, print a line for each, write the table, and return 1 if any has a problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="try these alone, and write no table")
    only = parser.parse_args().only
    results, start = [], time.monotonic()
    # spawned and not forked, which the threads of torch do not survive
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        for result, seconds in pool.map(try_one, only or [*ARCHITECTURES, *REFUSED]):
            results.append(result)
            for quantize, problem in result.problems.items():
                print(f"{result.name}, {quantize}: {problem}")
            print(f"{result.name}: {'FAILED' if result.problems else 'ok'} ({seconds:.1f} s)", flush=True)
    failed = [result.name for result in results if result.problems]
    print(
        f"{len(results)} architectures in {time.monotonic() - start:.0f} s, {len(failed)} with a problem {failed or ''}"
    )
    if not only and not failed:
        write_table()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
