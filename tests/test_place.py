"""Launchers' variables give a process its place, or are refused with what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.distributed.place import Assignment, Machines, Place, choose_gpu, from_launcher, has_others, machines
from job.errors import InvalidInputError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "1234",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_a_process_of_torchrun_takes_part() -> None:
    assert from_launcher(TORCHRUN) == Place(5, 8, 4, "10.0.0.1", 1234, hosts_store=False, attempt="2")
    plain = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    assert from_launcher(plain) == Place(0, 2, 2, "a", 29500, hosts_store=True)
    assert has_others(TORCHRUN)


@pytest.mark.parametrize("environ", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"JOB_COMPLETION_INDEX": "3"}])
def test_a_process_without_others_is_alone(environ: dict[str, str]) -> None:
    assert from_launcher(environ) is None
    assert machines(environ) == Machines()
    assert not has_others(environ)


def test_each_machine_starts_its_own_processes() -> None:
    expected = Machines(2, 1, "node-0", 29500)
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-0"}
    assert machines(variables) == expected
    assert machines({f"PET_{name}": value for name, value in variables.items()}) == expected
    assert machines({"NNODES": "2", "MASTER_ADDR": "node-0", "JOB_COMPLETION_INDEX": "1"}) == expected
    kubeflow = {"PET_NNODES": "2:2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "7"}
    assert machines(kubeflow | {"PET_NPROC_PER_NODE": "4"}) == Machines(2, 0, "a", 7, processes=4)
    assert machines({"PET_NPROC_PER_NODE": "auto"}) == Machines()


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set; expected a whole number"),
        ({"WORLD_SIZE": "2"}, "RANK is not set; expected a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'; expected a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'; expected a whole number"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 and MASTER_ADDR is not set"),
        ({"NNODES": "2"}, "NNODES=2 and MASTER_ADDR is not set"),
        ({"PET_NNODES": "1:4"}, "PET_NNODES is '1:4'; expected a whole number"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK is not set"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK=2 is not below NNODES=2"),
    ],
)
def test_contradictions_are_refused_by_name(environ: dict[str, str], problem: str) -> None:
    read = from_launcher if {"RANK", "WORLD_SIZE"} & environ.keys() else machines
    with pytest.raises(InvalidInputError, match=problem) as caught:
        read(environ)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("environ", "visible"),
    [
        ({"LOCAL_RANK": "2"}, "2"),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,7"}, "7"),
        ({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "3"}, "3"),
        ({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "3"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": "4,7"}, "4,7"),
    ],
)
def test_a_launchers_process_sees_one_gpu(environ: dict[str, str], visible: str) -> None:
    choose_gpu(environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == visible


def test_an_assignment_survives_its_file(tmp_path: Path) -> None:
    written = Assignment(Place(4, 8, 4, "a", 1), 77, tmp_path, {"settings": {"é": [1, None]}})
    written.write(tmp_path / "assignment.json")
    assert Assignment.read(tmp_path / "assignment.json") == written
    assert written.place(3) == Place(7, 8, 4, "a", 1)
