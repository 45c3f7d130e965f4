"""The baseline on sentence embeddings, with a tiny model of the library's own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import WRITE_TOKEN, Hub, Repo
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from job import preflight
from job.errors import InvalidInputError
from job.hub.embedders import resolve_embedder
from job.metrics.baselines import score_baselines
from job.metrics.embeddings import load_embedding_baseline
from job.settings import Eval, Settings
from job.types import Example


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory, bloom_tokenizer: PreTrainedTokenizerFast) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    base, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": len(bloom_tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    BertModel(BertConfig(intermediate_size=32, max_position_embeddings=128, **size)).save_pretrained(base)
    bloom_tokenizer.save_pretrained(base)
    layers = [Transformer(str(base), max_seq_length=64), Pooling(32, "mean"), Normalize()]
    SentenceTransformer(modules=layers, device="cpu").save(str(folder))
    return folder


def test_the_embedding_baseline_learns_what_the_texts_say(encoder_folder: Path, rows: list[dict[str, Any]]) -> None:
    words = ["rain", "bread", "sea"] * 200
    examples = [Example(f"{word} {word} {row['quote'][:20]}", (word,)) for row, word in zip(rows, words, strict=True)]
    more = load_embedding_baseline(Eval(embedder=str(encoder_folder)), "cpu")
    scores = score_baselines(examples[:200], examples[200:300], more)
    assert scores["embedder"].f1 > scores["most_common_tags"].f1 + 0.2
    assert scores == score_baselines(examples[:200], examples[200:300], more), "it is not deterministic"


@pytest.mark.parametrize("tags", [["x"] * 40, ["x", "y"] * 20, [str(i) for i in range(40)]], ids=["one", "two", "own"])
def test_data_with_little_to_learn_have_an_embedding_baseline_too(encoder_folder: Path, tags: list[str]) -> None:
    examples = [Example("?!", (tag,)) for tag in tags]
    more = load_embedding_baseline(Eval(embedder=str(encoder_folder)), "cpu")
    assert score_baselines(examples[:30], examples[30:], more)["embedder"].n == 10


def test_without_an_embedding_model_there_is_no_such_baseline() -> None:
    assert load_embedding_baseline(Eval(), "cpu") == {}


def damaged(source: Path, folder: Path, what: str) -> Path:
    """Return a copy of the model with one defect."""
    import shutil

    shutil.copytree(source, folder)
    if what == "no modules":
        (folder / "modules.json").unlink()
    elif what == "no list":
        (folder / "modules.json").write_text('{"type": 1}', encoding="utf-8")
    elif what == "foreign code":
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        (folder / "modules.json").write_text(json.dumps([*modules, {"type": "os.path"}]), encoding="utf-8")
    elif what == "pickles":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif what == "cut off":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    elif what == "not numbers":
        weights = load_file(folder / "model.safetensors")
        nan = {name: torch.full_like(value, torch.nan) for name, value in weights.items()}
        save_file(nan, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no modules", "has no modules.json; set TAGGER_EVAL_EMBEDDER to a model of sentence-transformers"),
        ("no list", "has a modules.json that cannot be read"),
        ("foreign code", "needs code that is not part of the library (os.path), which is not run"),
        ("pickles", "has no weights in safetensors"),
        ("cut off", "cannot be loaded"),
        ("not numbers", "its embeddings are not numbers"),
    ],
)
def test_a_folder_that_is_no_embedding_model_is_refused(
    encoder_folder: Path, tmp_path: Path, what: str, message: str
) -> None:
    folder = damaged(encoder_folder, tmp_path / "encoder", what)
    with pytest.raises(InvalidInputError) as error:
        load_embedding_baseline(Eval(embedder=str(folder)), "cpu")
    assert message in str(error.value)


def test_the_check_refuses_an_embedding_model_that_is_missing(
    settings: Settings, loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    missing = {
        "ada/no-encoder": "the embedding model ada/no-encoder is not on the Hub",
        str(tmp_path / "no"): "does not exist",
    }
    for name, message in missing.items():
        with pytest.raises(InvalidInputError) as error:
            preflight.check(settings.model_copy(update={"eval": Eval(embedder=name)}))
        assert message in str(error.value)
        assert "TAGGER_EVAL_EMBEDDER" in str(error.value)


def test_an_embedding_model_of_the_hub_is_pinned_and_downloaded(
    settings: Settings, encoder_folder: Path, loopback_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    repo = loopback_hub.models["ada/encoder"] = Repo("ada/encoder")
    files = {
        str(file.relative_to(encoder_folder)): file.read_bytes() for file in encoder_folder.rglob("*") if file.is_file()
    }
    first = repo.commit("main", "weights", files)
    checked = preflight.check(settings.model_copy(update={"eval": Eval(embedder="ada/encoder")}))
    repo.commit("main", "later", {"modules.json": b"[]"})
    assert checked.settings.eval.embedder_revision == first.oid
    folder = resolve_embedder(checked.settings.eval)
    assert folder is not None
    assert {path.relative_to(folder) for path in folder.rglob("*.safetensors")} == {Path("model.safetensors")}
    assert load_embedding_baseline(checked.settings.eval, "cpu")
