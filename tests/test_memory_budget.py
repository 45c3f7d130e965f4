"""The planned micro-batches are as large as memory allows, within the configured limits."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MambaModel,
    MptConfig,
    PreTrainedConfig,
)

from bench.gpu import models
from job.settings import Train
from job.system.device import ComputeSpec
from job.training.memory_budget import (
    LOGIT_BYTES,
    MEMORY_FRACTION,
    BatchPlan,
    activation_bytes,
    packed_layer_bytes,
    plan_batches,
)
from job.types import EncodedExample

CONFIG = LlamaConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
EXAMPLES = [EncodedExample([7] * 40, [-100] * 30 + [7] * 10), EncodedExample([7] * 24, [-100] * 18 + [7] * 6)]
LABEL_SHARE = 16 / 64


class LimitedMemory(ComputeSpec):
    """A CPU with this much memory free."""

    free = 0.0

    def free_memory(self) -> float:
        return self.free


def plan(free: float, **settings: object) -> BatchPlan:
    compute = LimitedMemory(torch.device("cpu"), "fp32")
    object.__setattr__(compute, "free", free)
    return plan_batches(CONFIG, EXAMPLES, Train.model_validate(settings), compute, max_tokens=256)


def bytes_per_token(*, recompute: bool) -> float:
    return activation_bytes(CONFIG, 40, 4, recompute=recompute) + LABEL_SHARE * LOGIT_BYTES * 1000


@pytest.mark.parametrize("tokens", [1, 39, 40, 200, 256])
@pytest.mark.parametrize("setting", ["on", "off"])
def test_micro_batches_fill_the_planned_share_of_memory(tokens: int, setting: str) -> None:
    free = (tokens + 0.5) * bytes_per_token(recompute=setting == "on") / MEMORY_FRACTION
    assert plan(free, gradient_checkpointing=setting) == BatchPlan(tokens, recompute=setting == "on")


def test_micro_batches_have_at_most_max_tokens_and_at_least_one() -> None:
    assert plan(2.0**40) == BatchPlan(256, recompute=False)
    assert plan(0.0) == BatchPlan(1, recompute=True)


def test_a_configured_size_is_kept() -> None:
    assert plan(2.0**40, micro_batch_tokens=1000) == BatchPlan(1000, recompute=False)
    assert plan(0.0, micro_batch_tokens=1000) == BatchPlan(1000, recompute=True)


@pytest.mark.parametrize(("tokens", "recompute"), [(39.5, True), (40.5, False)])
def test_auto_recomputes_only_if_the_longest_example_does_not_fit(tokens: float, recompute: bool) -> None:
    assert plan(tokens * bytes_per_token(recompute=False) / MEMORY_FRACTION).recompute == recompute


def test_recomputation_keeps_fewer_activations() -> None:
    assert activation_bytes(CONFIG, 40, 4, recompute=True) < activation_bytes(CONFIG, 40, 4, recompute=False)
    assert activation_bytes(CONFIG, 40, 2, recompute=False) == 3 * (34 * 64 + 5 * 4 * 40), "Korthikanti et al."


@pytest.mark.parametrize(
    ("config", "layer_bytes"),
    [
        (
            MambaConfig(hidden_size=64, num_hidden_layers=3, state_size=8),
            34 * 64 + 12 * 2 * 64 * 8,
        ),  # no attention heads
        (Mamba2Config(hidden_size=64, num_hidden_layers=3, num_heads=8, head_dim=16), 34 * 64 + 16 * 8 * 256),
        (BartConfig(d_model=64, decoder_layers=3, encoder_layers=9, decoder_attention_heads=4), 34 * 64 + 5 * 4 * 40),
        (GPT2Config(n_embd=64, n_layer=3, n_head=4), 34 * 64 + 5 * 4 * 40),
        (MptConfig(d_model=64, n_layers=3, n_heads=4), 34 * 64 + 5 * 4 * 40),
    ],
)
def test_shapes_are_read_under_each_architecture_s_names(config: PreTrainedConfig, layer_bytes: int) -> None:
    assert activation_bytes(config, 40, 2, recompute=False) == 3 * layer_bytes


def test_the_activations_of_a_mamba_are_estimated_as_they_are_kept() -> None:
    config = MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=16)
    model, ids, saved = MambaModel(config).train(), torch.randint(50, (1, 64)), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False)
    kept = sum(size for pointer, size in saved.items() if pointer not in weights)
    assert 0.7 < 64 * activation_bytes(config, 64, 4, recompute=False) / kept < 1.4


@pytest.mark.parametrize(("shape", "used"), [("bloomz-560m", 30.4), ("SmolLM2-135M", 30.9)])
def test_packed_layers_are_estimated_as_measured_on_a_gpu(shape: str, used: float) -> None:
    """`used` is what an H100 used in bf16 with the recipe's adapters, in bytes for each number of the hidden size."""
    config = models.config(shape, toy=False)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        targets = list(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[config.model_type])
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=16, lora_dropout=0.05, target_modules=targets))
    estimated = packed_layer_bytes(adapted.get_base_model(), 2)
    assert estimated is not None
    assert 1.0 < estimated / config.hidden_size / used < 1.2


def test_no_packed_layer_is_estimated_where_texts_are_padded() -> None:
    assert (
        packed_layer_bytes(
            AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)), 2
        )
        is None
    )
