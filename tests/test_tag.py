"""`tagger-job tag` with a real model: answers, workers, streams, and what is refused before anything is written."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SAYINGS
from hub import WRITE_TOKEN, Hub, Repo
from tiny_run import set_tiny_environment

from job.cli import main

TEXTS = [f"a song about rain, number {i}" for i in range(23)]


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with a trained tagger."""
    runs = tmp_path_factory.mktemp("trained") / "runs"
    with pytest.MonkeyPatch.context() as tiny:
        set_tiny_environment(tiny, llama).setenv("TAGGER_RUN_DIR", str(runs))
        assert main(["run"]) == 0
    return runs


@pytest.fixture
def tiny(trained: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The variables of tagging 23 texts, in parts of about 5."""
    rows = [{"id": i, "quote": text} for i, text in enumerate(TEXTS)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    variables = {
        "TAGGER_RUN_DIR": str(trained),
        "TAGGER_RUN_DEVICE": "cpu",
        "TAGGER_SAMPLE_MAX_NEW_TOKENS": "12",
        "TAGGER_TAG_INPUT": "in.jsonl",
        "TAGGER_TAG_OUTPUT": "out.jsonl",
        "TAGGER_TAG_PART_ROWS": "5",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_file_is_tagged_like_sample_does(tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.setenv("TAGGER_RUN_PRICE_PER_HOUR", "3.6")
    assert main(["tag"]) == 0
    printed = capsys.readouterr().out
    found = lines(Path("out.jsonl").read_text(encoding="utf-8"))
    assert [row["quote"] for row in found] == TEXTS
    tiny.setenv("TAGGER_SAMPLE_OUTPUT", "samples.jsonl")
    assert main(["sample", *TEXTS]) == 0
    samples = lines(Path("samples.jsonl").read_text(encoding="utf-8"))
    assert [row["tags"] for row in found] == [sample["tags"] for sample in samples]
    assert [row["error"] is None for row in found] == [sample["well_formed"] for sample in samples]
    assert "rows: 23, " in printed
    assert "rows here in" in printed
    assert re.search(r"price: \$0\.0\d here, \$[\d,.]+ for a million rows \(by TAGGER_RUN_PRICE_PER_HOUR\)", printed)
    assert printed.endswith("the answers are in out.jsonl\n")
    capsys.readouterr()
    assert main(["tag"]) == 0
    assert "nothing was left to do" in capsys.readouterr().out


def test_a_long_text_is_cut_and_says_so(tiny: pytest.MonkeyPatch) -> None:
    Path("in.jsonl").write_text(json.dumps({"quote": "rain " * 2000}) + "\n" + '{"quote": "rain"}\n')
    assert main(["tag"]) == 0
    errors = [row["error"] or "" for row in lines(Path("out.jsonl").read_text())]
    assert errors[0].startswith("text cut to 512 tokens")
    assert "cut" not in errors[1]


def test_workers_of_an_array_job_write_the_same_bytes(
    tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tag"]) == 0
    tiny.setenv("TAGGER_TAG_OUTPUT", "out/")
    tiny.setenv("CLOUD_RUN_TASK_COUNT", "2")
    for index, summary in (("1", "rows here in"), ("0", "nothing was left to do")):  # the first one helps the other
        capsys.readouterr()
        tiny.setenv("CLOUD_RUN_TASK_INDEX", index)
        assert main(["tag"]) == 0
        assert summary in capsys.readouterr().out
    parts = sorted(Path("out").glob("part-*.jsonl"))
    assert len(parts) > 3
    assert b"".join(part.read_bytes() for part in parts) == Path("out.jsonl").read_bytes()
    assert json.loads(Path("out/_SUCCESS.json").read_text())["rows"] == 23
    assert main(["tag", "--restart"]) == 2
    assert "--restart with TAGGER_TAG_SHARD=0/2 would delete the parts of the other workers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b'{"quote": "a song", "id": 7}\n\n{"quote": ""}\n{"id": 8}', ["a song", "", None]),
        (b"a song\n\ntwo coins\r\n", ["a song", "", "two coins"]),
    ],
)
def test_standard_input_is_json_lines_or_texts(
    tiny: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], given: bytes, expected: list[str | None]
) -> None:
    tiny.setenv("TAGGER_TAG_INPUT", "-")
    tiny.delenv("TAGGER_TAG_OUTPUT")
    tiny.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert main(["tag"]) == 0
    found = lines(capfd.readouterr().out)
    assert [row.get("quote") for row in found] == expected
    assert [row["error"] == "no text" for row in found] == [not text for text in expected]


def test_a_file_can_be_written_to_standard_output(tiny: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    tiny.setenv("TAGGER_TAG_OUTPUT", "-")
    assert main(["tag"]) == 0
    assert [row["quote"] for row in lines(capfd.readouterr().out)] == TEXTS


def test_the_adapter_of_a_repo_is_pinned_to_its_commit(
    tiny: pytest.MonkeyPatch, trained: Path, llama: Path, loopback_hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = loopback_hub.models["ada/tagger"] = Repo("ada/tagger")
    files = {file.name: file.read_bytes() for file in (trained / "tiny" / "adapter").iterdir()}
    files["manifest.json"] = (trained / "tiny" / "manifest.json").read_bytes()
    first = repo.commit("main", "adapter", files)
    tiny.setenv("TAGGER_HUB_REPO", "ada/tagger")
    tiny.setenv("TAGGER_BASE_MODEL", str(llama))
    tiny.setenv("HF_TOKEN", WRITE_TOKEN)
    assert main(["tag"]) == 0
    success = json.loads(Path(".out.jsonl.parts/_SUCCESS.json").read_text())
    assert success["tagger"]["adapter"] == f"ada/tagger@{first.oid}"
    repo.commit("main", "another", files)
    assert main(["tag"]) == 2
    assert f"adapter was 'ada/tagger@{first.oid}'" in capsys.readouterr().err
    assert main(["tag", "--restart"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"INPUT": ""}, "TAGGER_TAG_INPUT is not set"),
        ({"OUTPUT": ""}, "TAGGER_TAG_OUTPUT is not set"),
        ({"INPUT": "absent.jsonl"}, "TAGGER_TAG_INPUT=absent.jsonl does not exist"),
        ({"INPUT": "*.csv"}, "TAGGER_TAG_INPUT=*.csv matches no file"),
        ({"INPUT": "ftp://host/a.jsonl"}, "TAGGER_TAG_INPUT=ftp://host/a.jsonl: ftp:// is unknown; expected s3, gs"),
        ({"OUTPUT": "file:///tmp/a.jsonl"}, "TAGGER_TAG_OUTPUT=file:///tmp/a.jsonl: file:// is unknown"),
        ({"OUTPUT": "hf://datasets/a/b/"}, "hf:// can only be read"),
        ({"INPUT": "-", "OUTPUT": "a.jsonl"}, "TAGGER_TAG_INPUT=- cannot be read a second time"),
        ({"OUTPUT": "out.txt"}, "TAGGER_TAG_OUTPUT=out.txt has no format that is known; expected a file that ends"),
        ({"OUTPUT": "in.jsonl"}, "TAGGER_TAG_OUTPUT=in.jsonl is also the input"),
        ({"OUTPUT": "mine.jsonl"}, "TAGGER_TAG_OUTPUT=mine.jsonl exists and was not written by this job"),
        ({"OUTPUT": "link.jsonl"}, "TAGGER_TAG_OUTPUT=link.jsonl is not a regular file"),
        ({"OUTPUT": "other"}, "other holds notes.txt and no parts of this job"),
        ({"INPUT": "data/", "OUTPUT": "data/out.jsonl"}, "is in the folder of the input and would be read as input"),
        ({"COLUMNS": "id,tags"}, "TAGGER_TAG_COLUMNS names tags, which the output has of its own"),
        (
            {"COLUMNS": "id,price"},
            "in.jsonl has no column 'price'; it has 'id', 'quote'. Set TAGGER_DATA_TEXT_COLUMN and",
        ),
        ({"SHARD": "3/3"}, "TAGGER_TAG_SHARD=3/3: expected auto, auto/n, or i/n with i from 0 to n - 1"),
        ({"MAX_ERRORS": "1.5"}, "TAGGER_TAG_MAX_ERRORS=1.5: expected a fraction below 1, or a whole number"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    for name in ("data/in.jsonl", "mine.jsonl", "other/notes.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text('{"quote": "a"}\n')
    Path("link.jsonl").symlink_to("mine.jsonl")
    before = sorted(Path().rglob("*"))
    for name, value in changes.items():
        tiny.setenv(f"TAGGER_TAG_{name}", value)
    assert main(["tag"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert all(line.startswith("error: ") and len(line) < 400 for line in printed.err.splitlines()), printed.err
    assert printed.out == ""
    assert sorted(Path().rglob("*")) == before


def test_settings_of_the_adapter_are_checked_first(
    tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path().rglob("*"))
    tiny.setenv("TAGGER_DATA_TEXT_COLUMN", "text")
    assert main(["tag"]) == 2
    assert "in.jsonl has no column 'text'; it has 'id', 'quote'. Set TAGGER_DATA_TEXT_COLUMN" in capsys.readouterr().err
    tiny.setenv("TAGGER_DATA_TEXT_COLUMN", "quote")
    tiny.setenv("TAGGER_RUN_ID", "none")
    assert main(["tag"]) == 2
    assert "there is no trained adapter in" in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


def test_a_closed_vocabulary_needs_the_tags_of_the_adapter(
    tiny: pytest.MonkeyPatch, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "copy" / "tiny" / "adapter" / "tagger.json").unlink()
    tiny.setenv("TAGGER_RUN_DIR", str(tmp_path / "copy"))
    tiny.setenv("TAGGER_SAMPLE_VOCABULARY", "seen")
    assert main(["tag"]) == 2
    assert "has no tagger.json with the tags it was trained on" in capsys.readouterr().err
    assert not Path(".out.jsonl.parts").exists()


def test_training_data_can_be_tagged(tiny: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    Path("sayings.jsonl").write_text("".join(SAYINGS.read_text(encoding="utf-8").splitlines(keepends=True)[:4]))
    tiny.setenv("TAGGER_TAG_INPUT", "sayings.jsonl")
    tiny.setenv("TAGGER_TAG_OUTPUT", "out.csv.gz")
    assert main(["tag"]) == 0
    assert "the output has columns of its own in place of tags of the input" in caplog.text
