"""The token of the Hugging Face Hub, from the environment, a login, or a mounted secret."""

from __future__ import annotations

from pathlib import Path

SECRET_FILE = Path("/run/secrets/hf_token")


def token() -> str | None:
    """Return the token of HF_TOKEN or of a login on this machine, or else the one in SECRET_FILE."""
    from huggingface_hub import get_token

    value = get_token()
    if value is None and SECRET_FILE.is_file():
        value = SECRET_FILE.read_text(encoding="utf-8").strip() or None
    return value
