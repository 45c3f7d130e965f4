"""Tag texts: generate answers in batches and read the tags out of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import peft
import torch

from job import data, hub, quantize
from job.device import Machine
from job.freeze import freeze
from job.results import Published, Refused, Tagged
from job.settings import Data, Sample, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 8192
"""Most tokens of a batch, padding and answers included: what bounds its memory, however long the texts are."""


class Tagger:
    """A model with its tokenizer and the settings that its texts are rendered with."""

    def __init__(
        self,
        model: PreTrainedModel | peft.PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        machine: Machine,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._data: Data = settings.data
        self._sample: Sample = settings.sample
        self._machine = machine
        # an answer ends at the end of sequence, or with the token that closes the list
        closing = {i for token, i in tokenizer.get_vocab().items() if "]" in token}
        self._stop_ids = [tokenizer.eos_token_id, *sorted(closing - {tokenizer.eos_token_id})]

    def tag(self, texts: Sequence[str]) -> list[Tagged]:
        """The answer for each text, in order: greedy, at most `max_new_tokens` tokens.

        Texts of like length share a batch, so that little is padded: at most `batch_size` of them, and
        BATCH_TOKENS tokens unless one text alone has more.
        """
        room = self._sample.max_new_tokens
        prompts = [data.encode_prompt(self._tokenizer, text, self._data, answer_room=room) for text in texts]
        by_length = sorted(range(len(texts)), key=lambda i: len(prompts[i]))
        raw = [""] * len(texts)
        self._model.eval()
        while by_length:
            # the longest first: memory that is not enough shows at once
            rows = max(1, min(self._sample.batch_size, BATCH_TOKENS // (len(prompts[by_length[-1]]) + room)))
            batch = by_length[-rows:]
            del by_length[-rows:]
            for i, answer in zip(batch, self._generate([prompts[i] for i in batch]), strict=True):
                raw[i] = answer
        return [self._answer(text, answer) for text, answer in zip(texts, raw, strict=True)]

    def _answer(self, text: str, raw: str) -> Tagged:
        tags, parsed = parse(raw)
        return Tagged(text, data.prompt(text, self._data.separator), raw, tags, parsed)

    def _generate(self, prompts: list[list[int]]) -> list[str]:
        from transformers import GenerationConfig

        device = self._machine.device
        generate: Any = self._model.generate
        width = max(len(prompt) for prompt in prompts)
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self._sample.max_new_tokens,
            eos_token_id=self._stop_ids,
            pad_token_id=pad,
            bos_token_id=self._tokenizer.bos_token_id,
        )
        with torch.inference_mode(), self._machine.autocast():
            written = generate(input_ids=ids, attention_mask=mask, generation_config=config)
        answers: list[str] = self._tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


def parse(raw: str) -> tuple[tuple[str, ...], bool]:
    """The tags in an answer, each once, and whether it was one whole list of texts.

    Of an answer that was cut off or is malformed, the items that were closed count.
    """
    value = data.parse_list(raw)
    if value and all(isinstance(tag, str) for tag in value):
        return tuple(dict.fromkeys(tag.strip() for tag in value if tag.strip())), True
    if not raw.lstrip().startswith("["):
        return (), False
    closed = re.findall(r"'([^'\n]+)'|\"([^\"\n]+)\"", raw)
    return tuple(dict.fromkeys(tag for pair in closed for tag in (part.strip() for part in pair) if tag)), False


def load_tagger(settings: Settings, adapter: Published | Path | str, machine: Machine) -> Tagger:
    """The base model loaded anew with an adapter: one just published, a folder's, or a Hub repo's.

    A repo is read at TAGGER_HUB_REVISION. The base model is frozen as for training, so that its
    numbers are those the adapter was trained with.
    Raises Refused when there is no such adapter, or when it was trained on another base model.
    """
    revision: str | None
    if isinstance(adapter, Published):
        place, revision = adapter.repo, adapter.revision
    else:
        place, revision = str(adapter), None if isinstance(adapter, Path) else settings.hub.revision
    config = _adapter_config(place, revision)
    if config.base_model_name_or_path is None:
        raise Refused(f"the adapter in {place} does not name its base model; expected one that was saved by this job")
    if config.base_model_name_or_path not in (settings.base.model, quantize.identity(settings.base)[0]):
        raise Refused(
            f"the adapter in {place} was trained on {config.base_model_name_or_path}, not on {settings.base.model}; "
            f"set TAGGER_BASE_MODEL={config.base_model_name_or_path}"
        )
    base = settings.base.model_copy(update={"revision": config.revision or settings.base.revision})
    model = quantize.load_model(base, machine)
    freeze(model)
    try:
        adapted = peft.PeftModel.from_pretrained(model, place, revision=revision, token=hub.token() or False)
    except (*quantize.UNREADABLE, httpx2.HTTPError) as error:
        raise Refused(
            f"the weights of the adapter in {place} cannot be read: {error}; train or fetch it again"
        ) from error
    return Tagger(adapted, quantize.load_tokenizer(base), settings, machine)


def _adapter_config(adapter: str, revision: str | None) -> peft.PeftConfig:
    try:
        config: peft.PeftConfig = peft.PeftConfig.from_pretrained(
            adapter, revision=revision, token=hub.token() or False
        )
    except (OSError, ValueError, TypeError, httpx2.HTTPError) as error:
        reason = " ".join(str(error).split())
        raise Refused(
            f"there is no adapter to read in {adapter}: {reason}. "
            "Check TAGGER_HUB_REPO and HF_TOKEN, or train one first"
        ) from error
    return config
