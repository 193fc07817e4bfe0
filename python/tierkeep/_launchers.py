"""What launchers say in a process's environment: which rank it is, and of how many.

There are two kinds of numbers. Some are the process's own: torchrun, mpirun and srun give them to
each one that they start. Others are its pod's (an indexed Job's, a PyTorchJob's, a TrainJob's), and
the process's only where every pod has one. The second kind is never taken for the first where a pod
may have several, and nobody is alone where something says that there are others: processes that all
take themselves for rank 0 of 1 would each write the whole run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tierkeep.errors import InvalidError

#: A rank, how many there are, and who said so.
Found = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class _Pair:
    number: str
    count: str
    #: Who sets them, for people.
    source: str


# Of processes. mpirun is before srun: it may start its daemons through srun, whose numbers are the
# daemons' then, and what they start inherits them.
_OF_PROCESSES = (
    _Pair("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "mpirun"),
    _Pair("PMI_RANK", "PMI_SIZE", "mpiexec"),
    _Pair("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "srun"),
    _Pair("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
)

_TORCHRUN = _Pair("RANK", "WORLD_SIZE", "torchrun")
# torchrun's arguments, as variables: Kubeflow sets them for it.
_NODE = _Pair("PET_NODE_RANK", "PET_NNODES", "PET_NODE_RANK, one process a node")
_EACH = "PET_NPROC_PER_NODE"
_WORKER = _Pair("LWS_WORKER_INDEX", "LWS_GROUP_SIZE", "LeaderWorkerSet")
# Kubernetes says nothing of completions: that has to be in the manifest.
_JOB = _Pair("JOB_COMPLETION_INDEX", "WORLD_SIZE", "indexed Job")

_OTHERWISE = "or give rank= and world_size="


def found(env: Mapping[str, str]) -> Found | None:
    """What the nearest launcher says; None where nothing says that there are others.

    Raises:
        InvalidError: there are others, and which rank this is cannot be known.
    """
    # torchrun first: whoever starts it has a number for it, which its children inherit.
    return _torchrun(env) or _of_processes(env) or _of_pods(env)


def _torchrun(env: Mapping[str, str]) -> Found | None:
    pair = _read(env, _TORCHRUN)
    if pair is None:
        return None
    rank, world = pair
    # A PyTorchJob sets RANK too, the pod's, beside a WORLD_SIZE that counts processes. In what
    # torchrun starts there it is torchrun's.
    if _is_of_pod(env, world):
        raise InvalidError(
            f"RANK = {rank} is this pod's, WORLD_SIZE = {world} counts processes "
            f"({_NODE.count} = {env.get(_NODE.count)!r}, {_EACH} = {env.get(_EACH)!r}): "
            f"start the script with torchrun, {_OTHERWISE}"
        )
    is_torchrun = "TORCHELASTIC_RUN_ID" in env
    return rank, world, _TORCHRUN.source if is_torchrun else "RANK and WORLD_SIZE"


def _is_of_pod(env: Mapping[str, str], world: int) -> bool:
    """Whether RANK is the number of a pod that is to have several processes."""
    if "LOCAL_RANK" in env:
        return False
    nodes, each = env.get(_NODE.count, ""), env.get(_EACH, "")
    if nodes.isdecimal():
        return int(nodes) != world
    return each.isdecimal() and int(each) > 1


def _of_processes(env: Mapping[str, str]) -> Found | None:
    for pair in _OF_PROCESSES:
        # sbatch sets Slurm's for the batch script too, which is no rank. Only srun numbers steps.
        if pair.source == "srun" and not env.get("SLURM_STEP_ID", "").isdecimal():
            continue
        if (read := _read(env, pair)) is not None:
            return *read, pair.source
    return None


def _of_pods(env: Mapping[str, str]) -> Found | None:
    if (nodes := env.get(_NODE.count, "")) != "":
        return _of_nodes(env, nodes)
    if env.get(_WORKER.number):
        return _of_pod(env, _WORKER)
    if env.get(_JOB.number):
        return _of_pod(env, _JOB)
    rank, world = env.get(_TORCHRUN.number, ""), env.get(_TORCHRUN.count, "")
    if rank or world not in ("", "1"):
        there, lacking = ("RANK", "WORLD_SIZE") if rank else ("WORLD_SIZE", "RANK")
        raise InvalidError(
            f"{there} = {rank or world!r} and no {lacking}: there are other ranks, set both, "
            f'or WORLD_SIZE = "1" for none; {_OTHERWISE}'
        )
    return None


def _of_nodes(env: Mapping[str, str], nodes: str) -> Found | None:
    """Of a pod whose torchrun was told what to do, and which is not what torchrun started."""
    # "1:4" is from one to four of them. A second process on one node would not get the rank's lock.
    if nodes.rpartition(":")[2] == "1":
        return None
    if env.get(_EACH) == "1" and nodes.isdecimal() and env.get(_NODE.number):
        return _of_pod(env, _NODE)
    raise InvalidError(
        f"{_NODE.count} = {nodes!r}: this pod is one of several, and {_NODE.number} = "
        f"{env.get(_NODE.number)!r} is its number, not that of a process: "
        f"start the script with torchrun, {_OTHERWISE}"
    )


def _of_pod(env: Mapping[str, str], pair: _Pair) -> Found:
    """A pod's number, where each has one process."""
    if local := env.get("LOCAL_RANK"):
        raise InvalidError(
            f"{pair.number} = {env[pair.number]!r} is this pod's number, LOCAL_RANK = {local!r} "
            f"that of a process in it, and there is no RANK: set RANK and WORLD_SIZE, {_OTHERWISE}"
        )
    read = _read(env, pair)
    if read is not None and read[0] < read[1]:
        return *read, pair.source
    raise InvalidError(
        f"{pair.number} = {env[pair.number]!r}, {pair.count} = {env.get(pair.count)!r}: this pod "
        "may be one of several, and nothing says of how many. In its env, WORLD_SIZE is their "
        "number where they train together, one process each (a Job's completions; in a JobSet of "
        'several Jobs set RANK too); where each trains by itself, RANK is "0" and WORLD_SIZE "1"; '
        f"{_OTHERWISE}"
    )


def _read(env: Mapping[str, str], pair: _Pair) -> tuple[int, int] | None:
    number, count = env.get(pair.number, ""), env.get(pair.count, "")
    if not (number and count):
        return None
    if not (number.isdecimal() and count.isdecimal()):
        raise InvalidError(f"{pair.number} = {number!r}, {pair.count} = {count!r}: whole numbers")
    return int(number), int(count)
