"""Tag texts: generate answers in batches, each a list of tags by construction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import peft
import torch

from job import quantize
from job.dataset import prompts, tokenization
from job.decoding.config import DecodingConfig, load_config
from job.decoding.constraints import ClosedVocabulary, OpenVocabulary, constrain
from job.decoding.marginals import BEAM_ROWS, tag_marginals
from job.errors import InvalidInputError
from job.freeze import freeze
from job.hub import client as hub
from job.settings import Data, Sample, Settings
from job.system.device import ComputeSpec
from job.types import Published, TaggedText

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 8192
"""Most tokens of a batch, padding and answers included: what bounds its memory, however long the texts are."""

_Answer = tuple[str, list[tuple[str, float]], bool]
"""What was written, its whole tags with their confidences, and whether the list came to its end."""


class Tagger:
    """A model with its tokenizer, the settings that its texts are rendered with, and how its answers are decoded."""

    def __init__(
        self,
        model: PreTrainedModel | peft.PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        machine: ComputeSpec,
        decoding: DecodingConfig,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._data: Data = settings.data
        self._sample: Sample = settings.sample
        self._machine = machine
        self.decoding = decoding
        space, most = prompts.target([], settings.data.separator).removesuffix("[]"), decoding.max_tags
        self._grammar: OpenVocabulary | ClosedVocabulary
        if decoding.vocabulary == "open":
            self._grammar = OpenVocabulary(tokenizer, space, most)
        else:
            self._grammar = ClosedVocabulary(tokenizer, decoding.tags, space, most)

    def tag(self, texts: Sequence[str]) -> list[TaggedText]:
        """The answer for each text, in order.

        Texts of like length share a batch, so that little is padded: at most `batch_size` of them, and
        BATCH_TOKENS tokens unless one text alone has more.
        """
        room = self._sample.max_new_tokens
        prompts = [
            tokenization.encode_prompt(self._tokenizer, text, self._data, reserved_tokens=room) for text in texts
        ]
        by_length = sorted(range(len(texts)), key=lambda i: len(prompts[i]))
        answers: dict[int, TaggedText] = {}
        likely = self.decoding.decoding == "marginal"
        self._model.eval()
        while by_length:
            # the longest first: memory that is not enough shows at once
            tokens = (len(prompts[by_length[-1]]) + room) * (BEAM_ROWS if likely else 1)
            rows = max(1, min(self._sample.batch_size, BATCH_TOKENS // tokens))
            batch = by_length[-rows:]
            del by_length[-rows:]
            found = (self._marginal if likely else self._greedy)([prompts[i] for i in batch])
            for i, answer in zip(batch, found, strict=True):
                answers[i] = self._tagged_text(texts[i], *answer)
        return [answers[i] for i in range(len(texts))]

    def _tagged_text(self, text: str, raw: str, tags: list[tuple[str, float]], closed: bool) -> TaggedText:
        kept = [(tag, confidence) for tag, confidence in tags if confidence >= self.decoding.threshold]
        return TaggedText(
            text,
            prompts.prompt(text, self._data.separator),
            raw,
            tuple(tag for tag, _ in kept),
            closed,
            tuple(round(confidence, 4) for _, confidence in kept),
        )

    def _greedy(self, prompts: list[list[int]]) -> list[_Answer]:
        """The list that is written after each prompt, greedily."""
        from transformers import GenerationConfig, LogitsProcessorList

        generate: Any = self._model.generate
        ids, mask = self._padded(prompts)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self._sample.max_new_tokens,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
            bos_token_id=self._tokenizer.bos_token_id,
        )
        walks = [self._grammar.new_state() for _ in prompts]
        with torch.inference_mode(), self._machine.autocast():
            written = generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([lambda _, logits: constrain(walks, logits)]),
                stopping_criteria=[lambda ids, _: torch.tensor([w.closed for w in walks], device=ids.device)],
            )
        texts = self._tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        return [
            (str([tag for tag, _ in walk.tags]) if walk.closed else text.strip(), walk.tags, walk.closed)
            for text, walk in zip(texts, walks, strict=True)
        ]

    def _marginal(self, prompts: list[list[int]]) -> list[_Answer]:
        """The tags that are likely enough after each prompt, the most confident first."""
        assert isinstance(self._grammar, ClosedVocabulary)
        ids, mask = self._padded(prompts)
        with torch.inference_mode(), self._machine.autocast():
            lists = tag_marginals(
                self._model,
                ids,
                mask,
                self._grammar,
                max_positions=self.decoding.max_positions,
                room=self._sample.max_new_tokens,
            )
        answers: list[_Answer] = []
        for found in lists:
            ordered = sorted(found.tags.items(), key=lambda entry: (-entry[1], entry[0]))[: self.decoding.max_tags]
            answers.append((str(found.written), ordered, True))
        return answers

    def _padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, int64 [prompts, width], padded on the left."""
        width = max(len(prompt) for prompt in prompts)
        pad, device = self._tokenizer.pad_token_id, self._machine.device
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        return ids, mask


def load_tagger(settings: Settings, adapter: Published | Path | str, machine: ComputeSpec) -> Tagger:
    """The base model loaded anew with an adapter: one just published, a folder's, or a Hub repo's.

    A repo is read at TAGGER_HUB_REVISION. The base model is frozen as for training, so that its
    numbers are those the adapter was trained with.
    Raises InvalidInputError when there is no such adapter, or when it was trained on another base model.
    """
    revision: str | None
    if isinstance(adapter, Published):
        place, revision = adapter.repo, adapter.revision
    else:
        place, revision = str(adapter), None if isinstance(adapter, Path) else settings.hub.revision
    config = _adapter_config(place, revision)
    if config.base_model_name_or_path is None:
        raise InvalidInputError(
            f"the adapter in {place} does not name its base model; expected one that was saved by this job"
        )
    if config.base_model_name_or_path not in (settings.base.model, quantize.hub_identity(settings.base)[0]):
        raise InvalidInputError(
            f"the adapter in {place} was trained on {config.base_model_name_or_path}, not on {settings.base.model}; "
            f"set TAGGER_BASE_MODEL={config.base_model_name_or_path}"
        )
    decoding = load_config(settings.sample, adapter if isinstance(adapter, Path) else place, revision)
    base = settings.base.model_copy(update={"revision": config.revision or settings.base.revision})
    model = quantize.load_model(base, machine)
    freeze(model)
    try:
        adapted = peft.PeftModel.from_pretrained(model, place, revision=revision, token=hub.token() or False)
    except (*quantize.LOAD_ERRORS, httpx2.HTTPError) as error:
        raise InvalidInputError(
            f"the weights of the adapter in {place} cannot be read: {error}; train or fetch it again"
        ) from error
    return Tagger(adapted, quantize.load_tokenizer(base), settings, machine, decoding)


def _adapter_config(adapter: str, revision: str | None) -> peft.PeftConfig:
    try:
        config: peft.PeftConfig = peft.PeftConfig.from_pretrained(
            adapter, revision=revision, token=hub.token() or False
        )
    except (OSError, ValueError, TypeError, httpx2.HTTPError) as error:
        reason = " ".join(str(error).split())
        raise InvalidInputError(
            f"there is no adapter to read in {adapter}: {reason}. "
            "Check TAGGER_HUB_REPO and HF_TOKEN, or train one first"
        ) from error
    return config
