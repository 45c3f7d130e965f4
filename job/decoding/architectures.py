"""Architectures that cannot be decoded like a transformer with a cache of keys and values."""

from __future__ import annotations

from job.errors import InvalidInputError

WITHOUT_CACHE = frozenset({"falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm"})
"""Their state cannot be divided among the branches of a search: it is no cache of keys and values."""
READ_PADDING = frozenset(
    {
        *("rwkv", "xlstm"),  # they take no attention mask
        # their positions are counted from the start of the row, padding included
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    }
)
"""Padding on the left changes their answers, so a batch has prompts of one length only."""


def check_marginal(architecture: str) -> None:
    """Raise InvalidInputError if marginal decoding is not possible with an architecture."""
    if architecture in WITHOUT_CACHE | READ_PADDING:
        raise InvalidInputError(
            f"TAGGER_SAMPLE_DECODING=marginal: the architecture {architecture} has no cache that a search can use; "
            "set it to greedy"
        )
