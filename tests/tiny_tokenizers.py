"""Tiny tokenizers of the kinds that base models have, trained on the sayings."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from job.types import Example

SAYINGS = Path(__file__).parents[1] / "job" / "dataset" / "sayings.jsonl"
CHARACTERS = "àéüßñ日本語の歌👨👩👧"
MARK = "▁"
HARD_EXAMPLES = [
    Example("the sea is calm tonight", ("sea", "night", "sea salt")),
    Example("a song about rain", ("music", "rain")),
    Example("it rains, and rains again", ("rain again", "rain", "don't stop")),
    Example("what was said", ("don't", 'so "called"', "life")),
    Example("both quotes", ("both ' and \"", "a, b", "]")),
    Example("à la carte", ("été", "日本", "life")),
    Example("日本の歌", ("日本語", "日本", "music")),
    Example("a family", ("👨\u200d👩\u200d👧", "love")),
    Example("7 days", ("7", "7 days", "2026")),
    Example("a path", ("x\\y", "love-story", "lovely")),
]
"""Texts whose tags have quotes of either kind and both, commas, escapes, and characters that have no token."""
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def wrap(
    tokenizer: Tokenizer, *, bos: bool = False, eos: bool = False, bos_token: str = "<s>", **options: Any
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with special tokens; a post-processor adds those at the beginning and end of a text."""
    if bos or eos:
        template = [*([bos_token] if bos else []), "$A", *(["</s>"] if eos else [])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(template),
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in template if token != "$A"],
        )
    special = {"unk_token": "<unk>", "bos_token": bos_token, "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)


def byte_level(
    texts: list[str], *, split: str | None = None, add_prefix_space: bool = False, size: int = 500, **options: Any
) -> PreTrainedTokenizerFast:
    """Return byte-level BPE, split as in GPT-2 or by another rule (Llama-3, Qwen2, GPT-4)."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split is None)
    rule = [] if split is None else [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*rule, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer, **options)


def sentencepiece_bpe(texts: list[str], *, size: int = 600, words: bool = True) -> Tokenizer:
    """Return BPE with byte fallback and without normalizer, whose tokens have a mark at the start of words only.

    Without `words` tokens may span several words.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", MARK)
    if words:
        trained.pre_tokenizer = pre_tokenizers.Split(MARK, behavior="merged_with_next")
    common = [character for character in sorted(set("".join(texts))) if character.isascii() and character != " "]
    limit = 256 + len(SPECIAL) + len(common)
    trainer = trainers.BpeTrainer(
        vocab_size=max(size, limit + 50),
        special_tokens=[*SPECIAL, *BYTES],
        initial_alphabet=[MARK, "[", "]", "'", '"', ","],
        limit_alphabet=len(common) + 1,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def _sentencepiece_decoder(*, strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])


def prepend(texts: list[str], *, words: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer as Mistral, Mixtral and Phi-3 have it: its normalizer puts a mark before every text."""
    tokenizer = sentencepiece_bpe(texts, words=words)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    tokenizer.decoder = _sentencepiece_decoder(strip=True)
    return wrap(tokenizer, **{"bos": True, **options})


def metaspace(
    texts: list[str], *, scheme: str = "first", words: bool = True, **options: Any
) -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama-2 has it in transformers 5."""
    tokenizer = sentencepiece_bpe(texts, words=words)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme=scheme, split=False)
    tokenizer.decoder = _sentencepiece_decoder(strip=True)
    return wrap(tokenizer, **{"bos": True, **options})


def byte_fallback(texts: list[str], *, words: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer as Gemma has it: nothing is put before a text."""
    tokenizer = sentencepiece_bpe(texts, words=words)
    tokenizer.normalizer = normalizers.Replace(" ", MARK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = _sentencepiece_decoder(strip=False)
    return wrap(tokenizer, **{"bos": True, **options})


def unigram(texts: list[str], *, split: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer as T5 has it, or with `split` as XLM-R has it: all white space becomes one space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    mark = pre_tokenizers.Metaspace(MARK, prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), mark]) if split else mark
    tokenizer.decoder = decoders.Metaspace(MARK, prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        unk_token="<unk>",
        initial_alphabet=[*string.printable.strip(), *CHARACTERS],  # a character that is not there becomes <unk>
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer, **{"eos": True, **options})


def no_bytes(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return BPE without bytes to fall back to: characters that were not trained on become <unk>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(MARK)
    tokenizer.decoder = decoders.Metaspace(MARK)
    alphabet = list(string.printable.strip())
    ascii_only = [text for text in texts if text.isascii()]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(ascii_only, trainer)
    return wrap(tokenizer)


def lower_case(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return byte-level BPE that writes everything in lower case."""
    return _normalized(texts, normalizers.Lowercase())


def nfkc(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return byte-level BPE that replaces ligatures, full-width and raised characters."""
    return _normalized(texts, normalizers.NFKC())


def _normalized(texts: list[str], normalizer: normalizers.Normalizer) -> PreTrainedTokenizerFast:
    tokenizer = byte_level(texts)
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def word_piece(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer as BERT has it, with an end of sequence."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece()
    return _bert(tokenizer, texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL))


def gpt1(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer as the first GPT has it: lower case, and words end in a mark."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    return _bert(tokenizer, texts, trainer)


def _bert(tokenizer: Tokenizer, texts: list[str], trainer: trainers.Trainer) -> PreTrainedTokenizerFast:
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer.show_progress = False
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer)


KINDS: dict[str, Callable[..., PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "metaspace": metaspace,
    "prepend": prepend,
    "byte_fallback": byte_fallback,
    "unigram": unigram,
}
"""Tokenizers that write lists as they are."""
CHANGING = {kind.__name__: kind for kind in (lower_case, nfkc, word_piece, gpt1, no_bytes)}
"""Tokenizers that change some of what they write."""


@cache
def build(kind: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a kind; it is made once."""
    rows = [json.loads(line) for line in SAYINGS.read_text(encoding="utf-8").splitlines()[:300]]
    return (KINDS | CHANGING)[kind]([f"{row['quote']} ->: {row['tags']}" for row in rows])
