"""A release is what its tag says: version, notes, images; and its workflow has no more rights than it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHANGELOG = """# Changelog

## 1.2.3 (2026-12-01)

### Added

- A thing.

## 1.2.2 (2026-11-30)

- An older thing.
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout that is ready to be released as 1.2.3."""
    for folder in (".ci", "job", "deploy"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / ".ci" / "release-notes", tmp_path / ".ci")
    (tmp_path / "job" / "__init__.py").write_text('"""The job."""\n\n__version__ = "1.2.3"\n')
    (tmp_path / "deploy" / "job.yaml").write_text("image: ghcr.io/owner/tagger-job:1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


def notes(checkout: Path, *tag: str) -> subprocess.CompletedProcess[str]:
    script = checkout / ".ci" / "release-notes"
    return subprocess.run([script, *tag], capture_output=True, text=True, check=False)


def test_the_notes_of_a_release_are_the_section_of_its_version(checkout: Path) -> None:
    done = notes(checkout, "v1.2.3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "### Added\n\n- A thing.\n", "")


@pytest.mark.parametrize(
    ("tag", "file", "old", "new", "sentence"),
    [
        ("v1.2.4", "job/__init__.py", "", "", "the tag is v1.2.4 and the version in job/__init__.py is 1.2.3"),
        ("1.2.3", "job/__init__.py", "", "", "the tag should be v1.2.3"),
        ("v1.2.3", "CHANGELOG.md", "1.2.3 (2026-12-01)", "Unreleased", "CHANGELOG.md has nothing under '## 1.2.3"),
        ("v1.2.3", "CHANGELOG.md", "### Added\n\n- A thing.", "", "CHANGELOG.md has nothing under '## 1.2.3"),
        ("v1.2.3", "deploy/job.yaml", "1.2.3", "1.2.2", "deploy/job.yaml names the image of version 1.2.2"),
    ],
)
def test_a_release_whose_parts_differ_is_refused(
    checkout: Path, tag: str, file: str, old: str, new: str, sentence: str
) -> None:
    (checkout / file).write_text(
        (checkout / file).read_text().replace(old, new) if old else (checkout / file).read_text()
    )
    done = notes(checkout, tag)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr and "Traceback" not in done.stderr


def workflow() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    return loaded


def test_each_job_of_the_release_has_only_the_rights_that_it_needs() -> None:
    assert workflow()["permissions"] == {}
    writes = {
        name: {right for right, access in job["permissions"].items() if access == "write"}
        for name, job in workflow()["jobs"].items()
    }
    assert writes == {
        "check": set(),
        "image": {"packages", "id-token", "attestations"},
        "pypi": {"id-token"},
        "notes": {"contents"},
    }
    assert workflow()["jobs"]["pypi"]["environment"]["name"] == "pypi"
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_every_action_of_a_workflow_is_pinned_by_commit_and_says_its_version() -> None:
    used = [
        line.strip()
        for file in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in file.read_text().splitlines()
        if re.match(r"\s*(- )?uses:", line)
    ]
    assert len(used) > 10
    for line in used:
        assert re.fullmatch(r"(- )?uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    commits: dict[str, set[str]] = {}
    for line in used:
        action, _, commit = line.partition("uses: ")[2].partition("@")
        commits.setdefault(action, set()).add(commit)
    assert {action: found for action, found in commits.items() if len(found) > 1} == {}, "one version of each action"


def test_nothing_is_published_before_tag_and_images_are_good() -> None:
    jobs = workflow()["jobs"]
    assert ".ci/release-notes" in str(jobs["check"]["steps"])
    needs = {name: job.get("needs", []) for name, job in jobs.items()}
    assert needs == {"check": [], "image": "check", "pypi": ["check", "image"], "notes": "pypi"}
    [build] = [step["with"] for step in jobs["image"]["steps"] if "build-push-action" in step.get("uses", "")]
    assert build["sbom"] and build["provenance"] == "mode=max"
    assert "REVISION=${{ github.sha }}" in build["build-args"]
    assert {entry["suffix"] for entry in jobs["image"]["strategy"]["matrix"]["include"]} == {"", "-cpu"}
