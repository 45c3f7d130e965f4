"""The job on Hugging Face Jobs: requests, prices, real processes as containers, exit codes, buckets."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_jobs
import pytest
from hub import READ_TOKEN, WRITE_TOKEN, Fault, Hub
from tiny_run import TINY_ON_THE_HUB, fill_hub, store_manifest

from job.cloud import hfjobs, hfjobs_launcher, hfjobs_worker
from job.errors import JobError
from job.hub import client as hub_client
from job.runs import objects
from job.runs.stored_run import stored_ids
from job.tagging import storage

ROOT = Path(__file__).parents[1]
IMAGE = "ghcr.io/ada/tagger-job:0.2.0"
STORE = "hf://buckets/ada/tagger-runs/runs"


@pytest.fixture
def jobs(loopback_hub: Hub, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_jobs.JobsHub]:
    """A Hub with Jobs, and the variables of a caller."""
    fill_hub(loopback_hub, llama)
    (tmp_path / "xet").mkdir()
    extra = hub_jobs.install(loopback_hub, tmp_path / "xet")
    spec = importlib.util.spec_from_file_location("xet_stub", ROOT / "tests" / "xet" / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    monkeypatch.setattr("huggingface_hub.utils._xet.get_xet_session", stub.Session)
    monkeypatch.setattr(objects, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(hfjobs, "POLL_SECONDS", 0.02)
    for name, value in {**TINY_ON_THE_HUB, "XET_FOLDER": str(tmp_path / "xet"), "HF_TOKEN": WRITE_TOKEN}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TAGGER_HFJOBS_IMAGE", IMAGE)
    monkeypatch.setenv("TAGGER_TRAIN_MAX_STEPS", "3")
    yield extra
    extra.end()


def call(*words: str) -> int:
    """Return the exit code of a command of hf_app.py."""
    try:
        hfjobs_launcher.perform(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_run_trains_publishes_and_leaves_its_run_in_the_bucket(
    jobs: hub_jobs.JobsHub,
    loopback_hub: Hub,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TAGGER_RUN_NOTIFY", "http://127.0.0.1:9/hook/not-for-others")
    assert call("run", "--flavor", "cpu-basic") == 0
    printed = capfd.readouterr()
    assert "price: cpu-basic costs $0.01 an hour, at most $0.18 for 6 h by 3 attempts" in printed.err
    assert "the adapter is at " in printed.out
    assert "price: 90 s on cpu-basic, about $0.00" in printed.out
    [job] = jobs.jobs.values()
    assert job.spec["dockerImage"] == IMAGE
    assert job.spec["command"] == ["python", "-m", "job.cloud.hfjobs_worker", "run"]
    assert set(job.spec["secrets"]) == {"HF_TOKEN", "TAGGER_RUN_NOTIFY"}
    assert "not-for-others" not in json.dumps({**job.spec, "secrets": {}}) + printed.err + printed.out
    assert job.spec["environment"]["TAGGER_RUN_STORE"] == STORE
    assert len(job.spec["environment"]["TAGGER_DATA_REVISION"]) == 40
    assert (job.spec["timeoutSeconds"], job.spec["attempts"]) == (6 * 3600, 3)
    assert WRITE_TOKEN not in json.dumps({**job.spec, "secrets": {}}) + printed.err + printed.out
    assert jobs.private == {"ada/tagger-runs": True}
    assert loopback_hub.models["ada/tiny-tagger"].titles[-1].startswith("basic training")

    [run_id] = stored_ids(objects.open_objects(STORE))
    assert call("status") == 0
    assert f"run {run_id}: complete" in capfd.readouterr().out
    assert call("fetch", "--run-id", run_id, "--to", "fetched") == 0
    assert (Path("fetched") / run_id / "adapter" / "adapter_model.safetensors").is_file()
    assert call("fetch", "--run-id", "none") == 2
    assert "has no run none" in capfd.readouterr().err


def set_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Let containers run a script in place of the job's commands."""
    file = tmp_path / "worker.py"
    file.write_text(
        "import os, sys, time, pathlib\nfrom job import cli\nfrom job.cloud import hfjobs_worker\n"
        f"attempts = pathlib.Path({str(tmp_path / 'attempts')!r})\n"
        "attempts.write_text(attempts.read_text() + 'x' if attempts.exists() else 'x')\n"
        "number = len(attempts.read_text())\n"
        f"def main(arguments):\n{script}\ncli.main = main\n"
        "code = hfjobs_worker.run_command(sys.argv[1:])\nsys.stdout.flush()\nos._exit(code)\n"
    )
    monkeypatch.setattr(hfjobs, "WORKER", ["python", str(file)])


@pytest.mark.parametrize(("code", "attempts"), [(3, 1), (75, 2)])
def test_the_caller_ends_with_the_exit_code_of_the_job(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, attempts: int
) -> None:
    monkeypatch.setenv("TAGGER_HFJOBS_ATTEMPTS", "2")
    set_command(monkeypatch, tmp_path, f"    return {code}")
    assert call("run") == code
    [job] = jobs.jobs.values()
    assert len(job.exit_codes) == attempts


def test_an_interrupted_attempt_is_repeated(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    set_command(monkeypatch, tmp_path, "    print('attempt', number)\n    return 75 if number == 1 else 0")
    assert call("run") == 0
    assert [line for line in capfd.readouterr().err.splitlines() if "attempt " in line] == ["attempt 1", "attempt 2"]


def test_a_job_that_is_killed_or_canceled_ends_with_75(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TAGGER_HFJOBS_ATTEMPTS", "2")
    set_command(monkeypatch, tmp_path, "    os.kill(os.getpid(), 9)")
    assert call("run") == 75
    assert "its attempt 2 was stopped without an outcome (Job timeout)" in capfd.readouterr().err
    set_command(
        monkeypatch,
        tmp_path,
        "    import urllib.request as r\n    job = os.environ['JOB_ID']\n"
        "    r.urlopen(r.Request(f\"{os.environ['HF_ENDPOINT']}/api/jobs/ada/{job}/cancel\", method='POST'))\n"
        "    time.sleep(60)",
    )
    assert call("run") == 75
    assert "it was canceled" in capfd.readouterr().err


def test_a_killed_attempt_does_not_end_like_the_one_before(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TAGGER_HFJOBS_ATTEMPTS", "2")
    set_command(monkeypatch, tmp_path, "    if number == 2:\n        os.kill(os.getpid(), 9)\n    return 1")
    assert call("run") == 75
    assert "its attempt 2 was stopped without an outcome" in capfd.readouterr().err


def test_a_completed_job_without_an_outcome_is_not_called_stopped(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.py").touch()
    monkeypatch.setattr(hfjobs, "WORKER", ["python", str(tmp_path / "other.py")])
    assert call("run") == 1
    [job] = jobs.jobs
    error = capfd.readouterr().err
    assert "it completed, but its outcome is not in the bucket; its log says how it ended: http" in error
    assert f"/jobs/ada/{job}" in error


def test_a_run_that_was_begun_keeps_its_revisions(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_command(monkeypatch, tmp_path, "    return 0")
    jobs.buckets["ada/tagger-runs"] = {}
    store_manifest(STORE, "begun", b"{}")
    for run_id in ("begun", "new"):
        assert call("run", "--run-id", run_id) == 0
    begun, new = (job.spec["environment"] for job in jobs.jobs.values())
    assert "TAGGER_BASE_REVISION" not in begun and "TAGGER_DATA_REVISION" not in begun
    assert len(new["TAGGER_BASE_REVISION"]) == len(new["TAGGER_DATA_REVISION"]) == 40


def test_ctrl_c_leaves_the_job_running_and_says_so(
    jobs: hub_jobs.JobsHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loopback_hub: Hub
) -> None:
    set_command(monkeypatch, tmp_path, "    time.sleep(20)\n    return 0")
    script = "\n".join(
        [
            "import sys",
            f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests' / 'xet')!r}]",
            "from job.cloud import hfjobs, hfjobs_launcher",
            f"hfjobs.WORKER = {hfjobs.WORKER!r}",
            "hfjobs_launcher.perform(['run'])",
        ]
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "HF_ENDPOINT": loopback_hub.url}, stderr=subprocess.PIPE
    )
    while not jobs.jobs:
        time.sleep(0.05)
    time.sleep(0.3)
    caller.send_signal(signal.SIGINT)
    _, error = caller.communicate(timeout=30)
    assert caller.returncode == 75
    [job] = jobs.jobs.values()
    assert f"the job ada/{job.id} still runs and costs money".encode() in error
    assert job.stage == "RUNNING"


def test_retraining_is_started_by_a_schedule_or_by_new_data(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    set_command(monkeypatch, tmp_path, "    return 0")
    assert call("retrain", "--schedule", "0 4 * * 1") == 0
    [schedule] = jobs.schedules
    assert (schedule["schedule"], schedule["concurrency"]) == ("0 4 * * 1", False)
    assert schedule["jobSpec"]["command"][-1] == "retrain"
    assert "TAGGER_DATA_REVISION" not in schedule["jobSpec"]["environment"]
    assert not jobs.jobs
    for message in ("starts this job again whenever tiny/sayings changes", "watches tiny/sayings already"):
        assert call("retrain", "--when-data-changes") == 0
        assert message in capfd.readouterr().out
    [webhook] = jobs.webhooks
    assert webhook["sent"]["watched"] == [{"type": "dataset", "name": "tiny/sayings"}]
    assert webhook["sent"]["domains"] == ["repo"]
    assert webhook["sent"]["secrets"] == {"HF_TOKEN": WRITE_TOKEN}
    assert all("TAGGER_DATA_REVISION" not in job.spec["environment"] for job in jobs.jobs.values())


def test_a_webhook_of_others_is_not_taken_for_ours(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_command(monkeypatch, tmp_path, "    return 0")
    assert call("retrain", "--when-data-changes", "--repo", "ada/one") == 0
    [ours] = jobs.webhooks
    jobs.webhooks = [{**ours, "id": "w0", "job": {**ours["job"], "labels": None}}, ours]
    assert call("retrain", "--when-data-changes", "--repo", "ada/other") == 0
    assert len(jobs.webhooks) == 3


def test_a_refusal_to_list_webhooks_costs_nothing(
    jobs: hub_jobs.JobsHub, loopback_hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    loopback_hub.faults = [Fault("GET /api/settings/webhooks", "status", status=403)]
    assert call("retrain", "--when-data-changes") == 2
    assert "the list of webhooks: the Hub answered" in capfd.readouterr().err
    assert not jobs.jobs


def test_the_token_of_a_file_is_used_as_in_the_job(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    Path(".env").write_text(f"HF_TOKEN={WRITE_TOKEN}\n")
    assert call("retrain", "--schedule", "@daily") == 0
    [schedule] = jobs.schedules
    assert schedule["jobSpec"]["secrets"] == {"HF_TOKEN": WRITE_TOKEN}
    assert WRITE_TOKEN not in "".join(capfd.readouterr())


def test_a_price_of_another_unit_is_shown_as_it_is(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    set_command(monkeypatch, tmp_path, "    return 0")
    hardware = [{**each, "unitLabel": "fortnight"} for each in hub_jobs.HARDWARE]
    monkeypatch.setattr(hub_jobs, "HARDWARE", hardware)
    assert call("run") == 0
    printed = capfd.readouterr()
    assert "price: l4x1 costs $0.01 per fortnight, for at most 6 h by 3 attempts" in printed.err
    assert "price: 90 s on l4x1\n" in printed.out
    assert call("status") == 0
    assert "90 s on l4x1; http" in capfd.readouterr().out


def test_texts_and_parts_are_tagged_by_jobs(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = "    print(arguments, os.environ.get('TAGGER_SAMPLE_PROMPTS'))\n    return 0"
    set_command(monkeypatch, tmp_path, script)
    monkeypatch.setenv("TAGGER_SAMPLE_PROMPTS", '["of the settings"]')
    assert call("sample", "--text", "a song", "--text=-x") == 0
    assert """['sample'] ["a song", "-x"]""" in capfd.readouterr().err
    [job] = jobs.jobs.values()
    assert "a song" not in json.dumps({**job.spec, "secrets": {}}), "the page of the job shows all but secrets"
    output = "hf://buckets/ada/texts/tags/"
    assert call("tag", "--input", "ada/texts", "--output", output, "--containers", "2") == 0
    assert "at most $28.80 for 6 h by 3 attempts of 2 jobs" in capfd.readouterr().err
    shares = [job.spec["environment"].get("TAGGER_TAG_SHARD") for job in jobs.jobs.values()]
    assert shares == [None, "0/2", "1/2"]


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["run"], {"HF_TOKEN": ""}, "needs a token; set HF_TOKEN"),
        (["run"], {"HF_TOKEN": "hf_wrong"}, "set HF_TOKEN to a valid token"),
        (["run"], {"HF_TOKEN": READ_TOKEN}, "give HF_TOKEN write access and the permission to run jobs"),
        (["run"], {"TAGGER_HFJOBS_IMAGE": ""}, "TAGGER_HFJOBS_IMAGE is not set"),
        (["run"], {"TAGGER_HFJOBS_IMAGE": "a b"}, "TAGGER_HFJOBS_IMAGE"),
        (["run", "--flavor", "h900"], {}, "TAGGER_HFJOBS_FLAVOR=h900 is not offered; expected one of cpu-basic, l4x1"),
        (["run", "--timeout-hours", "0"], {}, "TAGGER_HFJOBS_TIMEOUT_HOURS=0"),
        (["run"], {"TAGGER_HFJOBS_NAMESPACE": "others"}, "set TAGGER_HFJOBS_NAMESPACE"),
        (["run", "--dataset", "x.csv"], {}, "x.csv is not in the container of Hugging Face Jobs"),
        (["run"], {"TAGGER_RUN_STORE": "s3://bucket"}, "remove TAGGER_RUN_STORE"),
        (["run", "--run-id", ""], {}, "--run-id is empty"),
        (["fetch"], {}, "fetch needs the name of a run"),
        (["sample", "--text", " "], {}, "a --text to tag is empty"),
        (["tag", "--input", "x.csv", "--output", "y/"], {}, "TAGGER_TAG_INPUT=x.csv cannot be read there"),
        (["tag", "--input", "ada/x", "--output", "s3://b/"], {}, "TAGGER_TAG_OUTPUT=s3://b/ cannot be written there"),
        (["tag", "--containers", "0"], {}, "--containers 0: expected a number of at least 1"),
        (["retrain", "--schedule", "@daily", "--when-data-changes"], {}, "choose one"),
        (["retrain", "--schedule", "@daily", "--run-id", "x"], {}, "would make all retrainings one run"),
    ],
)
def test_what_cannot_work_is_refused_before_a_job_is_started(
    jobs: hub_jobs.JobsHub,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    variables: dict[str, str],
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert call(*words) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not jobs.jobs


@pytest.mark.parametrize(("status", "message"), [(402, "add credits"), (503, "run the same command again")])
def test_an_answer_that_refuses_a_job_says_what_to_do(
    jobs: hub_jobs.JobsHub, loopback_hub: Hub, capfd: pytest.CaptureFixture[str], status: int, message: str
) -> None:
    loopback_hub.faults = [Fault("POST /api/jobs/", "status", times=99, status=status)]
    assert call("run") == 2
    assert message in capfd.readouterr().err


SLEEP = "    time.sleep(20)\n    return 0"


@pytest.mark.parametrize(
    ("words", "fault", "code", "message"),
    [
        (
            ["retrain", "--when-data-changes"],
            Fault("POST /api/settings/webhooks", "status", status=403),
            1,
            "a webhook",
        ),
        (["tag", "--input", "ada/x", "--output", "hf://buckets/ada/y/", "--containers", "2"], 1, 75, "told to fail"),
        (["run"], Fault("GET /api/jobs/ada/[0-9a-f]{24}", "status", times=99), 75, "cannot be followed any longer"),
        (["run"], Fault("GET /api/jobs/ada/[0-9a-f]{24}", "status", times=99, status=401), 1, "a valid token"),
    ],
)
def test_an_error_after_a_start_names_the_jobs_that_still_run(
    jobs: hub_jobs.JobsHub,
    loopback_hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    fault: Fault | int,
    code: int,
    message: str,
) -> None:
    set_command(monkeypatch, tmp_path, SLEEP)
    monkeypatch.setattr(hfjobs, "LOST_SECONDS", 0.2)
    if not isinstance(fault, Fault):  # the second start fails
        first = Fault("POST /api/jobs/ada", "before")
        fault = Fault("POST /api/jobs/ada", "status", status=429)
        loopback_hub.faults = [first]
    loopback_hub.faults = [*loopback_hub.faults, fault]
    assert call(*words) == code
    error = capfd.readouterr().err
    [job] = jobs.jobs.values()
    assert message in error
    assert f"the job ada/{job.id} still runs and costs money" in error
    assert "`hf jobs logs -f ID` follows one, `hf jobs cancel ID` ends it" in error
    assert job.stage == "RUNNING"
    assert "Traceback" not in error


def test_a_job_is_followed_over_a_lost_connection(
    jobs: hub_jobs.JobsHub,
    loopback_hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    set_command(monkeypatch, tmp_path, "    print('a line')\n    return 3")
    loopback_hub.faults = [
        Fault("GET /api/jobs/ada/[0-9a-f]{24}/logs", "status"),
        Fault("GET /api/jobs/ada/[0-9a-f]{24}$", "status"),
        Fault("GET /api/jobs/ada/[0-9a-f]{24}$", "drop"),
    ]
    monkeypatch.setattr(hub_client.time, "sleep", lambda seconds: None)
    assert call("run") == 3
    assert not any(fault.times for fault in loopback_hub.faults)
    assert capfd.readouterr().err.count("a line\n") == 1


def test_a_start_without_an_answer_may_have_started_a_job(
    jobs: hub_jobs.JobsHub,
    loopback_hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    set_command(monkeypatch, tmp_path, SLEEP)
    loopback_hub.faults = [Fault("POST /api/jobs/ada", "lose_answer")]
    assert call("run") == 1
    assert "a job may have been started; `python hf_app.py status` shows it" in capfd.readouterr().err


def test_a_bucket_is_an_object_store(jobs: hub_jobs.JobsHub, tmp_path: Path) -> None:
    jobs.buckets["ada/runs"] = {}
    bucket: Any = objects.open_objects("hf://buckets/ada/runs/some/prefix")
    assert list(bucket.list("")) == []
    assert bucket.put_if_absent("a/b", b"mine")
    assert not bucket.put_if_absent("a/b", b"yours")
    bucket.put("a/c", b"")
    with (tmp_path / "large").open("w+b") as file:
        file.write(b"x" * 100_000)
        file.seek(0)
        bucket.put("large", file)
    assert list(bucket.list("a/")) == ["a/b", "a/c"]
    assert (bucket.get("a/b"), bucket.get("a/c"), bucket.get("none")) == (b"mine", b"", None)
    assert len(bucket.get("large")) == 100_000
    bucket.delete(["a/b", "none"])
    assert list(bucket.list("")) == ["a/c", "large"]
    assert set(jobs.buckets["ada/runs"]) == {"some/prefix/a/c", "some/prefix/large"}


def test_parts_can_be_written_to_a_bucket(jobs: hub_jobs.JobsHub) -> None:
    jobs.buckets["ada/texts"] = {}
    folder = storage.open_folder("hf://buckets/ada/texts/tags/")
    assert (folder.list(), folder.exists("a"), folder.read("a"), folder.digest("a")) == ({}, False, None, None)
    storage.write(folder, "a/b.jsonl", b"hello")
    assert folder.list() == {"a/b.jsonl": 5}
    assert folder.read("a/b.jsonl") == b"hello"
    assert folder.digest("a/b.jsonl") == hashlib.sha256(b"hello").hexdigest()
    folder.delete("a/b.jsonl")
    folder.delete("none")
    assert folder.list() == {}
    with pytest.raises(JobError, match=r"^hf://buckets/ada/none cannot be listed \([^\n]+$"):
        storage.open_folder("hf://buckets/ada/none").list()


def test_a_bucket_that_is_absent_is_refused(jobs: hub_jobs.JobsHub) -> None:
    with pytest.raises(objects.StoreError, match=r"^[^\n]+$"):
        objects.open_objects("hf://buckets/ada/none").list("")


def test_a_public_bucket_is_refused(jobs: hub_jobs.JobsHub, capfd: pytest.CaptureFixture[str]) -> None:
    jobs.buckets["ada/tagger-runs"], jobs.private["ada/tagger-runs"] = {}, False
    assert call("run") == 2
    assert "ada/tagger-runs is public" in capfd.readouterr().err
    assert not jobs.jobs


def run_worker(monkeypatch: pytest.MonkeyPatch, code: int) -> dict[str, Any]:
    """Run the worker here, with a command that ends with this code; return its outcome with what Jobs gets."""
    monkeypatch.setattr("job.cli.main", lambda arguments: code)
    monkeypatch.setenv("JOB_ID", "1")
    monkeypatch.setenv("TAGGER_RUN_STORE", STORE)
    ended = hfjobs_worker.run_command(["run"])
    content = objects.open_objects(STORE).get("outcomes/1.json")
    return {"ended": ended, **json.loads(content or b"")}


@pytest.mark.parametrize(("code", "ended"), [(0, 0), (1, 1), (2, 0), (3, 0), (4, 0), (75, 75)])
def test_jobs_repeats_only_what_another_attempt_may_change(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, code: int, ended: int
) -> None:
    jobs.buckets["ada/tagger-runs"] = {}
    assert run_worker(monkeypatch, code).items() >= {"exit_code": code, "ended": ended, "attempt": 1}.items()


@pytest.mark.parametrize(("stored", "code"), [("{}", 4), ('{"older": 1}', 1), (None, 1)])
def test_a_run_that_is_not_stored_is_repeated(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stored: str | None, code: int
) -> None:
    jobs.buckets["ada/tagger-runs"] = {}
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "manifest.json").write_text("{}")
    if stored is not None:
        store_manifest(STORE, "x", stored.encode())
    outcome = run_worker(monkeypatch, 4)
    assert outcome["exit_code"] == code
    assert outcome["ended"] == (0 if code == 4 else 1), "only a failure is repeated"


def test_settings_that_are_refused_there_have_an_outcome(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.buckets["ada/tagger-runs"] = {}
    monkeypatch.setenv("TAGGER_TRAIN_OF_ANOTHER_VERSION", "1")
    assert run_worker(monkeypatch, 2).items() >= {"exit_code": 2, "ended": 0}.items()


def test_an_outcome_that_cannot_be_stored_is_not_a_success(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bucket = jobs.buckets["ada/tagger-runs"] = {}
    for code, expected in ((0, 1), (3, 3)):

        def lose_the_bucket(arguments: object, code: int = code) -> int:
            del jobs.buckets["ada/tagger-runs"]
            return code

        jobs.buckets["ada/tagger-runs"] = bucket
        monkeypatch.setenv("JOB_ID", "1")
        monkeypatch.setenv("TAGGER_RUN_STORE", "hf://buckets/ada/tagger-runs")
        monkeypatch.setattr("job.cli.main", lose_the_bucket)
        assert hfjobs_worker.run_command(["run"]) == expected
        assert "the outcome of this job could not be stored" in capfd.readouterr().err


def test_nothing_is_spent_where_no_outcome_can_be_stored(
    jobs: hub_jobs.JobsHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("job.cli.main", lambda arguments: pytest.fail("the command was run"))
    monkeypatch.setenv("JOB_ID", "1")
    monkeypatch.setenv("TAGGER_RUN_STORE", "hf://buckets/ada/none")
    assert hfjobs_worker.run_command(["run"]) == 1
    assert "the outcome of this job cannot be stored" in capfd.readouterr().err


def test_without_a_place_for_an_outcome_the_exit_code_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.cli.main", lambda arguments: 3)
    assert hfjobs_worker.run_command(["run"]) == 3
