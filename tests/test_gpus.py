"""The GPUs of Modal: which names are accepted, and what they cost."""

from __future__ import annotations

import pytest

from job.cloud.gpus import GPUS, parse_gpus, price_per_second
from job.config import environment
from job.errors import InvalidInputError


def test_gpus_are_accepted_as_modal_writes_them() -> None:
    assert parse_gpus("h100!:8, a10g,B200+,RTX-PRO-6000") == "H100!:8,A10G,B200+,RTX-PRO-6000"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("L4,V100", "expected T4, L4, "),
        ("A10:5", "such as L4:2 (up to 8; A10 up to 4)"),
        ("L4:", "such as L4:2"),
        ("L4:0", "such as L4:2"),
        (",", "expected the name of a GPU"),
    ],
)
def test_an_unknown_gpu_or_count_is_refused(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setenv("TAGGER_MODAL_GPU", value)
    with pytest.raises(InvalidInputError) as refusal:
        environment.load()
    assert f"TAGGER_MODAL_GPU={value}: " in str(refusal.value)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA L4 in bf16", "L4"),
        ("NVIDIA L40S in bf16", "L40S"),
        ("NVIDIA A100-SXM4-80GB in bf16", "A100-80GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition in bf16", "RTX-PRO-6000"),
        ("Tesla T4 in fp16", "T4"),
    ],
)
def test_a_device_has_the_price_of_its_gpu(device: str, gpu: str) -> None:
    assert price_per_second(device) == GPUS[gpu].dollars_per_second


def test_an_unknown_device_has_no_price() -> None:
    assert price_per_second("NVIDIA of next year in bf16") is None
    assert price_per_second("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
