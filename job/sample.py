"""Tag texts: inference with an adapter, in batches, each answer a list of tags by construction."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2
import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from job import quantize
from job.dataset import prompts, tokenization
from job.dataset.tags import normalise_tag
from job.decoding.architectures import READ_PADDING, check_marginal
from job.decoding.config import DecodingConfig, describe_read_error, load_config, saved_config
from job.decoding.constraints import ClosedVocabulary, OpenVocabulary, constrain
from job.decoding.head import HEAD_NAME, mean_hidden_states
from job.decoding.marginals import MAX_BRANCHES_PER_TEXT, TagDistribution, tag_marginals
from job.decoding.scorers import Scorers, confidences, load_scorers
from job.decoding.tfidf import TFIDF_NAME
from job.errors import InvalidInputError
from job.freeze import freeze
from job.hub import client as hub
from job.settings import Data, Sample, Settings
from job.system import adapter_files, events
from job.system.adapter_files import AdapterConfig
from job.system.device import ComputeSpec, is_out_of_memory, release_memory, texts_per_batch
from job.system.progress import Progress
from job.types import Published, TaggedText

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from job.distributed.group import Group

log = logging.getLogger(__name__)

BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
"""Most tokens in a batch, padding and answers included, so that memory is bounded for long texts too."""
T = TypeVar("T")

READ_ERRORS = (OSError, ValueError, SafetensorError, httpx2.HTTPError)
"""What reading a file raises when the file is absent or damaged, or when the Hub does not serve it."""

_Answer = tuple[str, list[tuple[str, float]], bool]
"""The text that was written, its complete tags with their confidences, and whether the list is complete."""


class Tagger:
    """A model with its tokenizer, the settings that render prompts, and the decoding configuration."""

    def __init__(
        self,
        model: PreTrainedModel | peft.PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        compute: ComputeSpec,
        decoding: DecodingConfig,
        group: Group | None = None,
        scorers: Scorers | None = None,
    ) -> None:
        architecture = model.config.model_type
        if "marginal" in decoding.parts:
            check_marginal(architecture)
        self._pads = architecture not in READ_PADDING
        self._model = model
        self._group = group
        self._tokenizer = tokenizer
        self._data: Data = settings.data
        self._sample: Sample = settings.sample
        self._compute = compute
        self._rows = texts_per_batch(settings.sample.batch_size, compute.device)
        self._most_rows: int | None = None
        """Texts that share a forward pass since memory ran out."""
        self.decoding = decoding
        self.scorers = scorers or Scorers()
        """What decoding without generation needs; a new adapter gets it after training, by `set_scorers`."""
        answers = tokenization.AnswerTokenizer(tokenizer, settings.data.separator)
        self._vocabulary: OpenVocabulary | ClosedVocabulary
        if decoding.vocabulary == "open":
            self._vocabulary = OpenVocabulary(answers, decoding.max_tags)
        else:
            self._vocabulary = ClosedVocabulary(answers, decoding.tags, decoding.max_tags)
            _warn_of_lost_tags(self._vocabulary)

    def tag(self, texts: Sequence[str]) -> list[TaggedText]:
        """Return the answer for each text, in order; the batches are dealt to the processes of a group."""
        if self._group is not None:
            decoding = self.decoding.model_dump(mode="json")
            request = {"texts": list(texts), "decoding": decoding, "adapter": not _is_disabled(self._model)}
            self._group.send({"do": "tag", **request})
        answers = dict(self._tag_share(texts))
        return [answers[i] for i in range(len(texts))]

    def set_scorers(self, scorers: Scorers) -> None:
        """Answer with these scorers from now on, also in the other processes of a group."""
        self.scorers = scorers
        names = {"head": HEAD_NAME, "tfidf": TFIDF_NAME}
        files = scorers.files()
        update = {field: name for field, name in names.items() if name in files}
        self.decoding = self.decoding.model_copy(update=update)
        if self._group is not None:
            self._group.send({"do": "score", "files": {name: len(content) for name, content in files.items()}})
            for content in files.values():
                self._group.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def _receive_scorers(self, group: Group, sizes: Mapping[str, int]) -> None:
        files = {}
        for name, size in sizes.items():
            content = torch.empty(size, dtype=torch.uint8)
            group.broadcast(content)
            files[name] = content.numpy().tobytes()
        self.scorers = Scorers.from_bytes(files)

    @contextmanager
    def without_scorers(self) -> Iterator[None]:
        """Let the base model, which no scorer was fitted for, write its list of tags."""
        decoding = self.decoding
        if decoding.needs_scorers:
            self.decoding = decoding.model_copy(update={"decoding": "greedy", "threshold": 0.0})
        try:
            yield
        finally:
            self.decoding = decoding

    def join(self, group: Group) -> None:
        """Share the batches of later texts with other processes that `follow`."""
        self._group = group

    def lead(self, group: Group, texts: Sequence[str]) -> list[TaggedText]:
        """Return the answer for each text, in order, with the help of other processes that `follow` until then."""
        self.join(group)
        answers = self.tag(texts)
        group.send({"do": "end"})
        return answers

    def follow(self, group: Group) -> None:
        """Tag this process's share of the texts that process 0 tags, until that one has finished."""
        self._group = group
        while (message := group.receive())["do"] != "end":
            if message["do"] == "score":
                self._receive_scorers(group, message["files"])
                continue
            self.decoding = DecodingConfig.model_validate(message["decoding"])
            model: Any = self._model
            with nullcontext() if message["adapter"] else model.disable_adapter():
                self._tag_share(message["texts"])

    def _tag_share(self, texts: Sequence[str]) -> list[tuple[int, TaggedText]]:
        """Return the answers of all processes on process 0, with the positions of their texts."""
        rank, size = (0, 1) if self._group is None else (self._group.rank, self._group.size)
        own = []
        with Progress(events.chapter() or "tag", len(texts), "texts") as progress:
            for answer in self.answers(texts, share=(rank, size)):
                own.append(answer)
                progress.add(min(size, len(texts) - progress.done))  # the others are about as far
        if self._group is None:
            return own
        gathered = self._group.gather([(i, asdict(answer)) for i, answer in own])
        return [(i, TaggedText.from_json(answer)) for answers in gathered for i, answer in answers]

    def answers(self, texts: Sequence[str], share: tuple[int, int] = (0, 1)) -> Iterator[tuple[int, TaggedText]]:
        """Yield the position of each text and its answer, batch by batch, the longest texts first.

        Texts of similar length share a batch, so that little is padded: at most `batch_size` texts, and at most
        BATCH_TOKENS tokens unless a single text has more. Where padding would change the answers, they have the same
        length. Where memory runs out, a batch is computed in parts. `share` is a number and a count: of so many
        batches, only the one with this number is computed, so that the batches do not depend on who computes them.
        """
        encoded = self._encode(texts)
        greedy = self.decoding.decoding == "greedy"

        def compute(batch: Sequence[int]) -> list[_Answer]:
            prompts = [encoded[i] for i in batch]
            return self._greedy(prompts) if greedy else self._score(prompts, [texts[i] for i in batch])

        for batch in itertools.islice(self._batches([len(ids) for ids in encoded]), share[0], None, share[1]):
            for i, answer in zip(batch, self._in_memory(compute, batch), strict=True):
                yield i, self._tagged_text(texts[i], *answer)

    def hidden_states(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the mean hidden state of the prompt of each text, float32 [texts, hidden size], for a tag head."""
        encoded = self._encode(texts)
        states: dict[int, torch.Tensor] = {}
        with Progress(events.chapter() or "tag", len(texts), "texts") as progress:
            for batch in self._batches([len(ids) for ids in encoded]):
                found = self._in_memory(lambda rows: list(self._states([encoded[i] for i in rows])), batch)
                states.update(zip(batch, found, strict=True))
                progress.add(len(batch))
        return torch.stack([states[i] for i in range(len(texts))])

    def _in_memory(self, compute: Callable[[Sequence[int]], list[T]], batch: Sequence[int]) -> list[T]:
        """Return what `compute` does for a batch; divide it where memory runs out, and so later ones too."""
        self._model.eval()
        rows = min(len(batch), self._most_rows or len(batch))
        try:
            with self._kernels():
                return [found for start in range(0, len(batch), rows) for found in compute(batch[start : start + rows])]
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
        release_memory(self._compute.device)
        self._most_rows = rows // 2
        log.warning("tag: out of memory; at most %d texts now share a forward pass", self._most_rows)
        return self._in_memory(compute, batch)

    def _kernels(self) -> AbstractContextManager[None]:
        """Return the context with the forward passes of training on a GPU, which has fewer kernels to start then."""
        if self._compute.device.type == "cpu":
            return nullcontext()
        from job.training import memory_efficient

        return memory_efficient.patched(self._model)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        reserved = self._sample.max_new_tokens
        return tokenization.encode_prompts(self._tokenizer, texts, self._data, reserved_tokens=reserved)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the positions of the prompts in each batch."""
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        most_tokens = BATCH_TOKENS.get(self._compute.device.type, BATCH_TOKENS["cuda"])
        branches = MAX_BRANCHES_PER_TEXT if "marginal" in self.decoding.parts else 1
        while by_length:
            # longest first: if memory does not suffice, that shows at once
            tokens = (lengths[by_length[-1]] + self._sample.max_new_tokens) * branches
            rows = max(1, min(self._rows, most_tokens // tokens))
            batch = by_length[-rows:]
            if not self._pads:
                batch = [i for i in batch if lengths[i] == lengths[batch[-1]]]
            yield batch
            del by_length[-len(batch) :]

    def cut_to(self, text: str) -> int | None:
        """Return TAGGER_DATA_MAX_LENGTH if the end of a text is cut off for it; None if the text fits."""
        reserved = self._sample.max_new_tokens
        is_cut = tokenization.is_cut(self._tokenizer, text, self._data, reserved_tokens=reserved)
        return self._data.max_length if is_cut else None

    def _tagged_text(self, text: str, raw: str, tags: list[tuple[str, float]], complete: bool) -> TaggedText:
        kept = [(tag, confidence) for tag, confidence in tags if confidence >= self.decoding.threshold]
        return TaggedText(
            text,
            prompts.prompt(text, self._data.separator),
            raw,
            tuple(tag for tag, _ in kept),
            complete,
            tuple(round(confidence, 4) for _, confidence in kept),
        )

    def _greedy(self, prompts: list[list[int]]) -> list[_Answer]:
        """Generate a list after each prompt, each token the most likely of those allowed."""
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
        states = [self._vocabulary.new_state() for _ in prompts]
        with torch.inference_mode(), self._compute.autocast():
            generated = generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([lambda _, logits: constrain(states, logits)]),
                stopping_criteria=[lambda ids, _: torch.tensor([s.closed for s in states], device=ids.device)],
            )
        texts = self._tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
        return [
            (str([tag for tag, _ in state.tags]) if state.closed else text.strip(), state.tags, state.closed)
            for text, state in zip(texts, states, strict=True)
        ]

    def _score(self, prompts: list[list[int]], texts: list[str]) -> list[_Answer]:
        """Compute the probability of each tag of the vocabulary; answer with the most confident ones, best first."""
        allowed = set(self.decoding.tags)
        found: dict[str, list[dict[str, float]]] = {}
        raw = [""] * len(prompts)
        for part in self.decoding.parts:
            if part == "marginal":
                distributions = self._marginals(prompts)
                raw = [str(distribution.greedy_tags) for distribution in distributions]
                found[part] = [distribution.tags for distribution in distributions]
            elif part == "head":
                assert self.scorers.head is not None, "the head is not fitted yet"
                probabilities = self.scorers.head.probabilities(self._states(prompts))
                found[part] = confidences(self.scorers.head.tags, probabilities, allowed)
            else:
                assert self.scorers.tfidf is not None, "TF-IDF is not fitted yet"
                found[part] = confidences(self.scorers.tfidf.tags, self.scorers.tfidf.probabilities(texts), allowed)
        answers: list[_Answer] = []
        for number, written in enumerate(raw):
            tags = self._blended({part: every[number] for part, every in found.items()})
            best = sorted(tags.items(), key=lambda entry: (-entry[1], entry[0]))[: self.decoding.max_tags]
            answers.append((written, best, True))
        return answers

    def _blended(self, found: dict[str, dict[str, float]]) -> dict[str, float]:
        if "+" not in self.decoding.decoding:
            return found[self.decoding.decoding]
        assert self.decoding.blend is not None, "the blend is not calibrated yet"
        return self.decoding.blend.combine(found)

    def _marginals(self, prompts: list[list[int]]) -> list[TagDistribution]:
        assert isinstance(self._vocabulary, ClosedVocabulary)
        ids, mask = self._padded(prompts)
        with torch.inference_mode(), self._compute.autocast():
            return tag_marginals(
                self._model,
                ids,
                mask,
                self._vocabulary,
                max_positions=self.decoding.max_positions,
                token_budget=self._sample.max_new_tokens,
            )

    def _states(self, prompts: list[list[int]]) -> torch.Tensor:
        with torch.inference_mode(), self._compute.autocast():
            states = mean_hidden_states(self._model, *self._padded(prompts, left=False))
        return states.clone()  # no inference tensor: a head is fitted on it

    def _padded(self, prompts: list[list[int]], *, left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and mask, int64 [prompts, width], padded on the left, where generation continues."""
        width = max(len(prompt) for prompt in prompts)

        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            fill = [[value] * (width - len(row)) for row in rows]
            pairs = zip(rows, fill, strict=True)
            return torch.tensor([f + r if left else r + f for r, f in pairs], device=self._compute.device)

        return padded(prompts, self._tokenizer.pad_token_id), padded([[1] * len(prompt) for prompt in prompts], 0)


def load_tagger(settings: Settings, adapter: Published | Path | str, compute: ComputeSpec) -> Tagger:
    """Load the base model and an adapter: one that was just published, one in a folder (a Path), or a Hub repo's.

    A repo is read at TAGGER_HUB_REVISION. The base model is frozen as in training, so that it computes the same
    numbers; where TAGGER_BASE_REVISION is not set, it has the revision that the adapter names.
    Raises InvalidInputError when the adapter is absent or damaged, is not one of LoRA alone, or was trained on another
    base model.
    """
    source: Path | str
    revision: str | None
    if isinstance(adapter, Published):
        source, revision = adapter.repo, adapter.revision
    else:
        source, revision = adapter, None if isinstance(adapter, Path) else settings.hub.revision
    config = adapter_config(source, revision)
    if config.base_model_name_or_path is None:
        raise InvalidInputError(
            f"the adapter in {source} does not name its base model; expected one that was saved by this job"
        )
    if config.base_model_name_or_path not in (settings.base.model, quantize.hub_identity(settings.base)[0]):
        raise InvalidInputError(
            f"the adapter in {source} was trained on {config.base_model_name_or_path}, not on {settings.base.model}; "
            f"set TAGGER_BASE_MODEL={config.base_model_name_or_path}"
        )
    decoding = load_config(settings.sample, source, revision)
    scorers = load_scorers(decoding, saved_config(source, revision).tags, source, revision)
    base = settings.base.model_copy(update={"revision": settings.base.revision or config.revision})
    model = quantize.load_model(base, compute)
    freeze(model)
    adapted = _load_adapter(model, config, source, revision)
    return Tagger(adapted, quantize.load_tokenizer(base), settings, compute, decoding, scorers=scorers)


def _warn_of_lost_tags(vocabulary: ClosedVocabulary) -> None:
    """Log how many tags are in no answer; a training refuses them, and a vocabulary file may bring new ones."""
    pairs = vocabulary.same_tokens.items()
    lost = [(tag, other) for tag, other in pairs if normalise_tag(tag) != normalise_tag(other)]
    if lost:
        log.warning(
            "sample: %d tags of the vocabulary are in no answer, because the tokenizer writes them like other tags, "
            "such as %r like %r",
            *(len(lost), *lost[0]),
        )


def _is_disabled(model: torch.nn.Module) -> bool:
    """Return whether the adapters are switched off at the moment."""
    return any(module.disable_adapters for module in model.modules() if isinstance(module, LoraLayer))


def adapter_config(source: Path | str, revision: str | None) -> AdapterConfig:
    """Return the configuration of the adapter in a folder or a repo; raises InvalidInputError if there is none."""
    try:
        folder = source if isinstance(source, Path) else hub.download_metadata(source, revision, CONFIG_NAME).parent
        return adapter_files.read_config(folder)
    except READ_ERRORS as error:
        raise InvalidInputError(
            f"there is no adapter to read in {source}: {describe_read_error(error)}. "
            "Check TAGGER_HUB_REPO and HF_TOKEN, or train one first"
        ) from error


def _adapter_folder(source: Path | str, revision: str | None) -> Path:
    """Return the folder of an adapter, downloaded if it is a repo's; PEFT would read a pickle if it had no safetensors.

    Raises OSError when there are no weights in safetensors.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        folder = source if isinstance(source, Path) else hub.download(source, revision, SAFETENSORS_WEIGHTS_NAME).parent
    except RemoteEntryNotFoundError:
        folder = None
    if folder is None or not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise OSError(f"there is no {SAFETENSORS_WEIGHTS_NAME}, and pickles are not read because they can run code")
    return folder


def _load_adapter(
    model: PreTrainedModel, config: AdapterConfig, source: Path | str, revision: str | None
) -> peft.PeftModel:
    try:
        folder = _adapter_folder(source, revision)
        shapes = adapter_files.weight_shapes(folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            adapted = peft.PeftModel.from_pretrained(model, str(folder), config=config.to_peft())
        adapter_files.check_weights(adapted, shapes)
    except (*READ_ERRORS, RuntimeError) as error:
        # torch reports tensors of other shapes as a RuntimeError that starts like this; others are not the file's
        if isinstance(error, RuntimeError) and "Error(s) in loading state_dict" not in str(error):
            raise
        raise InvalidInputError(
            f"the weights of the adapter in {source} cannot be read: {hub.error_message(error)}; train or fetch it "
            "again"
        ) from error
    return adapted
