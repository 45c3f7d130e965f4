"""The documentation names everything that exists, and nothing that does not."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_settings

from job import pipeline
from job.cloud import modal_launcher
from job.config import recipes, reference
from job.errors import EXIT_CODES
from job.settings import iter_fields

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
DOCS = "\n".join(text for page, text in TEXTS.items() if page.name != "CHANGELOG.md")


def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "job", *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def commands() -> list[str]:
    listed = help_of().partition("commands:")[2]
    return re.findall(r"^ {4}([a-z]+) ", listed, flags=re.MULTILINE)


def test_every_command_and_option_is_documented() -> None:
    found = commands()
    assert {"run", "check", "sample", "settings"} <= set(found)
    options = set(re.findall(r"--[a-z][a-z-]+", help_of()))
    for command in found:
        assert f"`tagger-job {command}" in DOCS, command
        options |= set(re.findall(r"--[a-z][a-z-]+", help_of(command)))
    for option in sorted(options):
        assert re.search(rf"{option}\b", DOCS), option


def test_every_modal_command_and_option_is_documented() -> None:
    page = TEXTS[ROOT / "docs" / "modal.md"]
    for command in modal_launcher.COMMANDS:
        assert ("modal run modal_app.py" if command == "main" else f"modal run modal_app.py::{command}") in page
    for option in (*modal_launcher.OVERRIDES, "--recipe", "--output", "--to", "--text", "--input"):
        assert re.search(rf"{option}\b", page), option


def test_generated_pages_are_up_to_date() -> None:
    hint = "run `make docs`"
    assert TEXTS[ROOT / "docs" / "settings.md"] == reference.settings_markdown(), hint
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == reference.env_example(), hint
    spec = importlib.util.spec_from_file_location("make_modules", ROOT / "docs" / "make_modules.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = TEXTS[ROOT / "docs" / "architecture.md"]
    assert page == module.with_modules(page), hint


def test_every_setting_named_in_the_docs_exists() -> None:
    known = {name for name, _, _ in iter_fields()} | {"TAGGER_RECIPE", "TAGGER_RUN_STORE"}
    prefixes = {f"TAGGER_{part}" for name in known for part in ("", *(name[7:][:i] for i in range(1, len(name))))}
    for page, text in TEXTS.items():
        if page.name == "CHANGELOG.md":  # it names former settings
            continue
        for name in re.findall(r"TAGGER_[A-Z0-9_]+", text):
            assert name in known or (name.endswith("_") and name in prefixes), f"{page.name}: {name}"


def test_every_exit_code_is_in_the_runbook() -> None:
    page = TEXTS[ROOT / "docs" / "operations.md"]
    for code in EXIT_CODES:
        assert re.search(rf"^#+ .*\b{code}\b|^\| `?{code}`? \|", page, flags=re.MULTILINE), code


def test_every_recipe_is_documented() -> None:
    for name in recipes.recipe_names():
        assert f"`{name}`" in DOCS, name


def test_every_file_of_a_run_is_documented(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = make_settings(llama, tmp_path, hub={"push": "never", "merge": True})
    run = pipeline.run(settings).folder
    page = TEXTS[ROOT / "docs" / "run-folder.md"]
    for file in (path.relative_to(run) for path in run.rglob("*") if path.is_file()):
        assert file.name in page, f"docs/run-folder.md does not describe {file}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        found.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
    return found


def links(text: str) -> Iterator[str]:
    without_code = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", without_code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(TEXTS[page]):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_that_pages_name_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w./-]+):", makefile, flags=re.MULTILINE))
    for words in re.findall(r"(?:`|^    )(?:[A-Z_]+=\S+ )*make ([a-z][^`#\n]*)", TEXTS[page], flags=re.MULTILINE):
        for word in re.sub(r'"[^"]*"', "", words).split():
            assert word in targets or "=" in word, f"{page.name}: make {words}"


def test_the_readme_stays_short() -> None:
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 150
