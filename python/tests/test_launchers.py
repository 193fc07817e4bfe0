"""Ranks by the variables that launchers set, as their sources set them."""

from __future__ import annotations

import os

import pytest

import tierkeep
from tierkeep import _ranks

# torch/distributed/elastic/agent/server/local_elastic_agent.py, `_start_workers`.
TORCHRUN = {
    "LOCAL_RANK": "1",
    "RANK": "3",
    "GROUP_RANK": "1",
    "ROLE_RANK": "3",
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpt-workers-0-0.gpt",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RUN_ID": "none",
}


# kubernetes/kubernetes, pkg/controller/job/indexed_job_utils.go, `addCompletionIndexEnvVariable`:
# JOB_COMPLETION_INDEX, and no variable for completions. JobSet makes its Jobs indexed (v0.12.0,
# pkg/webhooks/jobset_webhook.go, `Default`) and sets no variable: the rest are labels.
def job(index: int) -> dict[str, str]:
    return {"JOB_COMPLETION_INDEX": str(index)}


# kubeflow/trainer v2.3.0, pkg/runtime/framework/plugins/torch/torch.go, in a pod of a JobSet.
def torch_runtime(node: int, nodes: int, each: str) -> dict[str, str]:
    return {
        **job(node),
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": each,
        "PET_NODE_RANK": str(node),
        "PET_MASTER_ADDR": "gpt-node-0-0.gpt",
        "PET_MASTER_PORT": "29500",
    }


# The same, plugins/jax/jax.go.
def jax_runtime(node: int, nodes: int) -> dict[str, str]:
    return {
        **job(node),
        "JAX_NUM_PROCESSES": str(nodes),
        "JAX_PROCESS_ID": str(node),
        "JAX_COORDINATOR_ADDRESS": "gpt-node-0-0.gpt:29500",
    }


# kubeflow/trainer v1.9.4, pkg/controller.v1/pytorch/envvar.go, with a master: RANK is the pod's,
# WORLD_SIZE pods times `nprocPerNode`, which counts as 1 where it is "auto", the default.
def pytorch_job(pod: int, pods: int, each: str) -> dict[str, str]:
    return {
        "MASTER_ADDR": "gpt-master-0",
        "MASTER_PORT": "23456",
        "PET_MASTER_ADDR": "gpt-master-0",
        "PET_MASTER_PORT": "23456",
        "WORLD_SIZE": str(pods * (int(each) if each.isdecimal() else 1)),
        "RANK": str(pod),
        "PET_NODE_RANK": str(pod),
        "PET_NPROC_PER_NODE": each,
        "PET_NNODES": str(pods),
    }


# docs.open-mpi.org, "Environment variables set for MPI applications".
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_NODE_RANK": "0",
}

# Of one task a node, which is what mpirun's daemons are.
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "2",
}

# kubernetes-sigs/lws v0.9.0, pkg/utils/pod/pod_utils.go, `AddLWSVariables`.
WORKER = {"LWS_LEADER_ADDRESS": "gpt-0.gpt.team-a", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "2"}

FOUND = {
    "nothing": ({}, (0, 1, "alone")),
    "torchrun": (TORCHRUN, (3, 4, "torchrun")),
    "RANK and WORLD_SIZE": ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8, "RANK and WORLD_SIZE")),
    "no other rank": ({"WORLD_SIZE": "1"}, (0, 1, "alone")),
    "empty": ({"RANK": "", "WORLD_SIZE": "", "JOB_COMPLETION_INDEX": ""}, (0, 1, "alone")),
    "srun": (SRUN, (1, 2, "srun")),
    "sbatch alone": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, "alone")),
    "torchrun, a task a node": ({**SRUN, **TORCHRUN}, (3, 4, "torchrun")),
    "mpirun": (MPIRUN, (2, 4, "mpirun")),
    "mpirun, whose daemons srun has started": ({**SRUN, **MPIRUN}, (2, 4, "mpirun")),
    "torchrun under mpirun": ({**MPIRUN, **TORCHRUN}, (3, 4, "torchrun")),
    # The launcher is a pod of a JobSet (v2.3.0, manifests/base/runtimes/deepspeed_distributed.yaml,
    # runLauncherAsNode).
    "Trainer, mpi, in the launcher's pod": ({**job(0), **MPIRUN}, (2, 4, "mpirun")),
    # mpich's hydra and Intel's MPI, and srun --mpi=pmi2.
    "mpiexec": ({"PMI_RANK": "5", "PMI_SIZE": "6"}, (5, 6, "mpiexec")),
    "indexed Job": ({**job(2), "WORLD_SIZE": "3"}, (2, 3, "indexed Job")),
    "indexed Job of one pod": ({**job(0), "WORLD_SIZE": "1"}, (0, 1, "indexed Job")),
    "indexed Job, each by itself": (
        {**job(2), "RANK": "0", "WORLD_SIZE": "1"},
        (0, 1, "RANK and WORLD_SIZE"),
    ),
    "torchrun in a JobSet": ({**job(1), **TORCHRUN}, (3, 4, "torchrun")),
    "Trainer, torch, torchrun": ({**torch_runtime(1, 2, "2"), **TORCHRUN}, (3, 4, "torchrun")),
    "Trainer, torch, one node, no torchrun": (torch_runtime(0, 1, "8"), (0, 1, "alone")),
    "Trainer, torch, a process a node, no torchrun": (
        torch_runtime(1, 2, "1"),
        (1, 2, "PET_NODE_RANK, one process a node"),
    ),
    "Trainer, jax": (jax_runtime(2, 4), (2, 4, "JAX_PROCESS_ID")),
    "PyTorchJob": (pytorch_job(2, 3, "auto"), (2, 3, "RANK and WORLD_SIZE")),
    "PyTorchJob, torchrun": ({**pytorch_job(1, 2, "2"), **TORCHRUN}, (3, 4, "torchrun")),
    # DeepSpeed's launcher, launcher/launch.py: no word of torchrun's own.
    "PyTorchJob, deepspeed": (
        {**pytorch_job(1, 2, "2"), "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"},
        (3, 4, "RANK and WORLD_SIZE"),
    ),
    "LeaderWorkerSet": (WORKER, (2, 4, "LeaderWorkerSet")),
    "torchrun in a LeaderWorkerSet": ({**WORKER, **TORCHRUN}, (3, 4, "torchrun")),
}

REFUSED = {
    "indexed Job, of how many": (job(2), "JOB_COMPLETION_INDEX = '2'.*WORLD_SIZE is their number"),
    # All the pods of a JobSet whose Jobs have one each have the index 0.
    "the first pod of an indexed Job": (job(0), "JOB_COMPLETION_INDEX = '0'.*completions"),
    "more pods than there are": ({**job(3), "WORLD_SIZE": "3"}, "INDEX = '3', WORLD_SIZE = '3'"),
    "several processes in a pod of a Job": (
        {**job(1), "WORLD_SIZE": "16", "LOCAL_RANK": "3"},
        "INDEX = '1' is this pod's number, LOCAL_RANK = '3'",
    ),
    "several processes in a LeaderWorkerSet's pod": ({**WORKER, "LOCAL_RANK": "1"}, "LWS_WORKER"),
    "Trainer, torch, several nodes, no torchrun": (
        torch_runtime(1, 2, "auto"),
        "PET_NODE_RANK = '1' is its number, not that of a process: start the script with torchrun",
    ),
    "the same, WORLD_SIZE by hand": (
        {**torch_runtime(1, 2, "8"), "WORLD_SIZE": "16"},
        "PET_NODE_RANK = '1' is its number",
    ),
    "PyTorchJob, several processes, no torchrun": (
        pytorch_job(1, 2, "8"),
        "RANK = 1 is this pod's, WORLD_SIZE = 16 counts processes",
    ),
    # envvar.go: without a master there is no rank at all; elastic.go: a range of nodes.
    "PyTorchJob, no master": ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}, "PET_NNODES = '2'"),
    "PyTorchJob, elastic": ({"PET_NNODES": "1:4", "PET_NODE_RANK": "0"}, "PET_NNODES = '1:4'"),
    "RANK alone": ({"RANK": "3"}, "RANK = '3' and no WORLD_SIZE"),
    "RANK 0 alone": ({"RANK": "0"}, "RANK = '0' and no WORLD_SIZE"),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "2"}, "WORLD_SIZE = '2' and no RANK"),
    "no number": ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK = 'zero', WORLD_SIZE = '2': whole"),
    "more than there are": ({"RANK": "2", "WORLD_SIZE": "2"}, "rank = 2, world_size = 2"),
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may be a launcher's."""
    told = {*TORCHRUN, *torch_runtime(0, 1, "1"), *jax_runtime(0, 1), *MPIRUN, *WORKER, "PMI_RANK"}
    for variable in list(os.environ):
        if variable in told or variable.startswith("SLURM_"):
            monkeypatch.delenv(variable)


@pytest.mark.parametrize("name", FOUND)
def test_the_rank_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, expected = FOUND[name]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert _ranks.detect(None, None) == _ranks.Ranks(*expected)
    assert _ranks.detect(5, 6) == _ranks.Ranks(5, 6, "arguments")


@pytest.mark.parametrize("name", REFUSED)
def test_nobody_is_alone_where_something_says_that_there_are_others(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, message = REFUSED[name]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(tierkeep.InvalidError, match=message):
        _ranks.detect(None, None)
    # Whoever knows says it.
    assert _ranks.detect(None, 1) == _ranks.Ranks(0, 1, "arguments")
