"""Decoding on a GPU: answers equal to the CPU's, and texts and tags a second."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import peft
import torch
from transformers import PreTrainedTokenizerFast

from bench import measure
from bench.gpu.harness import Row, Rows
from bench.gpu.models import BLOOM, SHAPES, Work, adapted, config
from bench.gpu.texts import SAYINGS, SEPARATOR, make_tokenizer, quotes, sayings
from job.system.device import ComputeSpec, texts_per_batch

if TYPE_CHECKING:
    from job.sample import Tagger
    from job.types import TaggedText

FINAL_NORMS = ("model.norm.weight", "transformer.ln_f.weight")
DECISIVE = 8.0
"""How much larger the logits of random weights are made: they would be almost equal, and most choices ties."""
FAVOUR = 12.0
"""What is added to the logits of the tokens that may come next in a list of tags."""
SMALL_BATCH = 32
TIE = 1e-3
"""Two tags whose confidences differ by no more were about equally likely."""


def make_tagger(
    work: Work, shape: str, quantize: str, compute: ComputeSpec, decoding: str, *, batch_size: int, max_new_tokens: int
) -> tuple[Tagger, peft.PeftModel]:
    """Return a tagger and its model, with random weights and the tags of the sayings; its answers mean nothing."""
    from job.decoding.config import DecodingConfig
    from job.sample import Tagger
    from job.settings import Settings

    model_config = config(shape, toy=work.toy)
    work.model(shape, quantize, work.compute())  # so that the weights are there
    weights = {name: tensor.to(compute.device) for name, tensor in work.weights[shape].items()}
    for name in FINAL_NORMS:
        if name in weights:
            weights[name] = weights[name] * DECISIVE
    model = adapted(model_config, weights, quantize, compute)
    tokenizer = make_tokenizer(min(4000, model_config.vocab_size))
    tags = tuple(dict.fromkeys(tag for row in sayings() for tag in row["tags"]))
    _favour_tags(model, tokenizer, tags)
    groups: Any = {
        "base": {"model": "random", "quantize": quantize},
        "data": {"dataset": str(SAYINGS)},
        "sample": {"batch_size": batch_size, "max_new_tokens": max_new_tokens},
    }
    found = DecodingConfig(
        schema_version=1,
        decoding=decoding,  # type: ignore[arg-type]
        vocabulary="closed",
        tags=tags,
        threshold=0.0,
        max_tags=5,
        max_positions=5,
    )
    return Tagger(model, tokenizer, Settings(**groups), compute, found), model


def _favour_tags(model: peft.PeftModel, tokenizer: PreTrainedTokenizerFast, tags: Sequence[str]) -> None:
    """Raise the logits of tokens that may follow the one before in a list of tags.

    Random weights would give each tag next to no probability, and there would be nothing to compare.
    """
    from job.dataset.tokenization import AnswerTokenizer

    answers = AnswerTokenizer(tokenizer, SEPARATOR)
    forms = {
        (first, last): answers.tag_ids(list(tags), first=first, last=last)
        for first, last in itertools.product((True, False), repeat=2)
    }
    head: Any = model.get_output_embeddings()
    bonus = torch.zeros(len(tokenizer), len(tokenizer), device=head.weight.device)
    separator = tokenizer.encode(f"x{SEPARATOR.rstrip()}", add_special_tokens=False)[-1]
    commas = {ids[-1] for (_, last), found in forms.items() if not last for ids in found}
    for (first, _), found in forms.items():
        for ids in found:
            for before, after in itertools.pairwise([-1, *ids]):
                for token in ([separator] if first else commas) if before == -1 else [before]:
                    bonus[token, after] = FAVOUR
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        seen[:] = [args[0] if args else inputs["input_ids"]]

    def raise_logits(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., : len(bonus)] += bonus[seen[0][:, -logits.shape[1] :]]
        return logits

    base: Any = model.get_base_model()
    base.base_model.register_forward_pre_hook(keep, with_kwargs=True)
    head.register_forward_hook(raise_logits)


def check_decoding(work: Work) -> Rows:
    """Compare the answers with those of the CPU in fp32, and measure how many texts are tagged a second."""
    texts = [row["quote"] for row in quotes(6 if work.toy else 12)]
    for decoding in ("greedy", "marginal"):
        answers = []
        for device in (torch.device("cpu"), work.device):
            compute = ComputeSpec(device, "fp32")
            tagger, _ = make_tagger(work, SHAPES[1], "none", compute, decoding, batch_size=12, max_new_tokens=24)
            answers.append(tagger.tag(texts))
        yield _compare(decoding, answers, tagger)
    yield from _speeds(work)


def _compare(decoding: str, answers: Sequence[Sequence[TaggedText]], tagger: Tagger) -> Row:
    from job.decoding.equivalence import same_answer

    pairs = [(asdict(old), asdict(new)) for old, new in zip(*answers, strict=True)]
    equal = sum(same_answer(old, new, tagger.decoding) for old, new in pairs)
    ties = sum(not same_answer(old, new, tagger.decoding) and _is_tie(old, new) for old, new in pairs)
    figure = f"{equal} of {len(pairs)} answers equal to the CPU's, {ties} with a tie; for example {answers[1][0].tags}"
    data = {"equal": equal, "ties": ties, "texts": len(pairs)}
    return Row(f"{SHAPES[1]}, {decoding}, fp32", equal + ties == len(pairs), figure, data)


def _is_tie(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return whether the first tags that differ were about equally likely."""
    rows = zip(old["tags"], new["tags"], old["confidences"], new["confidences"], strict=False)
    first = next(((a, b) for tag, other, a, b in rows if tag != other), None)
    return first is not None and abs(first[0] - first[1]) <= TIE


def _speeds(work: Work) -> Rows:
    compute = work.compute()
    texts = [row["quote"] for row in quotes(8 if work.toy else 512, seed=1)]
    for shape, quantize in ((BLOOM, work.quantizations[0]), (SHAPES[1], "none")):
        for decoding in ("greedy", "marginal"):
            what = f"{shape}, {quantize}, {decoding}, {compute.precision}"
            for rows in (SMALL_BATCH, texts_per_batch(None, work.device)):
                tagger, _ = make_tagger(work, shape, quantize, compute, decoding, batch_size=rows, max_new_tokens=32)
                yield _speed(f"{what}, batches of up to {rows}", tagger, texts[: 4 * rows], work.device)
                del tagger
                work.release()


def _speed(what: str, tagger: Tagger, texts: Sequence[str], device: torch.device) -> Row:
    tagger.tag(texts[:2])
    measure.synchronize(device)
    started = time.perf_counter()
    answers = tagger.tag(texts)
    measure.synchronize(device)
    seconds = time.perf_counter() - started
    tags = sum(len(answer.tags) for answer in answers)
    figure = f"{len(texts) / seconds:.1f} texts/s, {tags / seconds:.1f} tags/s"
    return Row(what, None, figure, {"texts": len(texts), "tags": tags, "seconds": seconds})
