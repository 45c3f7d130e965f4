"""Every setting: name, type, default, bounds and description.

`TAGGER_LORA_R` is `settings.lora.r`: the prefix, a group, and a field of that group. `job.config.environment` reads the
values.
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
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from job.cloud.gpus import parse_gpus
from job.config.redaction import MASK, mask_urls
from job.config.validators import (
    Budget,
    CloudName,
    Cron,
    ExampleCount,
    GitRevision,
    Identifier,
    NameList,
    RepoId,
    RunId,
    Separator,
    Shard,
    StoreUrl,
    TextList,
    Threshold,
    TrackerList,
    Webhook,
)
from job.errors import InvalidInputError
from job.types import Decoding

PREFIX = "TAGGER_"
COMMA_SEPARATED = ("TAGGER_LORA_TARGETS", "TAGGER_DATA_TAG_COLUMNS", "TAGGER_TAG_COLUMNS", "TAGGER_RUN_TRACK")
"""Lists that are written with commas in an environment variable; other lists are written as JSON."""
SECRET = ("TAGGER_RUN_NOTIFY",)
"""Settings whose values are shown nowhere."""
EXPECTED = {
    "greater_than_equal": "a value of at least {}",
    "greater_than": "a value above {}",
    "less_than_equal": "a value of at most {}",
    "less_than": "a value below {}",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
    "string_too_long": "at most {} characters",
    "too_short": "at least one name",
}
"""What is allowed, for types of pydantic's errors, with a place for the limit; other types keep pydantic's words."""


class SettingsGroup(BaseModel):
    """Settings of one chapter or concern."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Base(SettingsGroup):
    """Settings of the base model."""

    model: Identifier = Field(
        "bigscience/bloomz-560m",
        description="Base model: a Hub id, a local folder, or a .gguf file "
        "(package:NAME/FILE for a file in an installed Python package).",
    )
    revision: GitRevision | None = Field(None, description="Branch, tag or commit of the base model on the Hub.")
    quantize: Literal["int8", "nf4", "none"] = Field(
        "int8", description="Quantization of the frozen base model: int8, nf4 or none."
    )


class Data(SettingsGroup):
    """Settings of the data set: where it is, how it is split, and how an example is written."""

    dataset: Identifier = Field(
        "Abirate/english_quotes",
        description="Data set: a Hub id; a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, also with .gz or .zst "
        "(package:NAME/FILE for a file in an installed Python package); a folder, a glob, or several files separated "
        "by commas; an s3://, gs://, az:// or hf:// URL; or a folder that save_to_disk wrote.",
    )
    config: Identifier | None = Field(None, description="Configuration (subset) of a data set on the Hub.")
    revision: GitRevision | None = Field(None, description="Branch, tag or commit of the data set on the Hub.")
    split: Identifier | None = Field(
        None, description="Split of a data set on the Hub, or of a folder that save_to_disk wrote; empty: train."
    )
    eval_dataset: Identifier | None = Field(
        None,
        description="Data set of the held-out examples, named like TAGGER_DATA_DATASET. Its texts and their "
        "near-duplicates are left out of training.",
    )
    eval_split: Identifier | None = Field(
        None,
        description="Split of the held-out examples, in TAGGER_DATA_EVAL_DATASET if that is set, otherwise in "
        "TAGGER_DATA_DATASET.",
    )
    text_column: Identifier = Field(
        "quote",
        description="Column with the text. Several columns, separated by commas, are joined by line feeds; a.b is the "
        "field b of the records in column a.",
    )
    tags_column: Identifier = Field(
        "tags",
        description="Column with the tags: lists, mappings of tags to true or false, strings with a list in the "
        "notation of JSON, Python or numpy, or strings with TAGGER_DATA_TAG_DELIMITER between the tags; a.b is the "
        "field b of the records in column a.",
    )
    tag_columns: NameList | None = Field(
        None,
        min_length=1,
        description="One-hot columns instead of TAGGER_DATA_TAGS_COLUMN, separated by commas: each is a tag, and its "
        "values say which texts have it.",
    )
    tag_delimiter: str = Field(
        ",",
        min_length=1,
        max_length=8,
        description=r"Text between the tags of a cell, such as ; or | or ><; \n: a line feed, \t: a tab, \s: a space.",
    )
    max_skipped: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Largest fraction of the rows that may be skipped because they have no text or no tags.",
    )
    separator: Separator = Field(
        " ->: ",
        description="Separator between a text and its tags; a space is added on a side that has no white space.",
    )
    max_length: int = Field(
        512,
        ge=16,
        le=65536,
        description="Maximum tokens per example; a longer text is truncated, its tags never are.",
    )
    eval_size: ExampleCount = Field(
        0.1,
        gt=0,
        description="Examples held out for evaluation: a fraction below 1, or a number of examples. With a fraction, "
        "new data never moves an example to the other side of the split.",
    )
    calibration_size: ExampleCount = Field(
        0.1,
        gt=0,
        description="Training examples set aside to choose the threshold, only with TAGGER_SAMPLE_THRESHOLD=auto: "
        "a fraction below 1, or a number of examples.",
    )
    tag_order: Literal["given", "frequency", "shuffled"] = Field(
        "given",
        description="Order of an example's tags in training: given (as in the data), frequency (most frequent first), "
        "or shuffled (a new order in each epoch).",
    )
    min_tag_count: int = Field(
        1,
        ge=1,
        le=10**9,
        description="Drop tags that occur in fewer training examples than this (an example keeps its tags if none "
        "would be left).",
    )
    limit: int | None = Field(
        None, ge=2, le=10**9, description="Use only the first examples of the data, at most this many."
    )
    seed: int = Field(
        42, ge=0, lt=2**32, description="Random seed of the held-out split; independent of TAGGER_TRAIN_SEED."
    )

    @model_validator(mode="after")
    def _training_examples_left(self) -> Data:
        if self.limit is not None and self.eval_size >= self.limit:
            raise ValueError(
                f"TAGGER_DATA_EVAL_SIZE={self.eval_size:g} holds out all of TAGGER_DATA_LIMIT={self.limit} examples; "
                "lower the first or raise the second"
            )
        return self


class Lora(SettingsGroup):
    """Settings of the LoRA adapters."""

    r: int = Field(16, ge=1, le=1024, description="Rank of the LoRA matrices.")
    alpha: float = Field(
        32, gt=0, le=65536, description="LoRA scaling: the adapters' output is multiplied by alpha / r."
    )
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout probability on the adapters' input.")
    targets: NameList | None = Field(
        None,
        min_length=1,
        description="Comma-separated names of the modules that get adapters, or all-linear; empty: peft's defaults for "
        "the architecture (its attention projections), or all linear layers where peft has none.",
    )
    use_rslora: bool = Field(
        False, description="Scale the adapters' output by alpha / sqrt(r) instead of alpha / r (rank-stabilized LoRA)."
    )
    use_dora: bool = Field(
        False, description="Train the norms of the weights too (weight-decomposed LoRA); slower, not for experts."
    )
    init: Literal["true", "gaussian", "orthogonal"] = Field(
        "true",
        description="Initial adapters, peft's init_lora_weights: true (B is zero, A uniform), gaussian (A is normal), "
        "or orthogonal (an even rank, and TAGGER_BASE_QUANTIZE=none).",
    )

    @field_validator("init", mode="before")
    @classmethod
    def _keeps_the_base_model(cls, value: object) -> object:
        name = str(value).lower()
        if name.startswith(("pissa", "olora", "corda", "loftq")):
            raise ValueError(
                f"expected true, gaussian or orthogonal: {name.split('_')[0]} changes the weights of the base model, "
                "so that the adapter would not fit the published one"
            )
        if name.startswith(("eva", "lora_ga")):
            raise ValueError(
                f"expected true, gaussian or orthogonal: {name} needs a pass over the data before training"
            )
        return name if isinstance(value, (str, bool)) else value


class Train(SettingsGroup):
    """Settings of the training loop."""

    max_steps: int = Field(200, ge=1, le=10**9, description="Number of optimizer steps.")
    batch_size: int = Field(
        4,
        ge=1,
        le=65536,
        description="Examples per optimizer step = this x TAGGER_TRAIN_GRADIENT_ACCUMULATION_STEPS; "
        "TAGGER_TRAIN_MICRO_BATCH_TOKENS decides how they are split into micro-batches.",
    )
    gradient_accumulation_steps: int = Field(4, ge=1, le=65536, description="See TAGGER_TRAIN_BATCH_SIZE.")
    micro_batch_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = Field(
        None,
        description="Maximum tokens per forward pass; a longer example is computed alone. Changes memory use and "
        "speed, never the effective batch; auto or empty: chosen to fit the device, halved when memory runs out.",
    )
    warmup_steps: int = Field(
        100, ge=0, le=10**9, description="Optimizer steps in which the learning rate rises from zero to its peak."
    )
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Learning rate after the warm-up: linear or cosine decay to zero, or constant."
    )
    weight_averaging: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Average the adapter's weights over this last fraction of the steps; 0: no averaging. Use it with "
        "TAGGER_TRAIN_LR_SCHEDULER_TYPE=constant.",
    )
    precision: Literal["auto", "fp16", "bf16", "fp32"] = Field(
        "auto",
        description="Compute precision; auto: bf16 on GPUs that support it, fp16 on older GPUs; on CPUs bf16 with AMX, "
        "else fp32.",
    )
    completion_only_loss: bool = Field(
        True,
        description="Compute the loss on the tags only; false: also on the text, as the original notebook does.",
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Gradient checkpointing, which recomputes activations to save memory; auto: only if the longest "
        "example does not fit without it.",
    )
    logging_steps: int = Field(25, ge=1, le=10**9, description="Optimizer steps between two entries of the loss log.")
    save_steps: int = Field(50, ge=1, le=10**9, description="Optimizer steps between two checkpoints.")
    save_minutes: float = Field(
        10, gt=0, le=1440, description="Also write a checkpoint when the last one is this many minutes old."
    )
    save_total_limit: int = Field(
        2, ge=1, le=1000, description="Number of checkpoints to keep; the oldest ones are deleted."
    )
    seed: int = Field(
        42, ge=0, lt=2**32, description="Random seed of the adapters' initial weights, dropout and example order."
    )

    @property
    def examples_per_step(self) -> int:
        """Return the examples of an optimizer step, the effective batch size."""
        return self.batch_size * self.gradient_accumulation_steps

    @field_validator("micro_batch_tokens", mode="before")
    @classmethod
    def _auto_is_none(cls, value: object) -> object:
        return None if value == "auto" else value


class Eval(SettingsGroup):
    """Settings of the evaluation and of the gate that decides whether to publish."""

    limit: int | None = Field(None, ge=1, le=10**9, description="Evaluate on at most this many held-out examples.")
    gate: Literal["off", "floor", "published"] = Field(
        "off",
        description="off: always publish. floor: require micro-F1 >= TAGGER_EVAL_MIN_F1. published: also require "
        "non-inferiority to the published adapter.",
    )
    min_f1: float = Field(
        0.0, ge=0, le=1, description="Minimum micro-F1 to publish, with TAGGER_EVAL_GATE=floor or published."
    )
    tolerance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How far the micro-F1 may fall below the published adapter's, with TAGGER_EVAL_GATE=published.",
    )
    embedder: Identifier | None = Field(
        None,
        description="Sentence embedding model to compare with, by a linear classifier on its embeddings: a Hub id such "
        "as sentence-transformers/all-MiniLM-L6-v2, or a folder; empty: none.",
    )
    embedder_revision: GitRevision | None = Field(
        None, description="Commit, tag or branch of the embedding model on the Hub; empty: the newest commit."
    )


class Hub(SettingsGroup):
    """Settings of publishing to the Hugging Face Hub."""

    repo: RepoId | None = Field(
        None,
        description="Model repo to publish to, as owner/name; empty: the token's user, and the name of the base model "
        "followed by -tagger.",
    )
    push: Literal["auto", "always", "never"] = Field(
        "auto",
        description="auto: publish if there is a token. always: refuse to run without one. never: do not publish.",
    )
    private: bool = Field(True, description="Create the repo as a private one.")
    commit_message: Identifier = Field("basic training", description="First line of the commit message.")
    revision: GitRevision | None = Field(None, description="Branch to publish to and to load a published adapter from.")
    retry_minutes: float = Field(
        10, ge=0, le=1440, description="Keep retrying a push for this many minutes after transient errors of the Hub."
    )
    merge: bool = Field(
        False,
        description="Also publish the adapter merged into the unquantized base model, in merged/, for other inference "
        "servers.",
    )


class Sample(SettingsGroup):
    """Settings of tagging texts (inference)."""

    prompts: TextList = Field(
        ("“Training models with PEFT and LoRa is cool”",),
        description="JSON list of texts to tag at the end of a run.",
    )
    input: Path | None = Field(None, description="File with more texts to tag, one per line.")
    output: Path | None = Field(None, description="File to which the answers are also written, as JSON lines.")
    max_new_tokens: int = Field(
        50, ge=1, le=4096, description="Maximum tokens per answer; a tag that is incomplete by then is dropped."
    )
    vocabulary: Identifier | None = Field(
        None,
        description="Tags that an answer may contain: open (any), seen (the tags in the training examples), or a file "
        "with one tag per line; empty: as saved with the adapter; when training, open with "
        "TAGGER_SAMPLE_DECODING=greedy, else seen.",
    )
    decoding: Decoding | None = Field(
        None,
        description="greedy: the list of tags that greedy decoding writes. marginal: every tag of the vocabulary whose "
        "probability to be in the list reaches the threshold; best with TAGGER_DATA_TAG_ORDER=shuffled. head: every "
        "tag that a linear classifier on the hidden states of the text finds probable, which takes one forward pass; "
        "it is fitted in a training with this setting. With +, a blend: a tag is absent if all parts (tfidf: a "
        "linear classifier on the words) miss it, each with a weight that is found on the calibration examples, which "
        "needs TAGGER_SAMPLE_THRESHOLD=auto. Empty: as saved with the adapter; when training, greedy.",
    )
    threshold: Threshold | None = Field(
        None,
        description="Drop tags whose probability is lower; auto: the best threshold on the "
        "TAGGER_DATA_CALIBRATION_SIZE examples, which are not trained on; empty: as saved with the adapter; when "
        "training, 0.",
    )
    max_tags: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Maximum tags per answer; empty: as saved with the adapter; when training, 20."
    )
    max_positions: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None,
        description="List positions that TAGGER_SAMPLE_DECODING=marginal computes. A threshold is only valid for the "
        "number that it was chosen with; 1 is faster and less accurate; empty: as saved with the adapter; when "
        "training, 20.",
    )
    batch_size: Annotated[int, Field(ge=1, le=65536)] | None = Field(
        None,
        description="Texts per forward pass when tagging; empty: 16 on a CPU, 256 on a GPU. Long texts, and memory "
        "that runs out, make them fewer.",
    )


class Tag(SettingsGroup):
    """Settings of `tagger-job tag`, which tags files of any size."""

    input: Identifier | None = Field(
        None,
        description="What to tag, named like TAGGER_DATA_DATASET: a file, a folder, a glob, several files separated by "
        "commas, an s3://, gs://, az:// or hf:// URL, or a data set on the Hub; -: standard input. The text is in "
        "TAGGER_DATA_TEXT_COLUMN.",
    )
    output: Identifier | None = Field(
        None,
        description="Where the answers go: a .jsonl, .csv or .parquet file, each also with .gz or .zst; a folder or an "
        "s3://, gs:// or az:// URL that ends in / (a name such as out.parquet/ says the format of its parts, else "
        ".jsonl); -: standard output.",
    )
    columns: NameList | None = Field(
        None,
        min_length=1,
        description="Columns of the input that the output has too, separated by commas; empty: all.",
    )
    max_errors: Annotated[ExampleCount, Field(ge=0)] | None = Field(
        None,
        description="Largest number of rows that may remain without an answer (no text, for example), or a fraction "
        "of the rows below 1; empty: any.",
    )
    shard: Shard = Field(
        "auto",
        description="Share of the parts that this worker does first: i/n, i counted from 0; auto: by the variables of "
        "an array job of Kubernetes (write auto/n there), AWS Batch, Cloud Run, Slurm or SkyPilot, else all.",
    )
    part_rows: int = Field(
        1000,
        ge=1,
        le=10**9,
        description="About how many rows a part has. A part is held in memory, and is done again if its worker dies.",
    )
    engine: Literal["local", "ray"] = Field(
        "local",
        description="What schedules the parts: local: this process. ray: actors of a Ray cluster, that of RAY_ADDRESS "
        "or one on this machine (pip install 'tagger-job[ray]').",
    )


class Tune(SettingsGroup):
    """Settings of `tagger-job tune`, which chooses settings on folds of the training data."""

    candidates: Annotated[str, Field(max_length=10_000)] | None = Field(
        None,
        description="What to choose from: recipes, by name or file, separated by commas; or a grid such as "
        "TAGGER_LORA_R=16,64; TAGGER_TRAIN_LEARNING_RATE=1e-4,2e-4, of which each combination is a candidate.",
    )
    folds: int = Field(
        3,
        ge=2,
        le=10,
        description="Parts of the training examples: each candidate is trained without a part and scored on it, for "
        "every part.",
    )


class Run(SettingsGroup):
    """Settings of a run: its folder and the device that it computes on."""

    dir: Path = Field(Path("runs"), description="Folder that holds the runs.")
    id: RunId | None = Field(
        None,
        description="Name of the run's folder; empty: the base model's name and a digest of settings and data.",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto",
        description="Device to compute on; auto: a GPU if there is one, else the CPU for a base model of at most "
        "250 million parameters.",
    )
    processes: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="Processes on this machine that train, evaluate and tag together; auto or empty: one for each "
        "GPU, and one on a CPU. Changes speed, and the result by no more than rounding.",
    )

    store: StoreUrl | None = Field(
        None,
        description="URL of object storage that keeps a copy of each run, so that it resumes on a machine without its "
        "disk: s3://, gs://, az://, hf://buckets/ or file:///, with a prefix; empty: none. Credentials come from the "
        "environment.",
    )
    budget: Budget | None = Field(
        None,
        description="What a run may take over all its attempts: a time such as 90s, 30m or 2h, or US dollars such as "
        "$3 (a shell needs quotes: '$3'). Once it is used up, the run saves its state and ends with code 75; empty: no "
        "limit.",
    )
    price_per_hour: float | None = Field(
        None,
        gt=0,
        le=100_000,
        description="US dollars that this machine costs in an hour, for budget and report; empty: the list price on "
        "Modal of GPUs that it has.",
    )

    track: TrackerList = Field(
        (),
        description="Experiment trackers, separated by commas: wandb, mlflow, tensorboard, trackio. Each is an extra "
        "of the package (pip install 'tagger-job[wandb]') and is set up by its own variables; empty: none.",
    )
    notify: Webhook | None = Field(
        None,
        description="URL that gets one JSON object when a run ends: verdict, exit code, scores, price, commit, what to "
        "do. Incoming webhooks of Slack take it too. It is a secret, and is masked; empty: none.",
    )
    log: Literal["text", "json"] = Field(
        "text",
        description="How standard error is written. text: lines, and progress bars on a terminal. json: a JSON object "
        "for each event, with stable names.",
    )

    @field_validator("processes", mode="before")
    @classmethod
    def _auto_is_none(cls, value: object) -> object:
        return None if value == "auto" else value


class Modal(SettingsGroup):
    """Settings of the job on Modal."""

    gpu: Annotated[str, AfterValidator(parse_gpus)] = Field(
        "L4,A10,T4", description="GPU to request from Modal; a comma-separated list gives fallbacks."
    )
    timeout_hours: float = Field(
        6, ge=0.01, le=24, description="Maximum hours of one attempt on Modal; the next attempt resumes the run."
    )
    secret: CloudName = Field("huggingface", description="Modal secret that holds HF_TOKEN.")
    runs_volume: CloudName = Field("tagger-runs", description="Modal volume for the runs.")
    cache_volume: CloudName = Field("tagger-cache", description="Modal volume for the Hugging Face cache.")
    cron: Cron = Field(
        "23 4 * * 1",
        description="When a deployed app retrains, as five cron fields in UTC; never: no schedule.",
    )

    @model_validator(mode="after")
    def _two_volumes(self) -> Modal:
        if self.runs_volume == self.cache_volume:
            raise ValueError(
                f"TAGGER_MODAL_RUNS_VOLUME and TAGGER_MODAL_CACHE_VOLUME are both {self.runs_volume}; name two volumes"
            )
        return self


class HfJobs(SettingsGroup):
    """Settings of the job on Hugging Face Jobs."""

    image: str | None = Field(
        None,
        pattern=r"^[\w][\w./:@-]*$",
        max_length=512,
        description="Image of this job that Hugging Face Jobs can pull, such as ghcr.io/<owner>/tagger-job:0.2.0.",
    )
    flavor: str = Field(
        "l4x1", pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64, description="Hardware; `hf jobs hardware` lists all."
    )
    timeout_hours: float = Field(
        6, ge=0.05, le=168, description="Maximum hours of one attempt; the next attempt resumes the run."
    )
    attempts: int = Field(3, ge=1, le=10, description="Attempts of a job that fails or is interrupted.")
    namespace: CloudName | None = Field(
        None, description="User or organization that the job belongs to and that pays; empty: the owner of HF_TOKEN."
    )
    bucket: CloudName = Field(
        "tagger-runs", description="Bucket of that namespace that keeps the runs; created, private, if there is none."
    )


class Settings(BaseSettings):
    """The configuration of the job. Build it with `environment.load`, which also refuses unknown names."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,
        env_ignore_empty=True,
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,
    )

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    base: Base = Base()
    data: Data = Data()
    lora: Lora = Lora()
    train: Train = Train()
    eval: Eval = Eval()
    hub: Hub = Hub()
    sample: Sample = Sample()
    tag: Tag = Tag()
    tune: Tune = Tune()
    run: Run = Run()
    modal: Modal = Modal()
    hfjobs: HfJobs = HfJobs()

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.data.max_length < self.sample.max_new_tokens + 8:
            raise ValueError(
                f"TAGGER_DATA_MAX_LENGTH={self.data.max_length} leaves no tokens for a text next to "
                f"TAGGER_SAMPLE_MAX_NEW_TOKENS={self.sample.max_new_tokens}; make it larger by at least 8"
            )
        if self.sample.decoding not in (None, "greedy") and self.sample.vocabulary == "open":
            raise ValueError(
                f"TAGGER_SAMPLE_DECODING={self.sample.decoding} computes a probability for each tag of a vocabulary, "
                "and TAGGER_SAMPLE_VOCABULARY is open; set it to seen or to a file of tags"
            )
        if self.lora.init == "orthogonal" and (self.base.quantize != "none" or self.lora.r % 2):
            raise ValueError(
                "TAGGER_LORA_INIT=orthogonal needs TAGGER_BASE_QUANTIZE=none and an even TAGGER_LORA_R; set both, or "
                "use true or gaussian"
            )
        if self.run.device == "cpu" and self.train.precision == "fp16":
            raise ValueError(
                "TAGGER_TRAIN_PRECISION=fp16 needs a GPU and TAGGER_RUN_DEVICE is cpu; use auto, fp32 or bf16"
            )
        return self

    @property
    def sources(self) -> dict[str, str]:
        """Return where each setting that was set is from: `environment`, or the name of a file."""
        return dict(self._sources)

    def with_sources(self, sources: Mapping[str, str]) -> Settings:
        """Return a copy that says where its settings are from."""
        copy = self.model_copy()
        copy._sources = dict(sources)
        return copy

    def values(self) -> dict[str, Any]:
        """Return the value of every variable, by name, as JSON types, with passwords in URLs masked."""
        dumped = self.model_dump(mode="json")
        values = {name: dumped[group][field] for name, group, field in iter_fields()}
        values |= {name: MASK for name in SECRET if self._value(name) is not None}
        return {name: mask_urls(value) if isinstance(value, str) else value for name, value in values.items()}

    def _value(self, variable: str) -> Any:
        group, field = next((group, field) for name, group, field in iter_fields() if name == variable)
        return getattr(getattr(self, group), field)

    def explicit_names(self) -> set[str]:
        """Return the names of the variables that were set, not those that have their default."""
        groups = {group: getattr(self, group).model_fields_set for group in type(self).model_fields}
        return {name for name, group, field in iter_fields() if field in groups[group]}

    def result_values(self) -> dict[str, Any]:
        """Return the values that change what a run trains or measures. They identify the run."""
        return {name: value for name, value in self.values().items() if changes_result(name)}

    def with_revisions(self, *, base: str | None, data: str | None, embedder: str | None = None) -> Settings:
        """Return a copy with these commits as revisions of base model, data set, embedding model; None keeps one."""
        groups = {
            "base": self.base.model_copy(update={"revision": base or self.base.revision}),
            "data": self.data.model_copy(update={"revision": data or self.data.revision}),
            "eval": self.eval.model_copy(update={"embedder_revision": embedder or self.eval.embedder_revision}),
        }
        return self.model_copy(update=groups)

    def with_result_values(self, values: Mapping[str, Any]) -> Settings:
        """Return a copy with another run's values for the settings that identify a run.

        Raises InvalidInputError when the other run's values do not fit the rest.
        """
        groups = self.model_dump()
        for name, group, field in iter_fields():
            if changes_result(name) and name in values:
                groups[group][field] = values[name]
        try:
            return Settings.model_validate(groups).with_sources(self._sources)
        except ValidationError as error:
            problems = [describe_error(detail, {}) for detail in error.errors(include_url=False)]
            raise InvalidInputError(
                *(f"with the settings of the run that trained it: {problem}" for problem in problems)
            ) from None

    def with_published_decoding(self) -> Settings:
        """Return a copy that leaves decoding to the configuration saved with the adapter."""
        unset = dict.fromkeys(("vocabulary", "decoding", "threshold", "max_tags", "max_positions"))
        return self.model_copy(update={"sample": self.sample.model_copy(update=unset)})

    def digest(self, *more: str) -> str:
        """Return the first 8 hexadecimal digits of a SHA-256 over `result_values` and `more`."""
        text = json.dumps([self.result_values(), *more], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def iter_fields() -> Iterator[tuple[str, str, str]]:
    """Yield each setting as the name of its variable, its group and its field."""
    for group, info in Settings.model_fields.items():
        assert isinstance(info.annotation, type) and issubclass(info.annotation, SettingsGroup)
        for field in info.annotation.model_fields:
            yield f"{PREFIX}{group}_{field}".upper(), group, field


def default_values() -> dict[str, Any]:
    """Return the default of every variable, by name, as JSON types; the environment is not read."""
    groups = {name: info.default.model_dump(mode="json") for name, info in Settings.model_fields.items()}
    return {name: groups[group][field] for name, group, field in iter_fields()}


def changes_result(name: str) -> bool:
    """Return whether a setting changes what a run trains or measures."""
    if name.removeprefix("TAGGER_TRAIN_") in ("LOGGING_STEPS", "SAVE_STEPS", "SAVE_MINUTES", "SAVE_TOTAL_LIMIT"):
        return False
    if name == "TAGGER_DATA_MAX_SKIPPED":  # a limit: data within it is used as it is
        return False
    if name.startswith("TAGGER_SAMPLE_"):
        return name.removeprefix("TAGGER_SAMPLE_") not in ("PROMPTS", "INPUT", "OUTPUT")
    return name.startswith(("TAGGER_BASE_", "TAGGER_DATA_", "TAGGER_LORA_", "TAGGER_TRAIN_", "TAGGER_EVAL_LIMIT"))


def to_env(value: object, name: str = "") -> str:
    """Return the value of a setting as it is written in an environment variable; None is the empty text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) if name in COMMA_SEPARATED else json.dumps(value, ensure_ascii=False)
    return str(value)


def describe_error(detail: Any, source_of: Mapping[str, str]) -> str:
    """Return one of pydantic's errors as a sentence: variable, value, file if it is in one, what is allowed."""
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if detail["type"] in EXPECTED:
        limit = next(iter(detail.get("ctx", {}).values()), None)
        message = EXPECTED[detail["type"]].format(to_env(limit))
    path = [str(part) for part in detail["loc"] if not isinstance(part, int)]
    if len(path) < 2:
        return str(message)
    name = PREFIX + "_".join(path[:2]).upper()
    source = source_of.get(name, "environment")
    where = "" if source == "environment" else f" (in {source})"
    if not message.startswith(("expected", "a text", "only")):
        message = f"expected {message[0].lower()}{message[1:]}"
    # a quote that is not closed makes the next lines of a file, which may be secrets, part of the value
    value, *more = [MASK] if name in SECRET else to_env(detail["input"], name).splitlines() or [""]
    return f"{name}={value}{'...' if more else ''}{where}: {message}."
