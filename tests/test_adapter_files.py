"""Of adapters that others made, only plain LoRA is read, with exactly the weights that its configuration describes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from conftest import CPU, make_settings
from hub import WRITE_TOKEN, Hub, Repo
from safetensors.torch import load_file, save_file
from tiny_run import REPO, move_to_hub, set_tiny_environment

from job.cli import main
from job.errors import InvalidInputError
from job.freeze import freeze
from job.lora import add_adapters, save_adapter
from job.quantize import load_model, load_tokenizer
from job.sample import load_tagger
from job.settings import Settings
from job.system import adapter_files

CATASTROPHIC = "(a+)+b" * 20


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    settings = make_settings(llama, tmp_path)
    model = load_model(settings.base, CPU)
    freeze(model)
    adapted = add_adapters(model, settings.lora, seed=1)
    save_adapter(adapted, load_tokenizer(settings.base), tmp_path / "adapter", settings.base)
    return tmp_path / "adapter"


def edit(folder: Path, **fields: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", "PROMPT_TUNING"),
        ("task_type", "SEQ_CLS"),
        ("target_modules", "all-linear"),
        ("target_modules", f".*{CATASTROPHIC}"),
        ("target_modules", ["q_proj", CATASTROPHIC]),
        ("target_modules", [f"module{i}" for i in range(20_000)]),
        ("target_modules", []),
        ("target_modules", ["q_proj\n"]),
        ("rank_pattern", {CATASTROPHIC: 8}),
        ("rank_pattern", {"q_proj": 10**9}),
        ("rank_pattern", {f"m{i}": 1 for i in range(20_000)}),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("alpha_pattern", ["q_proj"]),
        ("r", 10**9),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 1e300),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("auto_mapping", {"base_model_class": "Popen", "parent_library": "subprocess"}),
        ("megatron_config", {"x": 1}),
        ("megatron_core", "os"),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("eva_config", {"rho": 2}),
        ("loftq_config", {"loftq_bits": 4}),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 2]]),
        ("layers_pattern", CATASTROPHIC),
        ("exclude_modules", CATASTROPHIC),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["weight"]),
        ("a_method_of_the_future", True),
        ("revision", "refs/pr/1"),
        ("base_model_name_or_path", "x" * 2000),
    ],
)
def test_a_field_that_is_not_plain_lora_is_refused(
    settings: Settings, adapter: Path, field: str, value: object
) -> None:
    edit(adapter, **{field: value})
    started = time.monotonic()
    with pytest.raises(InvalidInputError, match=rf"there is no adapter to read in .*\b{field}\b") as refused:
        load_tagger(settings, adapter, CPU)
    assert time.monotonic() - started < 3
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "content",
    [b"[" * 50_000, b'{"peft_type": "LORA", "x": "' + b"y" * 2**20 + b'"}', b"<html>", b"{}", b'{"r": 1'],
    ids=["deep", "large", "html", "empty", "cut off"],
)
def test_a_file_that_is_no_config_is_refused(settings: Settings, adapter: Path, content: bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(InvalidInputError, match="there is no adapter to read in"):
        load_tagger(settings, adapter, CPU)


def test_fields_that_are_empty_or_peft_s_own_are_read(settings: Settings, adapter: Path) -> None:
    edit(adapter, modules_to_save=None, layers_pattern=[], unknown_but_empty=False, auto_mapping=None)
    load_tagger(settings, adapter, CPU)
    config = adapter_files.read_config(adapter)
    assert config.to_peft().target_modules == set(config.target_modules)


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}}],
)
def test_plain_variants_of_lora_answer_as_they_were_saved(
    settings: Settings, llama: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    model = load_model(settings.base, CPU)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(adapted, load_tokenizer(settings.base), tmp_path / "theirs", settings.base)
    ids = torch.arange(6)[None]
    expected = adapted.eval()(input_ids=ids).logits
    tagger = load_tagger(settings, tmp_path / "theirs", CPU)
    torch.testing.assert_close(tagger._model.eval()(input_ids=ids).logits, expected)


Weights = dict[str, torch.Tensor]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def without_first(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if name != FIRST}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_first, f"1 of 8 weights are missing, such as {FIRST}"),
        (lambda weights: {}, "8 of 8 weights are missing"),
        (lambda weights: weights | {"base_model.model.lm_head.weight": torch.ones(600, 64)}, "belong to no LoRA"),
        (
            lambda weights: weights | {FIRST.replace("layers.0", "layers.9"): weights[FIRST].clone()},
            "belong to no module",
        ),
        (lambda weights: weights | {FIRST: torch.cat([weights[FIRST]] * 2)}, "size mismatch|has the shape"),
        (lambda weights: weights | {FIRST: weights[FIRST].reshape(-1, 1)}, "size mismatch|has the shape"),
        (lambda weights: weights | {FIRST: weights[FIRST] * float("nan")}, "not finite"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(
    settings: Settings, adapter: Path, change: Callable[[Weights], Weights], message: str
) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(InvalidInputError, match=f"the weights of the adapter in .* cannot be read: .*({message})"):
        load_tagger(settings, adapter, CPU)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, loopback_hub: Hub, llama: Path) -> Repo:
    """Return a repo with an adapter for tiny/llama, whose manifest names another base model."""
    tiny = set_tiny_environment(monkeypatch, llama)
    move_to_hub(tiny, loopback_hub, llama)
    tiny.setenv("TAGGER_BASE_QUANTIZE", "none")
    settings = Settings()
    model = load_model(settings.base, CPU)
    adapted = add_adapters(model, settings.lora, seed=1)
    save_adapter(adapted, load_tokenizer(settings.base), Path("theirs"), settings.base)
    repo = loopback_hub.models[REPO] = Repo(REPO, private=True)
    repo.commit("main", "theirs", {file.name: file.read_bytes() for file in Path("theirs").iterdir()})
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    return repo


def put_manifest(repo: Repo, **values: object) -> None:
    settings = {f"TAGGER_{name}": value for name, value in values.items()}
    repo.commit("main", "a manifest", {"manifest.json": json.dumps({"settings": settings}).encode()})


def test_a_manifest_does_not_override_what_is_set(
    published: Repo,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TAGGER_BASE_REVISION", "main")
    put_manifest(published, BASE_MODEL="evil/model", BASE_QUANTIZE="nf4", BASE_REVISION="v9", DATA_MAX_LENGTH=64)
    code = main(["sample", "a text"])
    assert code == 0, capsys.readouterr().err
    assert "TAGGER_BASE_MODEL=tiny/llama is used, although the adapter in ada/tiny-tagger was trained" in caplog.text
    assert "TAGGER_BASE_QUANTIZE=none is used" in caplog.text
    assert "TAGGER_DATA_MAX_LENGTH" not in caplog.text, "it is not set here"


def test_an_adapter_for_another_base_model_than_is_set_ends_with_2(
    published: Repo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_manifest(published, BASE_MODEL="tiny/llama")
    monkeypatch.setenv("TAGGER_BASE_MODEL", "my/model")
    for command in (["sample", "a text"], ["evaluate"]):
        assert main(command) == 2
        assert "was trained on tiny/llama, not on my/model; set TAGGER_BASE_MODEL" in capsys.readouterr().err


@pytest.mark.parametrize("base", ["/etc", "./model", "~/model", "theirs.gguf"])
def test_a_path_in_a_manifest_of_the_hub_is_not_opened(
    published: Repo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: str
) -> None:
    put_manifest(published, BASE_MODEL=base, BASE_QUANTIZE="none")
    monkeypatch.delenv("TAGGER_BASE_MODEL")
    assert main(["sample", "a text"]) == 2
    assert f"was trained on {base}, a file or folder of the machine that trained it" in capsys.readouterr().err


def test_a_base_model_that_is_not_set_comes_from_the_manifest(
    published: Repo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_manifest(published, BASE_MODEL="tiny/llama", BASE_QUANTIZE="none")
    monkeypatch.delenv("TAGGER_BASE_MODEL")
    monkeypatch.delenv("TAGGER_BASE_QUANTIZE")
    assert main(["sample", "a text"]) == 0
    assert capsys.readouterr().out.startswith("a text ->: ")
