""".env.example and docs/settings.md are generated from the settings."""

from __future__ import annotations

from pathlib import Path

from job.config import environment, recipes, reference
from job.settings import Settings

ROOT = Path(__file__).parents[1]


def test_env_example_has_the_defaults_and_sets_nothing(tmp_path: Path) -> None:
    assert environment.explicit_values(str(ROOT / ".env.example")) == {}
    uncommented = reference.env_example().replace("#TAGGER_", "TAGGER_")
    (tmp_path / "all.env").write_text(uncommented, encoding="utf-8")
    assert {line.partition("=")[0] for line in uncommented.splitlines() if line.startswith("TAGGER_")} == set(
        Settings().values()
    )
    assert environment.load(str(tmp_path / "all.env")).with_sources({}) == Settings()
    for line in uncommented.splitlines():
        assert line.partition("=")[2][:1] not in ("'", '"'), f"docker run --env-file would keep the quote: {line}"


def test_the_markdown_describes_every_group_setting_and_recipe() -> None:
    page = reference.settings_markdown()
    for name, field in Settings.model_fields.items():
        assert f"\n## TAGGER_{name.upper()}_\n\nSettings of {str(field.annotation.__doc__)[12:]}\n" in page
    for name in Settings().values():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert row.replace("\\|", "").count("|") == 4, row
    for name in recipes.recipe_names():
        assert f"/{name}.env) | {recipes.describe_recipe(name)} |" in page
