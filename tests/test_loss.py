"""The loss is the mean cross-entropy of the label tokens, whatever an architecture's own loss computes."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from torch.nn import functional
from transformers import PreTrainedModel

from job.dataset.tokenization import IGNORE_INDEX
from job.training.batching import Collator, num_label_tokens
from job.training.loss import LinearCrossEntropyFunction, has_linear_head, mean_loss
from job.types import EncodedExample

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    # its loss ignores shift_labels and num_items_in_batch
    "Bart": {
        "vocab_size": 50,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "dropout": 0,
    },
    # it knows no logits_to_keep
    "xLSTM": {**SHAPE, "embedding_dim": 32, "num_heads": 4, "num_blocks": 2, "chunk_size": 8},
    # its own loss adds one that balances the routers
    "Mixtral": {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "output_router_logits": True},
    "Gemma2": {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},  # it caps its logits
    "Llama": {**SHAPE, "intermediate_size": 48},
}
EXAMPLES = [
    EncodedExample([5, 6, 7, 8, 9, 10], [IGNORE_INDEX] * 3 + [8, 9, 10]),
    EncodedExample([11, 12, 13], [IGNORE_INDEX, 12, 13]),
    EncodedExample([14, 15], [14, 15]),
]


def adapted(name: str) -> peft.PeftModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config)
    targets = ["q_proj", "v_proj"] if name == "Mixtral" else "all-linear"
    lora = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, lora).train()  # type: ignore[return-value]


def summed_by_text(model: peft.PeftModel) -> torch.Tensor:
    """Sum the cross-entropy of each text alone, from all its logits."""
    total = torch.zeros(())
    for example in EXAMPLES:
        logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0]
        total += functional.cross_entropy(logits[:-1].float(), torch.tensor(example.labels[1:]), reduction="sum")
    return total


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_that_of_each_text_alone_over_the_label_tokens(name: str) -> None:
    model = adapted(name)
    label_tokens = num_label_tokens(EXAMPLES)
    assert label_tokens == 6
    expected = summed_by_text(model) / label_tokens
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = mean_loss(model, Collator(pad_token_id=3)(EXAMPLES), label_tokens=label_tokens)
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for n, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(n).grad, gradient, rtol=1e-3, atol=1e-6)


def test_a_head_with_a_bias_or_an_adapter_is_not_fused() -> None:
    model = adapted("Llama").get_base_model()
    assert has_linear_head(model)
    model.lm_head.bias = torch.nn.Parameter(torch.ones(50))  # type: ignore[union-attr,assignment]
    assert not has_linear_head(model)
    assert not has_linear_head(adapted("Gemma2").get_base_model())


def test_the_fused_loss_has_the_right_gradients() -> None:
    torch.manual_seed(0)
    hidden, head, labels = torch.randn(6, 8, requires_grad=True), torch.randn(30, 8), torch.tensor([0, 3, 29, 3, 7, 1])
    loss = LinearCrossEntropyFunction.apply(hidden, head, labels) * 0.5
    expected = functional.cross_entropy(hidden @ head.T, labels, reduction="sum") * 0.5
    torch.testing.assert_close(loss, expected)
    (own,), (plain,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(own, plain)


def test_fp16_does_not_lose_small_probabilities() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(4, 16, requires_grad=True), torch.randn(5000, 16)
    labels = torch.arange(4)
    (exact,) = torch.autograd.grad(functional.cross_entropy(hidden @ head.T, labels, reduction="sum"), hidden)
    loss = LinearCrossEntropyFunction.apply(hidden, head.half(), labels)
    (own,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(own, exact, rtol=0.02, atol=0.02)
