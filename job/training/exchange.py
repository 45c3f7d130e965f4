"""What the training loop needs from the other processes of a run; a run of one process needs none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch


class Exchange(Protocol):
    """The processes that compute a step together. Process 0 decides and sends, the others receive and answer."""

    rank: int
    size: int
    local_size: int
    """The number of processes on this machine."""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message of JSON types from process 0 to all others."""

    def receive(self) -> dict[str, Any]:
        """Return the next message of process 0."""

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite a tensor on the CPU with that of process 0."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of an int64 tensor over all processes, on process 0; on the others, an arbitrary tensor."""


class SingleProcess:
    """A run of one process: nothing is exchanged."""

    rank, size, local_size = 0, 1, 1

    def send(self, message: Mapping[str, Any]) -> None:
        """Do nothing."""

    def receive(self) -> dict[str, Any]:
        """Raise an error: there is nobody to receive from."""
        raise AssertionError("a single process receives nothing")

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Do nothing."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor itself."""
        return tensor
