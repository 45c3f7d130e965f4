"""One run in one experiment tracker, through the tracker classes of Accelerate, without its Accelerator."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from job.errors import DONE, INTERRUPTED

PROJECT = "tagger-job"
"""The project or experiment, unless WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT names another."""
DEFAULTS = {
    # a server that hangs is asked again later, and not for half an hour at once
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_SILENT": "true",
}
"""Variables of the trackers, where they are not set."""
NOISY_LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool", "wandb", "trackio")
"""The job itself says, once, that a tracker fails."""


@dataclass(frozen=True)
class Target:
    """What the trackers are told of a run when it is opened there."""

    id: str
    """The same in all attempts of the run."""
    name: str
    folder: Path
    """For files that stay on this machine."""
    runs: Path
    settings: Mapping[str, bool | int | float | str]
    sent_through: int
    """The last step that an earlier attempt has sent."""


class Sink:
    """A run that is open in a tracker. All methods are called in one thread, and may raise whatever they like."""

    tells_steps = False
    """Whether `known_steps` returns all steps that are there, so that others are sent whatever is recorded here."""

    def __init__(self, tracker: Any) -> None:
        # with the default, it would start torch.distributed where a launcher has set the variables for it
        tracker.main_process_only = False
        self.tracker = tracker
        tracker.start()

    def settings(self, values: Mapping[str, bool | int | float | str]) -> None:
        """Store the settings of the run."""
        self.tracker.store_init_configuration(dict(values))

    def known_steps(self) -> set[int]:
        """Return the steps that are there already, if the tracker can tell."""
        return set()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add the figures of an optimizer step."""
        self.tracker.log(dict(values), step=step)

    def attempt(self, values: Mapping[str, float], number: int) -> None:
        """Add the figures of an attempt, the first of which has the number 1."""
        self.tracker.log(dict(values), step=number)

    def summary(self, numbers: Mapping[str, float], texts: Mapping[str, str], step: int) -> None:
        """Add what the run has led to, after its last step."""
        self.tracker.log({**numbers, **texts}, step=step)

    def artifact(self, file: Path) -> None:
        """Add a file, where the tracker has such."""

    def end(self, status: str, code: int) -> None:
        """Close the run as it ended here."""
        self.tracker.finish()


class TensorBoardSink(Sink):
    """Event files in the run's folder."""

    def __init__(self, target: Target) -> None:
        from accelerate.tracking import TensorBoardTracker

        # what an attempt that was killed had written of later steps is hidden
        purge = {"purge_step": target.sent_through + 1} if target.sent_through else {}
        super().__init__(TensorBoardTracker("tensorboard", logging_dir=str(target.folder), **purge))

    def end(self, status: str, code: int) -> None:
        self.tracker.log({"status": status})
        super().end(status, code)


class MLflowSink(Sink):
    """A run of an MLflow server, of a database, or of the file mlflow.db next to the runs."""

    tells_steps = True

    def __init__(self, target: Target) -> None:
        import mlflow
        from accelerate.tracking import MLflowTracker

        local = None
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{target.runs.absolute()}/mlflow.db")
            local = f"file://{target.runs.absolute()}/mlflow-artifacts"
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = mlflow.search_runs(
            experiment_names=[experiment], filter_string=f"tags.tagger_run = '{target.id}'", output_format="list"
        )
        super().__init__(
            MLflowTracker(
                experiment,
                logging_dir=local,
                run_id=found[0].info.run_id if found else None,
                run_name=target.name,
                tags={"tagger_run": target.id},
            )
        )

    def known_steps(self) -> set[int]:
        import mlflow

        history = mlflow.MlflowClient().get_metric_history(self.tracker.tracker.info.run_id, "train/loss")
        return {entry.step for entry in history}

    def summary(self, numbers: Mapping[str, float], texts: Mapping[str, str], step: int) -> None:
        import mlflow

        self.tracker.log(dict(numbers), step=step)
        mlflow.set_tags(dict(texts))

    def artifact(self, file: Path) -> None:
        self.tracker.log_artifact(str(file))

    def end(self, status: str, code: int) -> None:
        import mlflow

        mlflow.set_tag("status", status)
        mlflow.end_run({DONE: "FINISHED", INTERRUPTED: "KILLED"}.get(code, "FAILED"))


class WandbSink(Sink):
    """A run of Weights & Biases; with WANDB_MODE=offline, files for `wandb sync`."""

    def __init__(self, target: Target) -> None:
        import wandb
        from accelerate.tracking import WandBTracker

        options = {"dir": str(target.folder)} if "WANDB_DIR" not in os.environ else {}
        super().__init__(
            WandBTracker(
                os.environ.get("WANDB_PROJECT", PROJECT),
                id=target.id,
                name=target.name,
                resume="allow",
                # the job's own lines stay its own; its commit is in the manifest
                settings=wandb.Settings(console="off", silent=True, init_timeout=20, disable_git=True, save_code=False),
                **options,
            )
        )

        # a process of its own sends what is logged, and is killed with the job
        self.tells_steps = kept_at("wandb") == "server"

    def known_steps(self) -> set[int]:
        return set(range(self.tracker.tracker.step))  # where it resumes; it drops lower ones

    def attempt(self, values: Mapping[str, float], number: int) -> None:
        self.tracker.tracker.summary.update(dict(values))  # its steps only go up

    def summary(self, numbers: Mapping[str, float], texts: Mapping[str, str], step: int) -> None:
        self.tracker.tracker.summary.update({**numbers, **texts})

    def artifact(self, file: Path) -> None:
        import wandb

        run = self.tracker.tracker
        artifact = wandb.Artifact(f"report-{run.id}", type="report")
        artifact.add_file(str(file))
        run.log_artifact(artifact)

    def end(self, status: str, code: int) -> None:
        run = self.tracker.tracker
        run.summary.update({"status": status})
        if code == INTERRUPTED:
            run.mark_preempting()
        run.finish(exit_code=code)


class TrackioSink(Sink):
    """A run of Trackio: on this machine, or in the Space of TRACKIO_SPACE_ID."""

    def __init__(self, target: Target) -> None:
        from accelerate.tracking import TrackioTracker

        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "trackio":  # it prints on standard output, among the job's results
                vars(module)["print"] = lambda *_, **__: None
        super().__init__(
            TrackioTracker(
                os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=target.id,
                resume="allow",
                config=dict(target.settings),
                private=True,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        )

    def settings(self, values: Mapping[str, bool | int | float | str]) -> None:
        """Do nothing: it has them since it was opened."""

    def artifact(self, file: Path) -> None:
        run = self.tracker.tracker
        run.log_artifact(str(file), name=f"report-{run.name}", type="report")

    def end(self, status: str, code: int) -> None:
        self.tracker.log({"status": status, "exit_code": code})
        super().end(status, code)


SINKS: dict[str, type[Any]] = {
    "wandb": WandbSink,
    "mlflow": MLflowSink,
    "tensorboard": TensorBoardSink,
    "trackio": TrackioSink,
}


class _Logger(logging.LoggerAdapter[logging.Logger]):
    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        self.warning(*args, **kwargs)


def load(name: str) -> None:
    """Import a tracker in the main thread: imports in two threads at the same time may fail."""
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)
    from accelerate import tracking

    # Accelerate's own logger works only after its state, and thereby torch.distributed, has been set up
    tracking.logger = _Logger(logging.getLogger("accelerate.tracking"))
    importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    for logger in NOISY_LOGGERS:  # MLflow sets its own levels when it is imported
        logging.getLogger(logger).setLevel(logging.CRITICAL)


def kept_at(name: str) -> Literal["server", "machine"]:
    """Return whether what a tracker has been sent is on a server, or on this machine's disk."""
    if name == "wandb":
        on_server = os.environ.get("WANDB_MODE") not in ("offline", "dryrun")
    elif name == "mlflow":
        on_server = not os.environ.get("MLFLOW_TRACKING_URI", "/").startswith(("file:", "sqlite:", ".", "/"))
    else:
        on_server = name == "trackio" and not {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"}.isdisjoint(os.environ)
    return "server" if on_server else "machine"
