"""Hugging Face Jobs: hardware with its price, the bucket with the runs, jobs, schedules, webhooks, outcomes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from job.config import environment
from job.errors import CRASHED, EXIT_CODES, INTERRUPTED, InvalidInputError
from job.hub import client as hub
from job.runs.objects import Objects, open_objects
from job.settings import Settings
from job.system.paths import DATA_SUFFIXES, WEIGHT_SUFFIXES, is_local, is_on_hub
from job.system.printable import printable_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi, JobInfo
    from huggingface_hub._jobs_api import JobHardwareInfo

LABELS = {"app": "tagger-job"}
WORKER = ["python", "-m", "job.cloud.hfjobs_worker"]
OUTCOMES = "outcomes"
"""Where job/cloud/hfjobs_worker.py leaves the outcome of each job, below the store."""
POLL_SECONDS = 2.0


class Jobs:
    """Hugging Face Jobs for one namespace: hardware with its price, the bucket with the runs, jobs."""

    def __init__(self, settings: Settings) -> None:
        """Log in, and find out who pays; raises InvalidInputError without a token that works."""
        from huggingface_hub import HfApi

        token = hub.token()
        if token is None:
            raise InvalidInputError(
                "Hugging Face Jobs needs a token; set HF_TOKEN to one with write access and the permission to run jobs"
            )
        self._token = token
        self._settings = settings.hfjobs
        notify = settings.run.notify
        self._notify = None if notify is None else notify.get_secret_value()
        self.api: HfApi = HfApi(token=token, library_name="tagger-job")
        with jobs_errors("HF_TOKEN"):
            self.namespace: str = settings.hfjobs.namespace or self.api.whoami()["name"]
        self.bucket = f"{self.namespace}/{settings.hfjobs.bucket}"
        self.store = f"hf://buckets/{self.bucket}/runs"

    def open_store(self) -> Objects:
        """Return the objects of the bucket with the runs."""
        return open_objects(self.store)

    def hardware(self) -> JobHardwareInfo:
        """Return the configured flavor with its price; raises InvalidInputError if there is no such flavor."""
        with jobs_errors("the list of hardware"):
            known = {hardware.name: hardware for hardware in self.api.list_jobs_hardware()}
        if self._settings.flavor not in known:
            raise InvalidInputError(
                f"TAGGER_HFJOBS_FLAVOR={self._settings.flavor} is not offered; expected one of "
                f"{', '.join(sorted(known))}"
            )
        return known[self._settings.flavor]

    def make_bucket(self) -> None:
        """Create the bucket, private, unless it exists; raises InvalidInputError if it is public."""
        from huggingface_hub.errors import BucketNotFoundError

        with jobs_errors(f"the bucket {self.bucket}"):
            try:
                is_private = self.api.bucket_info(self.bucket).private
            except BucketNotFoundError:
                self.api.create_bucket(self.bucket, private=True)
                return
        if not is_private:
            raise InvalidInputError(
                f"the bucket {self.bucket} is public, and runs hold texts of the data set; make it private, or set "
                "TAGGER_HFJOBS_BUCKET to another name"
            )

    def start(self, arguments: Sequence[str], env: Mapping[str, str]) -> JobInfo:
        """Start a job."""
        with jobs_errors(f"a job of {self.namespace}"):
            job = self.api.run_job(**self._spec(arguments, env), secrets=self._secrets)
        print(f"job {job.id}: {job.url}", file=sys.stderr)
        return job

    def schedule(self, arguments: Sequence[str], env: Mapping[str, str], schedule: str) -> str:
        """Make a scheduled job, which never runs twice at the same time; return its id."""
        with jobs_errors(f"a scheduled job of {self.namespace}"):
            job = self.api.create_scheduled_job(
                **self._spec(arguments, env), secrets=self._secrets, schedule=schedule, concurrency=False
            )
        return job.id

    def watch(self, job: JobInfo, dataset: str) -> str:
        """Start a job again whenever a data set changes; return a sentence. A webhook that is there is kept."""
        watched: list[Any] = [{"type": "dataset", "name": dataset}]
        with jobs_errors("a webhook"):
            for webhook in self.api.list_webhooks():
                same = webhook.job is not None and webhook.job.command == job.command and not webhook.disabled
                if same and any((item.type, item.name) == ("dataset", dataset) for item in webhook.watched):
                    return f"the webhook {webhook.id} watches {dataset} already; delete it to change its settings"
            webhook = self.api.create_webhook(
                job_id=job.id, watched=watched, domains=["repo"], secrets=dict(self._secrets)
            )
        return f"the webhook {webhook.id} starts this job again whenever {dataset} changes"

    @property
    def _secrets(self) -> dict[str, Any]:
        return {"HF_TOKEN": self._token} | ({} if self._notify is None else {environment.NOTIFY: self._notify})

    def _spec(self, arguments: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
        return {
            "image": self._settings.image,
            "command": [*WORKER, *arguments],
            "env": {**env, "TAGGER_RUN_STORE": self.store},
            "flavor": self._settings.flavor,
            "timeout": round(self._settings.timeout_hours * 3600),
            "attempts": self._settings.attempts,
            "labels": LABELS,
            "namespace": self.namespace,
        }

    def follow(self, job: JobInfo) -> JobInfo:
        """Print the logs of a job until it has ended; return it then."""
        with jobs_errors(f"the job {job.id}"):
            for line in self.api.fetch_job_logs(job_id=job.id, namespace=self.namespace, follow=True):
                print(printable_line(line), file=sys.stderr)
            return self.api.wait_for_job(job.id, namespace=self.namespace, poll_interval=POLL_SECONDS)


@contextmanager
def jobs_errors(what: str) -> Iterator[None]:
    """Turn an answer of the Hub that a user can act on into an InvalidInputError."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        remedies = {
            401: "set HF_TOKEN to a valid token",
            402: "add credits or a payment method to the account on the Hub",
            403: "give HF_TOKEN write access and the permission to run jobs, or set TAGGER_HFJOBS_NAMESPACE",
            404: "check TAGGER_HFJOBS_NAMESPACE and TAGGER_HFJOBS_IMAGE",
        }
        remedy = remedies.get(status, "check the network and status.huggingface.co, then run the same command again")
        raise InvalidInputError(f"{what}: the Hub answered {hub.error_message(error)}; {remedy}") from error


def describe_price(hardware: JobHardwareInfo, hours: float, attempts: int, jobs: int = 1) -> str:
    """Return the line that says what a job costs at most."""
    hourly = price_per_hour(hardware)
    most = hourly * hours * attempts * jobs
    several = f" by {attempts} attempts" if attempts > 1 else ""
    several += f" of {jobs} jobs" if jobs > 1 else ""
    return f"price: {hardware.name} costs ${hourly:.2f} an hour, at most ${most:.2f} for {hours:g} h{several}"


def price_per_hour(hardware: JobHardwareInfo) -> float:
    """Return the price of an hour in US dollars."""
    units = {"second": 3600, "minute": 60, "hour": 1}
    return hardware.unit_cost_usd * units[hardware.unit_label]


def pinned_revisions(api: HfApi, settings: Settings) -> dict[str, str]:
    """Return the variables that keep base model and data set at their commits of now."""
    found = {}
    with jobs_errors("base model or data set"):
        base, dataset = settings.base, settings.data
        if base.revision is None and not is_local(base.model, WEIGHT_SUFFIXES):
            found["TAGGER_BASE_REVISION"] = api.model_info(base.model).sha
        if dataset.revision is None and is_on_hub(dataset.dataset, DATA_SUFFIXES):
            found["TAGGER_DATA_REVISION"] = api.dataset_info(dataset.dataset).sha
    return {name: commit for name, commit in found.items() if commit}


def stage(job: JobInfo) -> str:
    """Return the stage of a job, such as RUNNING."""
    return str(getattr(job.status.stage, "value", job.status.stage))


def read_outcome(objects: Objects, job: JobInfo) -> dict[str, Any]:
    """Return exit code, message and description of a job that has ended.

    A job that left no outcome was killed: by its time-out, by the platform, or because it was canceled.
    """
    content = None if stage(job) == "CANCELED" else objects.get(f"{OUTCOMES}/{job.id}.json")
    outcome: dict[str, Any] = {} if content is None else json.loads(content)
    if stage(job) in ("CANCELED", "DELETED"):
        return outcome | {"exit_code": INTERRUPTED, "message": "it was canceled; the same command resumes its run"}
    if not outcome:
        why = f" ({job.status.message})" if job.status.message else ""
        message = f"it was stopped without an outcome{why}; the same command resumes what is in the bucket"
        return {"exit_code": INTERRUPTED if stage(job) == "ERROR" else CRASHED, "message": message}
    meaning = EXIT_CODES[outcome["exit_code"]]
    return outcome | {"message": f"{meaning.meaning}; its log says why, and what to do"}
