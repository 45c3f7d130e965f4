"""Fine-tune a small causal language model into a tagger: text in, list of tags out."""

__version__ = "0.2.0.dev0"
