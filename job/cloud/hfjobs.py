"""Hugging Face Jobs: hardware with its price, the bucket with the runs, jobs, schedules, webhooks, outcomes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from job.config import environment
from job.errors import CRASHED, EXIT_CODES, INTERRUPTED, InvalidInputError, JobError, print_error
from job.hub import client as hub
from job.runs.objects import Objects, StoreError, open_objects
from job.runs.stored_run import StoredRun
from job.settings import Settings
from job.system.paths import DATA_SUFFIXES, WEIGHT_SUFFIXES, is_local, is_on_hub
from job.system.printable import printable_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi, JobInfo
    from huggingface_hub._jobs_api import JobHardwareInfo

ENDED = ("COMPLETED", "CANCELED", "ERROR", "DELETED")
"""Stages of a job that has ended."""
LABELS = {"app": "tagger-job"}
WORKER = ["python", "-m", "job.cloud.hfjobs_worker"]
POLL_SECONDS = 2.0
MOST_POLL_SECONDS = 60.0
LOST_SECONDS = 600.0
"""How long a job is asked for while the Hub does not answer."""
REQUEST_SECONDS = 60
"""After which a request is given up: the Hub's client would wait for any time."""


class Jobs:
    """Hugging Face Jobs for one namespace: hardware with its price, the bucket with the runs, jobs."""

    def __init__(self, settings: Settings) -> None:
        """Log in, and find out who pays; raises InvalidInputError without a token that works."""
        from huggingface_hub import HfApi, get_session

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
        get_session().timeout = REQUEST_SECONDS
        self.running: list[JobInfo] = []
        """Jobs that were started here and have not ended yet, as far as is known."""
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

    def start(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        *,
        secrets: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> JobInfo:
        """Start a job, which `running` has from then on; raises JobError if it is unknown whether it was started."""
        spec = self._spec(arguments, env) | {"labels": LABELS | dict(labels or {})}
        try:
            with jobs_errors(f"a job of {self.namespace}"):
                job = self.api.run_job(**spec, secrets=self._secrets | dict(secrets or {}))
        except InvalidInputError as error:
            if (cause := error.__cause__) is None or not _was_sent(cause):
                raise
            raise JobError(
                f"the answer to a start was lost ({hub.error_message(cause)}), so a job may have been started; "
                "`python hf_app.py status` shows it, `hf jobs cancel ID` ends it"
            ) from None
        self.running.append(job)
        print(f"job {job.id}: {job.url}", file=sys.stderr)
        return job

    def schedule(self, arguments: Sequence[str], env: Mapping[str, str], schedule: str) -> str:
        """Make a scheduled job, which never runs twice at the same time; return its id."""
        with jobs_errors(f"a scheduled job of {self.namespace}"):
            job = self.api.create_scheduled_job(
                **self._spec(arguments, env), secrets=self._secrets, schedule=schedule, concurrency=False
            )
        return job.id

    def find_webhook(self, dataset: str, labels: Mapping[str, str]) -> str | None:
        """Return the id of the webhook that starts a job with these labels when a data set changes; None if none."""
        with jobs_errors("the list of webhooks"):
            for webhook in self.api.list_webhooks():
                found = (webhook.job and webhook.job.labels) or {}
                watched = [(item.type, item.name) for item in webhook.watched]
                is_ours = found.items() >= (LABELS | dict(labels)).items() and watched == [("dataset", dataset)]
                if is_ours and not webhook.disabled:
                    return webhook.id
        return None

    def make_webhook(self, job: JobInfo, dataset: str) -> str:
        """Start a job again whenever a data set changes; return the id of the webhook."""
        watched: list[Any] = [{"type": "dataset", "name": dataset}]
        with jobs_errors("a webhook", then=""):
            webhook = self.api.create_webhook(
                job_id=job.id, watched=watched, domains=["repo"], secrets=dict(self._secrets)
            )
        return webhook.id

    @property
    def _secrets(self) -> dict[str, Any]:
        return {"HF_TOKEN": self._token} | ({} if self._notify is None else {environment.NOTIFY: self._notify})

    def _spec(self, arguments: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
        return {
            "image": self._settings.image,
            "command": [*WORKER, *arguments],
            "env": {**env, environment.RUN_STORE: self.store},
            "flavor": self._settings.flavor,
            "timeout": round(self._settings.timeout_hours * 3600),
            "attempts": self._settings.attempts,
            "labels": LABELS,
            "namespace": self.namespace,
        }

    def follow(self, job: JobInfo) -> JobInfo:
        """Print the log of a job until it has ended; return it then. Losses of the connection are waited out.

        Raises JobError if the job cannot be asked for during LOST_SECONDS.
        """
        printed, pause, warned = 0, POLL_SECONDS, False
        while True:
            try:
                for number, line in enumerate(self._log_lines(job)):
                    if number >= printed:  # after a loss, the log is sent from its beginning
                        print(printable_line(line), file=sys.stderr)
                        printed, pause, warned = number + 1, POLL_SECONDS, False
            except _LogError as error:
                if not warned:
                    print(f"job {job.id}: its log is interrupted ({error}); trying again", file=sys.stderr)
                warned = True
            found = self._inspect(job)
            if stage(found) in ENDED:
                self.running.remove(job)
                return found
            time.sleep(pause)
            pause = min(MOST_POLL_SECONDS, 2 * pause)

    def _log_lines(self, job: JobInfo) -> Iterator[str]:
        import httpx2

        try:
            yield from self.api.fetch_job_logs(job_id=job.id, namespace=self.namespace, follow=True)
        except (httpx2.HTTPError, OSError) as error:  # HfHubHTTPError is an HTTPError, too
            raise _LogError(hub.error_message(error)) from error

    def _inspect(self, job: JobInfo) -> JobInfo:
        with jobs_errors(f"the job {job.id} cannot be followed any longer", then=""):
            return hub.retry(
                lambda: self.api.inspect_job(job_id=job.id, namespace=self.namespace), LOST_SECONDS, f"job {job.id}"
            )


class _LogError(Exception):
    """The log of a job cannot be read, for now or for good."""


@contextmanager
def running_jobs_named(jobs: Jobs) -> Iterator[None]:
    """End a failure or Ctrl-C with the jobs that still run: nothing was undone, so its code is never 2.

    It is 75 if the same command may work later, and 1 otherwise.
    """
    try:
        yield
    except BaseException as end:
        if not jobs.running:
            raise
        is_expected = isinstance(end, (JobError, StoreError))
        if is_expected:
            print_error(str(end))
        is_interrupted = isinstance(end, KeyboardInterrupt)
        print(("interrupted here; " if is_interrupted else "") + _describe_running(jobs), file=sys.stderr)
        if not (is_expected or is_interrupted):
            raise
        is_transient = end.__cause__ is not None and hub.retry_delay(end.__cause__) is not None
        raise SystemExit(INTERRUPTED if is_interrupted or is_transient else CRASHED) from None


def _describe_running(jobs: Jobs) -> str:
    names = ", ".join(f"{jobs.namespace}/{job.id}" for job in jobs.running)
    still = f"the job {names} still runs and costs" if len(jobs.running) == 1 else f"jobs {names} still run and cost"
    return (
        f"{still} money: `python hf_app.py status` shows all, `hf jobs logs -f ID` follows one, `hf jobs cancel ID` "
        "ends it"
    )


def _was_sent(error: BaseException) -> bool:
    """Return whether a request that failed without an answer may have been served."""
    import httpx2

    return isinstance(error, httpx2.TransportError) and not isinstance(
        error, (httpx2.ConnectError, httpx2.ConnectTimeout)
    )


@contextmanager
def jobs_errors(what: str, then: str = ", then run the same command again") -> Iterator[None]:
    """Turn an answer of the Hub that a user can act on into an InvalidInputError.

    `then` is what to do once the Hub answers again, if it was not reached.
    """
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
        remedy = remedies.get(status, f"check the network and status.huggingface.co{then}")
        raise InvalidInputError(f"{what}: the Hub answered {hub.error_message(error)}; {remedy}") from error


def describe_price(hardware: JobHardwareInfo, hours: float, attempts: int, jobs: int = 1) -> str:
    """Return the line that says what a job costs at most."""
    several = f" by {attempts} attempts" if attempts > 1 else ""
    several += f" of {jobs} jobs" if jobs > 1 else ""
    hourly = price_per_hour(hardware)
    if hourly is None:
        each = f"${hardware.unit_cost_usd:.2f} per {printable_line(hardware.unit_label)}"
        return f"price: {hardware.name} costs {each}, for at most {hours:g} h{several}"
    most = hourly * hours * attempts * jobs
    return f"price: {hardware.name} costs ${hourly:.2f} an hour, at most ${most:.2f} for {hours:g} h{several}"


def describe_cost(hourly: float | None, seconds: int) -> str:
    """Return what some seconds cost, to follow them in a sentence; empty if the price of an hour is unknown."""
    return "" if hourly is None else f"${hourly * seconds / 3600:.2f}"


def price_per_hour(hardware: JobHardwareInfo) -> float | None:
    """Return the price of an hour in US dollars; None if its unit is none that is known here."""
    seconds = {"second": 1, "minute": 60, "hour": 3600}.get(hardware.unit_label)
    return None if seconds is None else hardware.unit_cost_usd * 3600 / seconds


def pinned_revisions(jobs: Jobs, settings: Settings) -> dict[str, str]:
    """Return the variables that keep base model and data set at their commits of now.

    None for a run that the bucket has: its container takes those with which the run was begun.
    """
    if settings.run.id is not None and StoredRun(jobs.open_store(), settings.run.id).seals():
        return {}
    found = {}
    with jobs_errors("base model or data set"):
        base, dataset = settings.base, settings.data
        if base.revision is None and not is_local(base.model, WEIGHT_SUFFIXES):
            found["TAGGER_BASE_REVISION"] = jobs.api.model_info(base.model).sha
        if dataset.revision is None and is_on_hub(dataset.dataset, DATA_SUFFIXES):
            found["TAGGER_DATA_REVISION"] = jobs.api.dataset_info(dataset.dataset).sha
    return {name: commit for name, commit in found.items() if commit}


def stage(job: JobInfo) -> str:
    """Return the stage of a job, such as RUNNING."""
    return str(getattr(job.status.stage, "value", job.status.stage))


def outcome_name(job: str) -> str:
    """Return the name of the object in which job/cloud/hfjobs_worker.py leaves the outcome of a job, in the store."""
    return f"outcomes/{job}.json"


def read_outcome(objects: Objects, job: JobInfo) -> dict[str, Any]:
    """Return exit code, message and description of a job that has ended.

    A job whose last attempt left no exit code was killed: by its time-out, by the platform, or because it was canceled.
    """
    if stage(job) in ("CANCELED", "DELETED"):
        return {"exit_code": INTERRUPTED, "message": "it was canceled; the same command resumes its run"}
    try:
        content = objects.get(outcome_name(job.id))
    except StoreError as error:
        message = f"it ended ({stage(job)}), and its outcome cannot be read: {error}; its log says how: {job.url}"
        return {"exit_code": CRASHED, "message": message}
    outcome: dict[str, Any] = {} if content is None else json.loads(content)
    if "exit_code" in outcome:
        meaning = EXIT_CODES[outcome["exit_code"]].meaning
        return outcome | {"message": f"{meaning}; its log says why, and what to do"}
    if stage(job) == "COMPLETED":
        message = f"it completed, but its outcome is not in the bucket; its log says how it ended: {job.url}"
        return {"exit_code": CRASHED, "message": message}
    attempt = f"its attempt {outcome['attempt']}" if "attempt" in outcome else "it"
    why = f" ({job.status.message})" if job.status.message else ""
    message = f"{attempt} was stopped without an outcome{why}; the same command resumes what is in the bucket"
    return {"exit_code": INTERRUPTED, "message": message}
