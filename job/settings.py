"""Every setting: name, default, bounds and meaning.

`TAGGER_LORA_R` is `settings.lora.r`: prefix, group (one a chapter), knob. `job.config.environment` reads
the values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from job.cloud.gpus import parse_gpus
from job.config.validators import (
    Identifier,
    ModalName,
    NameList,
    TextList,
    Threshold,
    _cron,
    _eval_size,
    _separator,
)
from job.errors import InvalidInputError

PREFIX = "TAGGER_"


class SettingsGroup(BaseModel):
    """The knobs of one chapter."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Base(SettingsGroup):
    model: Identifier = Field(
        "bigscience/bloomz-560m",
        description="Base model: a Hub id, a local folder, or a .gguf file "
        "(package:NAME/FILE for one inside an installed Python package).",
    )
    revision: Identifier | None = Field(None, description="Branch, tag or commit of the base model on the Hub.")
    quantize: Literal["int8", "nf4", "none"] = Field(
        "int8", description="Quantization of the frozen base: int8, nf4 or none."
    )


class Data(SettingsGroup):
    dataset: Identifier = Field(
        "Abirate/english_quotes",
        description="Data set: a Hub id, or a .jsonl, .csv or .parquet file "
        "(package:NAME/FILE for one inside an installed Python package).",
    )
    revision: Identifier | None = Field(None, description="Branch, tag or commit of the data set on the Hub.")
    split: Identifier = Field("train", description="Split of a Hub data set to read.")
    text_column: Identifier = Field("quote", description="Column that holds the text.")
    tags_column: Identifier = Field(
        "tags",
        description="Column that holds the tags: a list, a Python or JSON list in a string, or comma-separated.",
    )
    separator: Annotated[str, BeforeValidator(_separator)] = Field(
        " ->: ",
        description="Stands between text and tags; a space is added on a side that has no white space.",
    )
    max_length: int = Field(
        512, ge=16, le=65536, description="Most tokens of one example; a longer text is cut, never its tags."
    )
    eval_size: Annotated[float, AfterValidator(_eval_size)] = Field(
        0.1,
        gt=0,
        description="Examples held out for evaluation: a share below 1, or a whole number of them. Only with a share "
        "does new data leave every example on its side.",
    )
    calibration_size: Annotated[float, AfterValidator(_eval_size)] = Field(
        0.1,
        gt=0,
        description="Training examples kept from training for TAGGER_SAMPLE_THRESHOLD=auto, and only then: a share "
        "below 1, or a whole number of them.",
    )
    tag_order: Literal["given", "frequency", "shuffled"] = Field(
        "given",
        description="Order of an example's tags in training: as the data has them, the most frequent first, or another "
        "one each epoch.",
    )
    min_tag_count: int = Field(
        1,
        ge=1,
        le=10**9,
        description="Tags that fewer training examples have are not trained on, so that seen ones and likely ones do "
        "not include them; an example that has no others keeps them.",
    )
    limit: int | None = Field(None, ge=2, le=10**9, description="Use only the first examples of the data, this many.")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of the held-out split, apart from the training's seed.")

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Data:
        if self.limit is not None and self.eval_size >= self.limit:
            raise ValueError(
                f"TAGGER_DATA_EVAL_SIZE={self.eval_size:g} holds out all of TAGGER_DATA_LIMIT={self.limit} examples; "
                "lower the one or raise the other"
            )
        return self


class Lora(SettingsGroup):
    r: int = Field(16, ge=1, le=1024, description="Rank of the adapters.")
    alpha: float = Field(
        32, gt=0, le=65536, description="Scale of the adapters: their output is multiplied by alpha / r."
    )
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapters' input.")
    targets: NameList | None = Field(
        None,
        min_length=1,
        description="Comma-separated names of the modules that get adapters, or all-linear; "
        "empty: the architecture's attention projections.",
    )


class Train(SettingsGroup):
    max_steps: int = Field(200, ge=1, le=10**9, description="Optimizer steps.")
    batch_size: int = Field(4, ge=1, le=65536, description="An optimizer step has this many examples, times the next.")
    gradient_accumulation_steps: int = Field(
        4, ge=1, le=65536, description="An optimizer step has this many times TAGGER_TRAIN_BATCH_SIZE examples."
    )
    micro_batch_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = Field(
        None,
        description="Most tokens computed at once; one longer example is computed alone. Changes memory and speed, "
        "never the batch; auto or empty: what suits the device and fits, halved when memory runs out.",
    )
    warmup_steps: int = Field(100, ge=0, le=10**9, description="Steps over which the learning rate rises from zero.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "linear",
        description="How the learning rate goes on after the warm-up: to zero, in a line or a cosine, or as it is.",
    )
    weight_averaging: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the steps, the last ones, whose weights are averaged into the adapter; 0: the last "
        "step's alone. Goes with TAGGER_TRAIN_LR_SCHEDULER_TYPE=constant.",
    )
    precision: Literal["auto", "fp16", "bf16", "fp32"] = Field(
        "auto", description="Arithmetic: auto takes bf16 on GPUs that have it, fp16 on older ones, fp32 on CPUs."
    )
    completion_only_loss: bool = Field(
        True, description="Compute the loss on the tags alone; false: on the text too, as the original notebook does."
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Gradient checkpointing, which recomputes activations to save memory; auto: only if the longest "
        "example does not fit otherwise.",
    )
    logging_steps: int = Field(25, ge=1, le=10**9, description="Steps between two entries of the loss history.")
    save_steps: int = Field(50, ge=1, le=10**9, description="Steps between two checkpoints.")
    save_minutes: float = Field(
        10, gt=0, le=1440, description="A checkpoint is also made when the last one is this old."
    )
    save_total_limit: int = Field(2, ge=1, le=1000, description="Checkpoints that are kept: the newest ones.")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of adapters, dropout and order of examples.")

    @field_validator("micro_batch_tokens", mode="before")
    @classmethod
    def _auto_is_none(cls, value: object) -> object:
        return None if value == "auto" else value


class Eval(SettingsGroup):
    limit: int | None = Field(None, ge=1, le=10**9, description="Evaluate on this many held-out examples at most.")
    gate: Literal["off", "floor", "published"] = Field(
        "off",
        description="Publish always (off), from a micro-F1 of TAGGER_EVAL_MIN_F1 on (floor), or if besides it is shown "
        "to be no worse than the published adapter (published).",
    )
    min_f1: float = Field(0.0, ge=0, le=1, description="Lowest micro-F1 that the gate lets through.")
    tolerance: float = Field(
        0.0, ge=0, le=1, description="How much lower than the published adapter's the micro-F1 may be."
    )


class Hub(SettingsGroup):
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = Field(
        None,
        description="Model repo to publish to, owner/name; empty: the token's user and <base name>-tagger.",
    )
    push: Literal["auto", "always", "never"] = Field(
        "auto", description="Publish when there is a token (auto), always (refused without one), or never."
    )
    private: bool = Field(True, description="Whether the repo is created private.")
    commit_message: Identifier = Field("basic training", description="First line of the commit's message.")
    revision: Identifier | None = Field(None, description="Branch to publish to and to sample from.")
    retry_minutes: float = Field(
        10, ge=0, le=1440, description="How long a push keeps trying when the Hub fails in a way that may pass."
    )
    merge: bool = Field(
        False, description="Also publish the adapter merged into the unquantized base, in merged/, for other servers."
    )


class Sample(SettingsGroup):
    prompts: TextList = Field(
        ("“Training models with PEFT and LoRa is cool”",),
        description="JSON list of texts to tag after the run.",
    )
    input: Path | None = Field(None, description="File of further texts to tag, one a line.")
    output: Path | None = Field(None, description="File that also gets the answers, as JSON lines.")
    max_new_tokens: int = Field(
        50, ge=1, le=4096, description="Most tokens of one answer; a tag that is not whole by then is left out."
    )
    vocabulary: Identifier | None = Field(
        None,
        description="Tags an answer may hold: open (any), seen (those that were trained on), or a file with one a "
        "line; empty: as the adapter was published, and when training open.",
    )
    decoding: Literal["greedy", "marginal"] | None = Field(
        None,
        description="list: the list that the model writes, each token the likeliest; likely: every tag of the "
        "vocabulary that is likely enough to be in the list, best with TAGGER_DATA_TAG_ORDER=shuffled; empty: as the "
        "adapter was published, and when training list.",
    )
    threshold: Threshold | None = Field(
        None,
        description="Confidence (a tag's probability) below which a tag is left out; auto: the best one on "
        "TAGGER_DATA_CALIBRATION_SIZE training examples that are not trained on; empty: as the adapter was published, "
        "and when training 0.",
    )
    max_tags: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Most tags of an answer; empty: as the adapter was published, and when training 20."
    )
    max_positions: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None,
        description="Places of the list that TAGGER_SAMPLE_DECODING=marginal looks at, which a threshold belongs to: 1 "
        "is faster and less right; empty: as the adapter was published, and when training 20.",
    )
    batch_size: int = Field(16, ge=1, le=65536, description="Texts in one forward pass when tagging.")


class Run(SettingsGroup):
    dir: Path = Field(Path("runs"), description="Folder of the runs.")
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=128)] | None = Field(
        None, description="Name of the run's folder; empty: base model, and a digest of settings and data."
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto",
        description="Where to compute: auto takes a GPU if there is one, and else the CPU for a base model of at most "
        "250 million parameters.",
    )
    processes: int = Field(1, ge=1, le=1, description="Processes that train together, one a GPU; only 1 for now.")


class Modal(SettingsGroup):
    gpu: Annotated[str, AfterValidator(parse_gpus)] = Field(
        "L4,A10,T4", description="GPU asked for on Modal; a comma-separated list gives fallbacks."
    )
    timeout_hours: float = Field(
        6, ge=0.01, le=24, description="Longest time of one attempt on Modal; the next one goes on from there."
    )
    secret: ModalName = Field("huggingface", description="Modal secret that holds HF_TOKEN.")
    runs_volume: ModalName = Field("tagger-runs", description="Modal volume for the runs.")
    cache_volume: ModalName = Field("tagger-cache", description="Modal volume for the Hugging Face cache.")
    cron: Annotated[str, AfterValidator(_cron)] = Field(
        "23 4 * * 1", description="When a deployed app retrains, as five cron fields in UTC; never: not by itself."
    )

    @model_validator(mode="after")
    def _two_volumes(self) -> Modal:
        if self.runs_volume == self.cache_volume:
            raise ValueError(
                f"TAGGER_MODAL_RUNS_VOLUME and TAGGER_MODAL_CACHE_VOLUME are both {self.runs_volume}; name two volumes"
            )
        return self


class Settings(BaseSettings):
    """The job's configuration. Build it with `load`, which also refuses unknown names."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,
    )

    base: Base = Base()
    data: Data = Data()
    lora: Lora = Lora()
    train: Train = Train()
    eval: Eval = Eval()
    hub: Hub = Hub()
    sample: Sample = Sample()
    run: Run = Run()
    modal: Modal = Modal()

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        if self.data.max_length < self.sample.max_new_tokens + 8:
            raise ValueError(
                f"TAGGER_DATA_MAX_LENGTH={self.data.max_length} leaves no room for a text beside "
                f"TAGGER_SAMPLE_MAX_NEW_TOKENS={self.sample.max_new_tokens}; make it at least 8 more"
            )
        if self.sample.decoding == "marginal" and self.sample.vocabulary == "open":
            raise ValueError(
                "TAGGER_SAMPLE_DECODING=marginal asks how likely each tag of a vocabulary is, and "
                "TAGGER_SAMPLE_VOCABULARY is open; set it to seen or to a file of tags"
            )
        if self.run.device == "cpu" and self.train.precision == "fp16":
            raise ValueError(
                "TAGGER_TRAIN_PRECISION=fp16 needs a GPU and TAGGER_RUN_DEVICE is cpu; use auto, fp32 or bf16"
            )
        return self

    def values(self) -> dict[str, Any]:
        """Every variable's name and its value as JSON types. None of them is a secret."""
        dumped = self.model_dump(mode="json")
        return {name: dumped[group][knob] for name, group, knob in iter_fields()}

    def result_values(self) -> dict[str, Any]:
        """The values that change what a run trains or measures: those that identify it."""
        return {name: value for name, value in self.values().items() if _changes_result(name)}

    def with_revisions(self, *, base: str | None, data: str | None) -> Settings:
        """The same settings with these commit hashes as revisions of base model and data set."""
        groups = {
            "base": self.base.model_copy(update={"revision": base or self.base.revision}),
            "data": self.data.model_copy(update={"revision": data or self.data.revision}),
        }
        return self.model_copy(update=groups)

    def with_result_values(self, values: Mapping[str, Any]) -> Settings:
        """These settings, but with another run's values for all that identifies a run."""
        groups = self.model_dump()
        for name, group, knob in iter_fields():
            if _changes_result(name) and name in values:
                groups[group][knob] = values[name]
        try:
            return Settings.model_validate(groups)
        except ValidationError as error:
            problems = [describe_error(detail, {}) for detail in error.errors(include_url=False)]
            raise InvalidInputError(
                *(f"with the settings of the run that trained it: {problem}" for problem in problems)
            ) from None

    def with_published_decoding(self) -> Settings:
        """These settings without those that would have an adapter decoded otherwise than it says itself."""
        own = dict.fromkeys(("vocabulary", "decoding", "threshold", "max_tags", "max_positions"))
        return self.model_copy(update={"sample": self.sample.model_copy(update=own)})

    def digest(self, *more: str) -> str:
        """Eight hexadecimal digits that identify `result_values` and whatever else is given."""
        text = json.dumps([self.result_values(), *more], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def iter_fields() -> Iterator[tuple[str, str, str]]:
    for group, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, SettingsGroup)
        for knob in field.annotation.model_fields:
            yield f"{PREFIX}{group}_{knob}".upper(), group, knob


def _changes_result(name: str) -> bool:
    if name.removeprefix("TAGGER_TRAIN_") in ("LOGGING_STEPS", "SAVE_STEPS", "SAVE_MINUTES", "KEEP"):
        return False
    if name.startswith("TAGGER_SAMPLE_"):
        return name.removeprefix("TAGGER_SAMPLE_") not in ("PROMPTS", "INPUT", "OUTPUT")
    return name.startswith(("TAGGER_BASE_", "TAGGER_DATA_", "TAGGER_LORA_", "TAGGER_TRAIN_", "TAGGER_EVAL_LIMIT"))


def to_env(value: object) -> str:
    """A value as one would write it in the environment."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def describe_error(detail: Any, source_of: Mapping[str, str]) -> str:
    """One sentence for one of pydantic's errors: variable, value, what is allowed."""
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    path = [str(part) for part in detail["loc"] if not isinstance(part, int)]
    if len(path) < 2:
        return str(message)
    name = PREFIX + "_".join(path[:2]).upper()
    source = source_of.get(name, "environment")
    where = "" if source == "environment" else f" (in {source})"
    expected = message if message.startswith(("expected", "a text")) else f"expected {message[0].lower()}{message[1:]}"
    return f"{name}={to_env(detail['input'])}{where}: {expected}."
