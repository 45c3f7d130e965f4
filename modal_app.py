"""The job on Modal: image, GPU, secret, volumes, retries, schedule. The work itself is done in `job`.

The container imports this file too, without the caller's environment. So the number of secrets and volumes must not
depend on settings; their names, the GPU and the times are only sent to Modal by the caller.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modal

from job.cloud import modal_launcher
from job.config import environment
from job.system import streams

HOURS = 60 * 60
ROOT = Path(__file__).parent

request = modal_launcher.parse_request(__file__) if modal.is_local() else modal_launcher.Request()

# root, as Modal expects: this file is copied into /root, and the volumes belong to root
image = (
    modal.Image.from_dockerfile(ROOT / "Dockerfile", context_dir=ROOT).dockerfile_commands("USER root").entrypoint([])
)
token = modal.Secret.from_name(request.modal.secret, required_keys=list(request.secret_keys))
runs = modal.Volume.from_name(request.modal.runs_volume, create_if_missing=True)
cache = modal.Volume.from_name(request.modal.cache_volume, create_if_missing=True)
app = modal.App("tagger-job")

# one process for each GPU of the container
gpus = max(int(gpu.partition(":")[2] or 1) for gpu in request.modal.gpu.split(","))
on_a_gpu: dict[str, Any] = {
    "image": image,
    "gpu": request.modal.gpu.split(","),
    "cpu": 2.0 * gpus,
    "memory": 4096 * gpus,  # MiB at least; Modal gives more where there is more
    "volumes": {modal_launcher.RUNS: runs, modal_launcher.CACHE: cache},
    "timeout": round(request.modal.timeout_hours * HOURS),
    "startup_timeout": HOURS // 2,
    # a preemption does not count; a retry resumes from the newest checkpoint
    "retries": modal.Retries(max_retries=3, initial_delay=10.0, backoff_coefficient=2.0),
}


@app.function(**on_a_gpu, secrets=[token], single_use_containers=True)
def perform(command: str, env: dict[str, str]) -> dict[str, Any]:
    """Run `run` or `retrain` in a container, with the caller's variables."""
    from job.cloud import modal_worker

    return modal_worker.run_command(command, env, call=_call_id(), commit=runs.commit)


@app.function(
    **on_a_gpu,
    secrets=[token, modal.Secret.from_dict({**request.env})],  # the settings of `modal deploy`
    schedule=None if request.modal.cron == "never" else modal.Cron(request.modal.cron),
    single_use_containers=True,
)
def scheduled() -> dict[str, Any]:
    """Run `retrain` in a container, with the settings of the deployment."""
    from job.cloud import modal_worker

    outcome = modal_worker.run_command("retrain", environment.explicit_values(), call=_call_id(), commit=runs.commit)
    if outcome["exit_code"]:
        raise RuntimeError(outcome["message"])  # no caller sees the exit code
    return outcome


def _call_id() -> str:
    """Return the id of the current call, which all its attempts share."""
    call_id = modal.current_function_call_id()
    assert call_id is not None, "only called in a container"
    return call_id


@app.function(**on_a_gpu, secrets=[token])
def tag_texts(texts: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Tag texts in a container, with the caller's variables."""
    from job.cloud import modal_worker

    return modal_worker.tag_texts(env, texts)


@app.function(**on_a_gpu, secrets=[token], single_use_containers=True)
def tag_parts(env: dict[str, str], shard: str) -> dict[str, Any]:
    """Tag a share of the parts of a job in a container, with the caller's variables."""
    from job.cloud import modal_worker

    return modal_worker.tag_parts(env, shard, runs=modal_launcher.RUNS, commit=runs.commit, reload=runs.reload)


@app.local_entrypoint()
def main(*arguments: str) -> None:
    """Run the command of `request`, which has the arguments already."""
    streams.protect()
    env, texts = request.env, request.texts
    with modal_launcher.exit_on_job_error():
        match request.command:
            case "main":
                modal_launcher.wait(perform.spawn("run", env), request, runs)
            case "retrain":
                modal_launcher.wait(perform.spawn("retrain", env), request, runs)
            case "status":
                modal_launcher.status(runs, env.get("TAGGER_RUN_ID"))
            case "fetch":
                print(modal_launcher.fetch(runs, env["TAGGER_RUN_ID"], request.options.to))
            case "sample":
                modal_launcher.show_answers(modal_launcher.collect(texts, [tag_texts.spawn(list(texts), env).get()]))
            case "tag":
                shares = [f"{index}/{request.options.containers}" for index in range(request.options.containers)]
                modal_launcher.wait_for_parts([tag_parts.spawn(env, share) for share in shares], request.modal.gpu)


retrain = status = fetch = sample = tag = (
    main  # the commands after `::`; `modal run` needs no name if there is only one
)
