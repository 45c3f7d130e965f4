"""The import order of job/, and the contents of an installed package."""

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JOB = ROOT / "job"
CHAPTERS = (
    "notify",
    *("reproduce", "preflight", "estimate", "gate", "promote", "push", "merge", "report", "compare", "results"),
    *("model_card", "evaluate", "tag", "tag_workers", "inference", "sample", "train", "lora", "freeze", "quantize"),
    "data",
)
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cloud.hfjobs_worker",),
    ("cli", "cloud.modal_launcher", "cloud.modal_worker", "cloud.hfjobs_launcher"),
    ("cloud.hfjobs", "cloud.container", "cloud.outcome"),
    ("tune",),
    ("worker", "measure", "trial"),
    ("pipeline",),
    *((chapter,) for chapter in CHAPTERS),
    ("training", "distributed", "decoding", "metrics", "tagging"),
    ("dataset",),
    ("hub",),
    ("runs",),
    ("config", "system"),
    ("settings",),
    ("types",),
    ("errors",),
    # tables and functions that the settings need to validate, and what errors need to be printed
    ("config.validators", "config.redaction", "cloud.gpus", "system.printable"),
)
"""From top to bottom. A module imports only from layers below its own, or from its own package."""


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the name of each module, without `job.`, and its file."""
    for path in sorted(JOB.rglob("*.py")):
        name = ".".join(path.relative_to(JOB).with_suffix("").parts)
        yield name.removesuffix("__init__").removesuffix("."), path


MODULES = dict(modules())


def layer(module: str) -> tuple[int, str]:
    """Return the layer of a module, 0 for the top one, and the entry of LAYERS that it belongs to."""
    matches = [
        (number, entry)
        for number, entries in enumerate(LAYERS)
        for entry in entries
        if module == entry or module.startswith(f"{entry}.")
    ]
    assert matches, f"job/{module.replace('.', '/')}.py is in no layer of tests/test_layout.py"
    return max(matches, key=lambda match: len(match[1]))


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of job that a file imports, also inside functions and only for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} has a relative import"
            if node.module.split(".")[0] != "job":
                continue
            for alias in node.names:
                module = f"{node.module}.{alias.name}".removeprefix("job").removeprefix(".")
                yield module if module in MODULES else node.module.removeprefix("job").removeprefix(".")
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("job.") for alias in node.names if alias.name.startswith("job."))


def test_there_is_something_to_check() -> None:
    """The other tests would pass if no module or import was found."""
    assert {"cli", "pipeline", "training.trainer", "hub.client"} <= MODULES.keys()
    assert {"errors", "preflight", "pipeline", "config.environment", "settings"} <= set(imports(MODULES["cli"]))


@pytest.mark.parametrize("module", [name for name in MODULES if not MODULES[name].name.startswith("__init__")])
def test_imports_point_to_lower_layers_only(module: str) -> None:
    own, package = layer(module)
    for imported in imports(MODULES[module]):
        if imported == "":  # job/__init__.py has only the version
            continue
        other, its_package = layer(imported)
        assert other > own or (package == its_package and "." in module), f"job.{module} imports job.{imported}"


def test_there_are_no_import_cycles() -> None:
    graph = {name: {i for i in imports(path) if i} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " > ".join((*above, name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_packages_import_nothing() -> None:
    for path in JOB.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert not [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))], path


def test_the_job_starts_without_a_compiler() -> None:
    """PEFT imports bitsandbytes, which would import TorchInductor: a quarter of the time in which the job starts."""
    code = """
import sys
from job.system import import_hooks
import_hooks.install()
import job.sample, torch
assert "bitsandbytes.nn" in sys.modules and "peft" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
assert torch.compile.__module__ == "torch"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a git checkout")
def test_git_ignores_no_file_of_the_package() -> None:
    files = [str(path) for path in JOB.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(command, input="\n".join(files), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ignored.returncode, ignored.stdout) == (1, ""), ignored.stderr


def test_a_wheel_has_every_module_and_data_file(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(JOB, source / "job", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), str(source)],
        check=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    files = {path.relative_to(JOB) for path in JOB.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    missing = {str(path) for path in files if not (target / "job" / path).is_file()}
    assert not missing
    code = "import job, job.cli; print(job.__file__); job.cli.main(['settings', '--recipes'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=target, capture_output=True, text=True, check=True, env={"PYTHONPATH": ""}
    )
    assert done.stdout.startswith(str(target)), "the import used another copy"
    assert "\nbest " in done.stdout, "a recipe of the package"
