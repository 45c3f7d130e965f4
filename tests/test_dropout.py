"""Dropout masks depend on seed, step, example and position, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_training import make_examples, make_model, read_log, train_tiny
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from job.training import dropout
from job.training.dropout import DropoutKeys

CPU = torch.device("cpu")
RATE = 0.3


def masks(
    indices: list[int], lengths: list[int], *, packed: bool = True, seed: int = 1, step: int = 2, module: int = 0
) -> torch.Tensor:
    keys = DropoutKeys(seed)
    for _ in range(3):
        keys.add_module()
    keys.set_tokens(keys.tokens(step, indices, lengths, packed=packed))
    shape = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    return keys.mask(module, torch.empty(*shape, 200), RATE)


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def signed(x: int, bits: int) -> int:
    return x - 2**bits if x >= 2 ** (bits - 1) else x


def test_a_mask_is_the_documented_hash() -> None:
    found = masks([3], [5], seed=2**32 - 1, step=9, module=2)[0]
    for position in range(5):
        key = mix(mix(mix(mix(mix(2**32 - 1) ^ 9) ^ 3) ^ position) ^ 2) % 2**32 | 1
        for feature in (0, 1, 199):
            product = key * (mix(feature) % 2**32 | 1) % 2**32
            expected = signed(product, 32) < round(-(2**31) + RATE * 2**32)
            assert bool(found[position, feature]) == expected, (position, feature)


def test_an_example_has_the_same_mask_in_every_micro_batch() -> None:
    together = masks([4, 0, 2], [3, 5, 8])[0]
    assert torch.equal(masks([0], [5])[0], together[3:8])
    assert torch.equal(masks([2, 4], [8, 3])[0], torch.cat([together[8:], together[:3]]))
    padded = masks([4, 0, 2], [3, 5, 8], packed=False)
    assert torch.equal(padded[1, :5], together[3:8])


@pytest.mark.parametrize("other", [{"seed": 3}, {"step": 3}, {"module": 1}, {"indices": [5]}])
def test_each_seed_step_adapter_and_example_has_its_own_mask(other: dict[str, object]) -> None:
    inputs = {"indices": [4], "lengths": [100], "seed": 1, "step": 2, "module": 0}
    first, second = masks(**inputs), masks(**{**inputs, **other})  # type: ignore[arg-type]
    agreement = (first == second).float().mean()
    assert agreement == pytest.approx(RATE**2 + (1 - RATE) ** 2, abs=0.02)


def test_values_are_dropped_at_the_rate_and_independently() -> None:
    mask = masks(list(range(8)), [256] * 8)[0].double()
    assert float(mask.mean()) == pytest.approx(RATE, abs=0.003)
    scaled = (mask - RATE) / (RATE * (1 - RATE)) ** 0.5
    for values in (scaled, scaled[:200].T):  # features over tokens, tokens over features
        n, variables = values.shape
        correlations = (values.T @ values / n**0.5)[~torch.eye(variables, dtype=torch.bool)]
        assert float(correlations.std()) == pytest.approx(1, abs=0.05)
        assert float(correlations.abs().max()) < 6, "the largest of 20,000 normal variables is near 4"


def test_a_layer_that_sees_some_tokens_only_gets_masks_too() -> None:
    keys = DropoutKeys(1)
    keys.add_module()
    keys.set_tokens(keys.tokens(0, [0], [50], packed=True))
    mask = keys.mask(0, torch.empty(17, 200), RATE)
    assert float(mask.float().mean()) == pytest.approx(RATE, abs=0.03)
    assert torch.equal(mask, keys.mask(0, torch.empty(17, 200), RATE))


@pytest.mark.parametrize(("architecture", "checkpointing"), [("llama", "on"), ("bloom", "off")])
def test_training_with_dropout_does_not_depend_on_the_micro_batches(
    request: pytest.FixtureRequest, tmp_path: Path, architecture: str, checkpointing: str
) -> None:
    base = request.getfixturevalue(architecture)
    losses = []
    for tokens in (1000, 60, 1):
        model = make_model(base, dropout=RATE)
        settings = {"micro_batch_tokens": tokens, "gradient_checkpointing": checkpointing, "learning_rate": 1e-2}
        train_tiny(tmp_path / str(tokens), base, model=model, examples=make_examples(20), **settings)
        losses.append([entry["loss"] for entry in read_log(tmp_path / str(tokens))])
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    assert losses[2] == pytest.approx(losses[0], rel=2e-5)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, llama_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model with dropout of its own, 0.1 in three places, that is padded and has no torch.nn.Linear."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    size = {"vocab_size": len(llama_tokenizer), "n_embd": 64, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    llama_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_base_models_own_dropout_is_off_in_training_and_restored(
    tmp_path: Path, gpt2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses = []
    for tokens in (1000, 1):
        model = make_model(gpt2, dropout=RATE)
        before = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        train_tiny(tmp_path / str(tokens), gpt2, model=model, micro_batch_tokens=tokens)
        assert [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)] == before
        assert (model.config.attn_pdrop, RATE in before, 0.1 in before) == (0.1, True, True)
        losses.append([entry["loss"] for entry in read_log(tmp_path / str(tokens))])
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert "the base model's own dropout is off (Dropout.p, GPT2Config.attn_pdrop" in caplog.text


def test_without_training_nothing_is_dropped(llama: Path) -> None:
    model, keys = make_model(llama, dropout=RATE).eval(), DropoutKeys(1)
    ids = torch.arange(10, 20)[None]
    expected = model(input_ids=ids).logits
    with dropout.installed(model, keys):
        keys.set_tokens(keys.tokens(0, [0], [10], packed=False))
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert not torch.equal(model.train()(input_ids=ids).logits, expected)
