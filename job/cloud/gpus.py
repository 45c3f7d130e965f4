"""The GPUs that can be rented, with their limits and prices. This module imports nothing from the job."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU as Modal names it."""

    name: str
    max_count: int
    """GPUs of this kind in one container."""
    device_word: str
    """The word that identifies this GPU in the name that its driver reports (`NVIDIA A100-SXM4-80GB`)."""
    dollars_per_second: float


PRICES_AS_OF = "May 2026"
"""When the list prices were looked up."""
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 8, "T4", 0.000164),
        Gpu("L4", 8, "L4", 0.000222),
        Gpu("L40S", 8, "L40S", 0.000542),
        Gpu("A100", 8, "A100", 0.000694),
        Gpu("A100-40GB", 8, "A100", 0.000694),
        Gpu("A100-80GB", 8, "A100", 0.000694),
        Gpu("RTX-PRO-6000", 8, "6000", 0.000842),
        Gpu("H100", 8, "H100", 0.001097),
        Gpu("H100!", 8, "H100", 0.001097),
        Gpu("H200", 8, "H200", 0.001261),
        Gpu("B200", 8, "B200", 0.001736),
        Gpu("B200+", 8, "B200", 0.001736),
        Gpu("A10", 4, "A10", 0.000306),
        Gpu("A10G", 4, "A10G", 0.000306),
    )
}
"""Modal's GPUs (modal.com/docs/guide/gpu, November 2026) and list prices in US dollars (modal.com/pricing).

`!` requests exactly this GPU, `+` this or a newer one; A10G is the former name of A10. The price of an A100 is that of
the one with 80 GB. CPU, memory and a choice of region cost extra.
"""


def price_per_second(device: str) -> float | None:
    """Return the list price in US dollars of a device, by the name that its driver reports; None if unknown.

    A slice of a GPU (`NVIDIA A100-SXM4-40GB MIG 1g.5gb`) has no price here.
    """
    words = re.split(r"[\s-]+", device)
    if "MIG" in words:
        return None
    return next((gpu.dollars_per_second for gpu in GPUS.values() if gpu.device_word in words), None)


def parse_gpus(value: str) -> str:
    """Validate a comma-separated list of GPUs with optional counts, such as `H100:2,A100`; return it in upper case.

    This is needed because Modal accepts any text and refuses it only after it has built the image.
    Raises ValueError with what is allowed.
    """
    wanted = [part.strip().upper() for part in value.split(",") if part.strip()]
    if not wanted:
        raise ValueError("expected the name of a GPU, such as L4")
    for request in wanted:
        name, colon, count = request.partition(":")
        valid_count = not colon or (count.isascii() and count.isdigit() and int(count) >= 1)
        if name not in GPUS or not valid_count or int(count or 1) > GPUS[name].max_count:
            known = ", ".join(GPUS)
            raise ValueError(f"expected {known}, or one of them with a count such as L4:2 (up to 8; A10 up to 4)")
    return ",".join(wanted)
