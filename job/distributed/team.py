"""Who trains a run: this process alone, with others that a launcher started, or with those of other machines."""

from __future__ import annotations

from dataclasses import dataclass

from job.distributed.place import Machines, Place, from_launcher, machines


@dataclass(frozen=True)
class Team:
    """The others that this process was started with; it may start more by itself."""

    place: Place | None
    """The place among the processes of a launcher; this process then starts none."""
    machines: Machines

    @classmethod
    def find(cls) -> Team:
        """Read the launcher's variables; raises InvalidInputError if they contradict each other."""
        place = from_launcher()
        return cls(place, machines() if place is None else Machines())

    @property
    def leads(self) -> bool:
        """Whether this process has the run's folder, and does what is done once."""
        return self.machines.number == 0 if self.place is None else self.place.rank == 0

    @property
    def alone(self) -> bool:
        return self.place is None and self.machines.count == 1

    def __str__(self) -> str:
        if self.place is not None:
            return f"process {self.place.rank} of {self.place.size}"
        return f"machine {self.machines.number} of {self.machines.count}"
