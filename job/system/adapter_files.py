"""Check the files of an adapter before peft reads them: a repo may hold what anybody has written.

Only plain LoRA is accepted: peft's other methods and fields can import modules, read other weights, match names by
regular expressions of any cost, or change the base model.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    import peft

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20
MAX_MODULES = 10_000
"""The most names of modules, and the most modules with a rank or alpha of their own."""
MAX_WEIGHT_BYTES = 16 * 2**30

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,256}$")]
"""The name of a module. In peft's patterns the dot stands for any character, which costs nothing."""
_Parameter = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")]
_Rank = Annotated[int, Field(ge=1, le=4096)]
_Alpha = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]

_LORA_WEIGHT = re.compile(r"\.(?:lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?)$")


class AdapterConfig(BaseModel):
    """The fields of adapter_config.json that may have a value; all others must be empty or have peft's default."""

    model_config = ConfigDict(extra="allow")

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: Annotated[str, Field(max_length=1024)] | None = None
    revision: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,255}$")] | None = None
    """Revision of the base model; not refs/pr/..., which anybody can make."""
    r: _Rank = 8
    lora_alpha: _Alpha = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    target_modules: Annotated[list[_Name], Field(max_length=MAX_MODULES)]
    target_parameters: Annotated[list[_Parameter], Field(max_length=100)] | None = None
    """Names of parameters with the weights of all experts of a layer; other parameters belong to a module."""
    rank_pattern: Annotated[dict[_Name, _Rank], Field(max_length=MAX_MODULES)] | None = None
    alpha_pattern: Annotated[dict[_Name, _Alpha], Field(max_length=MAX_MODULES)] | None = None
    bias: Literal["none"] = "none"
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    """Only how new weights begin; peft's other ways change the weights of the base model."""
    inference_mode: bool = False
    peft_version: Annotated[str, Field(max_length=100)] | None = None

    @model_validator(mode="after")
    def _nothing_else(self) -> AdapterConfig:
        import peft

        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules: expected at least one name")
        if {"weight", "bias"} & {*(self.target_parameters or ())}:
            raise ValueError("target_parameters: expected parameters of experts, not those of every module")
        defaults = {
            field.name: None if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(peft.LoraConfig)
        }
        for name, value in (self.model_extra or {}).items():
            if value not in (None, False, [], {}, "") and value != defaults.get(name):
                raise ValueError(f"{name[:100]}: only plain LoRA is read, for which this field is empty")
        return self

    def to_peft(self) -> peft.LoraConfig:
        """Return the configuration for peft, made of the checked fields alone."""
        import peft

        unused = {"peft_type", "peft_version", *(self.model_extra or {})}
        fields = self.model_dump(exclude=unused, exclude_none=True)
        return peft.LoraConfig(**fields)


def read_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json of a folder; raises OSError or ValueError, with the field that was refused."""
    with (folder / CONFIG_NAME).open("rb") as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(f"{CONFIG_NAME} has more than {MAX_CONFIG_BYTES} bytes")
    return AdapterConfig.model_validate_json(content)


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in the weights of a folder, from the header of the file alone.

    Raises OSError, SafetensorError, or ValueError for a file that is too large or has weights that are not LoRA's: peft
    would load these into the base model.
    """
    from safetensors import safe_open

    size = (folder / WEIGHTS_NAME).stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise ValueError(f"{WEIGHTS_NAME} has {size} bytes, more than any adapter")
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118 - not a dict
    if others := sorted(name for name in shapes if not _LORA_WEIGHT.search(name)):
        raise ValueError(f"{len(others)} weights belong to no LoRA adapter, such as {others[0][:200]}")
    return shapes


def check_weights(model: peft.PeftModel, found: dict[str, tuple[int, ...]]) -> None:
    """Check that a file had exactly the weights of the adapter that was loaded from it.

    peft leaves missing weights as they were made, and passes over others: what answers would not be what was saved.
    Raises ValueError.
    """
    import peft
    import torch

    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{len(missing)} of {len(expected)} weights are missing, such as {missing[0]}")
    if more := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{len(more)} weights belong to no module of the adapter, such as {more[0][:200]}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{name} has the shape {list(found[name])} instead of {list(shape)}")
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"{name} has values that are not finite numbers")
