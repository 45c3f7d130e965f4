"""The commands: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SAYINGS
from hub import READ_TOKEN, WRITE_TOKEN, Fault, Hub, Repo
from json_schema import violations
from test_atomic import largest_file
from tiny_run import REPO, move_to_hub, set_tiny_environment
from torch.optim.optimizer import register_optimizer_step_post_hook

from job.cli import COMMANDS, main
from job.errors import EXIT_CODES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, llama: Path) -> pytest.MonkeyPatch:
    return set_tiny_environment(monkeypatch, llama)


@pytest.fixture
def published(tiny: pytest.MonkeyPatch, loopback_hub: Hub, llama: Path) -> Hub:
    return move_to_hub(tiny, loopback_hub, llama)


@pytest.mark.parametrize("signalled", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_with_75_and_is_saved(
    tiny: pytest.MonkeyPatch, tmp_path: Path, signalled: signal.Signals
) -> None:
    tiny.setenv("TAGGER_TRAIN_MAX_STEPS", "400")
    tiny.setenv("TAGGER_TRAIN_SAVE_STEPS", "10")
    tiny.setenv("PYTHONPATH", str(ROOT))
    with subprocess.Popen([sys.executable, "-m", "job"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 12/400" in line:
                process.send_signal(signalled)
                break
        rest = process.stderr.read()
    assert process.returncode == 75, rest
    assert f"interrupted by {signalled.name}; the same command resumes from what is saved" in rest
    assert "Traceback" not in rest
    assert json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "checkpoint-10").is_dir()


def test_a_full_disk_ends_with_1_and_the_run_can_be_resumed(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    with largest_file(25_000):
        assert main([]) == 1
    err = capsys.readouterr().err
    assert "adapter cannot be written: File too large. What was saved before is intact: free disk space" in err
    assert "Traceback" not in err
    assert not (run / "adapter").exists()
    assert not list(run.rglob("*.tmp"))
    assert main([]) == 0
    assert json.loads((run / "manifest.json").read_text())["status"] == "complete"


@pytest.mark.parametrize(
    ("variables", "messages"),
    [
        ({"TAGGER_LORA_RANK": "8"}, ["TAGGER_LORA_RANK is not a setting"]),
        ({"TAGGER_DATA_DATASET": "absent.jsonl"}, ["absent.jsonl does not exist"]),
        ({"TAGGER_DATA_DATASET": "empty.jsonl"}, ["empty.jsonl has no rows"]),
        ({"TAGGER_DATA_TEXT_COLUMN": "text"}, ["no column 'text'; it has 'quote', 'tags'"]),
        ({"TAGGER_DATA_EVAL_SIZE": "59.0", "TAGGER_DATA_LIMIT": "59"}, ["holds out all of TAGGER_DATA_LIMIT=59"]),
        ({"TAGGER_DATA_SEPARATOR": "  "}, ["only white space"]),
        (
            {"TAGGER_DATA_MIN_TAG_COUNT": "99", "TAGGER_RUN_DIR": "/proc/runs"},
            ["MIN_TAG_COUNT=99 makes every tag rare", "cannot be written"],
        ),
        ({"TAGGER_BASE_MODEL": "./absent"}, ["./absent does not exist"]),
        ({"TAGGER_BASE_MODEL": "empty"}, ["empty has no config.json"]),
        ({"TAGGER_RUN_DIR": "/proc/runs"}, ["cannot be written", "TAGGER_RUN_DIR"]),
        ({"TAGGER_RUN_DEVICE": "auto", "TAGGER_TRAIN_PRECISION": "fp16"}, ["fp16 needs a GPU"]),
        ({"TAGGER_LORA_TARGETS": "nothing"}, ["no module named nothing", "q_proj"]),
        ({"TAGGER_HUB_PUSH": "always"}, ["needs a token"]),
        ({"TAGGER_SAMPLE_INPUT": "absent.txt"}, ["absent.txt cannot be read"]),
        ({"TAGGER_SAMPLE_OUTPUT": "link"}, ["TAGGER_SAMPLE_OUTPUT=link"]),
        ({"TAGGER_SAMPLE_OUTPUT": "empty"}, ["TAGGER_SAMPLE_OUTPUT=empty "]),
        (
            {"TAGGER_SAMPLE_OUTPUT": "empty.jsonl", "TAGGER_SAMPLE_INPUT": "empty.jsonl"},
            ["OUTPUT=empty.jsonl"],
        ),
        ({"TAGGER_LORA_TARGETS": "foo.q_proj"}, ["TAGGER_LORA_TARGETS: the model has no module named foo.q_proj"]),
        ({"TAGGER_SAMPLE_OUTPUT": "/proc/answers.jsonl"}, ["cannot be written", "TAGGER_SAMPLE_OUTPUT"]),
        (
            {"TAGGER_DATA_DATASET": "absent.jsonl", "TAGGER_BASE_MODEL": "./absent", "TAGGER_RUN_DIR": "/proc/runs"},
            ["absent.jsonl does not exist", "./absent does not exist", "/proc/runs cannot be written"],
        ),
    ],
)
def test_invalid_input_ends_with_2_and_writes_nothing(
    tiny: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    messages: list[str],
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty.jsonl")
    for name, value in variables.items():
        tiny.setenv(name, value)
    before = sorted(tmp_path.rglob("*"))
    assert main([]) == 2
    err = capsys.readouterr().err
    for message in messages:
        assert message in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "change",
    [{"model_type": "unheard-of"}, {"model_type": "t5"}, {"hidden_size": "big"}, {"num_hidden_layers": 9}, None],
)
def test_a_config_of_no_language_model_ends_with_2(
    tiny: pytest.MonkeyPatch,
    tmp_path: Path,
    llama: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any] | None,
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps([] if change is None else config | change))
    tiny.setenv("TAGGER_BASE_MODEL", str(folder))
    assert main([]) == 2
    err = capsys.readouterr().err
    assert str(folder) in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_rejected_run_ends_with_3_and_keeps_its_adapter(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.setenv("TAGGER_EVAL_GATE", "floor")
    tiny.setenv("TAGGER_EVAL_MIN_F1", "0.99")
    assert main([]) == 3
    assert "below TAGGER_EVAL_MIN_F1=0.99. The adapter was not published; it is saved in" in capsys.readouterr().err
    tiny.setenv("HF_TOKEN", WRITE_TOKEN)
    tiny.delenv("TAGGER_EVAL_GATE")
    assert main(["push"]) == 2
    assert "was rejected by its gate" in capsys.readouterr().err
    assert (tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_failed_push_ends_with_4_and_push_finishes_it(
    published: Hub, tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.faults = [Fault("/commit/main", "status", times=99, status=500)]
    assert main([]) == 4
    err = capsys.readouterr().err
    assert "publishing failed" in err
    assert "TAGGER_RUN_ID=tiny tagger-job push" in err
    trained = (tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors").read_bytes()
    published.faults = []
    for name in ("TAGGER_BASE_MODEL", "TAGGER_DATA_DATASET", "TAGGER_TRAIN_MAX_STEPS"):
        tiny.delenv(name)  # a run on disk knows its own
    assert main(["push"]) == 0
    assert published.models[REPO].titles == ["initial commit", "basic training"]
    assert published.models[REPO].branches["main"][-1].files["adapter_model.safetensors"] == trained
    assert json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())["status"] == "complete"
    assert main(["push"]) == 0
    assert published.models[REPO].titles == ["initial commit", "basic training"]


def test_prefetch_downloads_the_inputs_and_creates_nothing(published: Hub, tmp_path: Path) -> None:
    assert main(["prefetch"]) == 0
    requests = published.requests
    for path in ("/tiny/llama/resolve/.*model.safetensors", "/datasets/tiny/sayings/resolve/.*train.jsonl"):
        assert [request for request in requests if re.search(path, request)], path
    assert REPO not in published.models
    assert not (tmp_path / "runs").exists()


def test_check_prints_its_findings_and_trains_nothing(
    published: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    base = published.models["tiny/llama"].branches["main"][-1].oid
    assert f"base model: tiny/llama at {base}" in out
    assert "data: 60 rows read, 60 used; 52 examples to train on, 8 held out" in out
    assert "tags: 30 different" in out
    assert "example: " in out
    assert f"push: {REPO}" in out
    assert "longest example: " in out
    assert "memory: at least" in out
    assert not (tmp_path / "runs").exists()
    size = len(published.models["tiny/llama"].branches["main"][-1].files["model.safetensors"])
    assert published.bytes_served["model.safetensors"] < size / 3, "a check downloads the header, and no weights"


def test_check_as_json_follows_its_schema(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"quote": f"song number {n}", "tags": ["music", "Music" if n % 2 else f"tag {n}"]} for n in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, rows[0], {"quote": "", "tags": ["x"]}])
    (tmp_path / "songs.jsonl").write_text(lines)
    tiny.setenv("TAGGER_DATA_DATASET", str(tmp_path / "songs.jsonl"))
    assert main(["check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    schema = json.loads((ROOT / "job" / "runs" / "check.schema.json").read_text())
    assert list(violations(found, schema, schema)) == []
    data = found["data"]
    assert (data["rows"], data["used"], data["merged"]) == (42, 41, 1)
    assert data["skipped"] == {"no text": {"rows": 1, "first": f"{tmp_path / 'songs.jsonl'} line 42"}}
    assert data["tags"]["most_common"][0] == ["music", data["train"] + data["held_out"]]
    assert data["tags"]["respelled"] == {"Music": "music"}
    assert data["example"]["rendered"].startswith("song number ")
    assert data["warnings"] == [
        f"the tag 'music' is on {data['train'] + data['held_out']} of "
        f"{data['train'] + data['held_out']} texts, so it says little"
    ]


def test_check_measures_the_longest_example_without_its_rare_tags(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"quote": f"song {n}", "tags": ["music", f"only {n} has this rare tag"]} for n in range(30)]
    file = tmp_path / "songs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tiny.setenv("TAGGER_DATA_DATASET", str(file))
    tokens = []
    for count in ("1", "2"):
        tiny.setenv("TAGGER_DATA_MIN_TAG_COUNT", count)
        assert main(["check"]) == 0
        match = re.search(r"longest example: (\d+) tokens", capsys.readouterr().out)
        assert match is not None
        tokens.append(int(match[1]))
    assert tokens[1] < tokens[0] - 4


def test_check_lists_every_problem_at_once(
    published: Hub, tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.setenv("TAGGER_BASE_MODEL", "tiny/absent")
    tiny.setenv("TAGGER_DATA_REVISION", "v9")
    tiny.setenv("HF_TOKEN", READ_TOKEN)
    tiny.setenv("TAGGER_SAMPLE_INPUT", "absent.txt")
    for command in ("check", "run"):
        assert main([command]) == 2
        err = capsys.readouterr().err
        assert "the base model tiny/absent is not on the Hub" in err
        assert "the data set tiny/sayings has no revision v9" in err
        assert "HF_TOKEN may only read" in err
        assert "absent.txt cannot be read" in err
        assert READ_TOKEN not in err


def test_a_hub_model_without_safetensors_is_not_downloaded(published: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    repo = published.models["tiny/llama"] = Repo("tiny/llama")
    repo.commit("main", "weights", {"config.json": b"{}", "pytorch_model.bin": b"never read"})
    assert main([]) == 2
    assert "tiny/llama has no weights in safetensors, and pickles are not read" in capsys.readouterr().err
    assert not [request for request in published.requests if "/resolve/" in request]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be"),
            "error: the GPU failed: CUDA error: uncorrectable ECC error encountered. What was saved before is intact",
        ),
        (
            torch.AcceleratorError("CUDA error: unknown error"),
            "error: the GPU failed: CUDA error: unknown error. What was saved before is intact",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "error: the GPU is out of memory: CUDA out of memory. What was saved before is intact: end other programs",
        ),
    ],
    ids=["ecc", "off the bus", "out of memory"],
)
def test_a_gpu_that_fails_in_a_step_ends_the_run_which_resumes(
    tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any, error: RuntimeError, said: str
) -> None:
    """Raise what PyTorch raises when an update of the weights fails, in the third of five steps."""
    tiny.setenv("TAGGER_TRAIN_MAX_STEPS", "5")
    tiny.setenv("TAGGER_TRAIN_SAVE_STEPS", "2")
    updates = 0

    def fail(*_: object) -> None:
        nonlocal updates
        updates += 1
        if updates == 3:
            raise error

    hook = register_optimizer_step_post_hook(fail)
    try:
        assert main([]) == 1
        err = capsys.readouterr().err
        assert said in err
        assert "Traceback" not in err
        assert main([]) == 0
        assert "train: resuming after step 2 of 5" in caplog.text
    finally:
        hook.remove()


def test_an_error_of_a_program_on_the_gpu_is_a_defect_with_its_traceback(tiny: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    hook = register_optimizer_step_post_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            main([])
    finally:
        hook.remove()


@pytest.mark.parametrize("command", ["run", "check"])
def test_without_a_gpu_a_large_model_is_refused_with_the_reason(
    tiny: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any, command: str
) -> None:
    tiny.setattr(torch.cuda, "is_available", lambda: False)
    tiny.setattr("job.system.device.DRIVER_VERSION", tmp_path / "absent")
    tiny.setenv("TAGGER_RUN_DEVICE", "auto")
    with tiny.context() as patch:
        patch.setattr("job.estimate.CPU_PARAMETERS", 1000)
        assert main([command]) == 2
    assert "and this machine has no NVIDIA driver; use a machine with a GPU" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main([command]) == 0
    shown = capsys.readouterr().out + caplog.text
    assert "in fp32, because this machine has no NVIDIA driver" in shown
    assert "use a machine with a GPU" not in shown


def test_sample_uses_a_published_adapter_at_a_revision(
    published: Hub, tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 0
    capsys.readouterr()
    first = published.models[REPO].branches["main"][-1].oid
    published.models[REPO].commit("main", "broken since", {"adapter_config.json": b"{}"})
    tiny.setenv("TAGGER_HUB_REVISION", first)
    assert main(["sample", "another text"]) == 0
    assert capsys.readouterr().out.startswith("another text ->: ")


def test_sample_uses_an_adapter_as_it_was_trained(
    published: Hub, tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.setenv("TAGGER_DATA_SEPARATOR", "=>")
    assert main([]) == 0
    capsys.readouterr()
    for name in ("TAGGER_DATA_SEPARATOR", "TAGGER_BASE_MODEL"):
        tiny.delenv(name)
    assert main(["sample", "from the Hub"]) == 0
    tiny.delenv("TAGGER_HUB_REPO")
    assert main(["sample", "from the run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(" => ")[0] for line in out] == ["from the Hub", "from the run"]


def test_data_and_model_are_checked_before_heavy_imports(llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from job.cli import main; assert main([]) == 2;"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); assert not heavy, heavy"
    )
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "TAGGER_BASE_MODEL": "./absent",
        "TAGGER_DATA_DATASET": str(SAYINGS),
        "TAGGER_DATA_EVAL_SIZE": "100000",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "./absent does not exist" in done.stderr
    assert "the data has 600 examples" in done.stderr


def test_every_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"    {command} " in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_its_purpose_and_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert COMMANDS[command].description in " ".join(shown.split())
    assert f"  0  {EXIT_CODES[0].meaning}" in shown
    publishes = command in ("run", "retrain", "push", "promote")
    resumes = publishes or command in ("tag", "tune")
    assert f"  75 {EXIT_CODES[75].meaning if resumes else 'interrupted'}\n" in shown
    assert (EXIT_CODES[75].action in shown) == resumes
    assert (f"  4  {EXIT_CODES[4].meaning}" in shown) == publishes


def test_the_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom job.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "pydantic", "numpy", "huggingface_hub"}
    assert "exit codes" in done.stdout
    assert not heavy & set(done.stderr.split())


@pytest.mark.parametrize("text", [" ", "half a pair \ud83d"])
def test_an_unusable_text_to_tag_is_refused(
    tiny: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert main(["sample", "a text", text]) == 2
    assert "error: a TEXT to tag is empty or is not valid Unicode" in capsys.readouterr().err


def test_settings_lists_the_recipes_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["best", "best-bloomz", "offline"]
    assert all(len(line.split()) > 5 for line in lines)


def test_settings_shows_sources_and_masks_the_token() -> None:
    code = (
        "import sys; from job.cli import main; assert main(['settings']) == 0;"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'numpy', 'huggingface_hub'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    environ = {"PATH": "/usr/bin", "HF_TOKEN": "hf_do_not_show", "TAGGER_LORA_R": "8", "PYTHONPATH": str(ROOT)}
    environ |= {"TAGGER_LORA_TARGETS": "q_proj, v_proj", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TAGGER_LORA_R=8   # environment" in done.stdout
    assert "TAGGER_LORA_TARGETS=q_proj,v_proj   # environment" in done.stdout
    assert "TAGGER_LORA_ALPHA=32   # default" in done.stdout
    assert "HF_TOKEN=***" in done.stdout
    assert "HF_HUB_OFFLINE=1   # environment" in done.stdout
    assert "hf_do_not_show" not in done.stdout + done.stderr
