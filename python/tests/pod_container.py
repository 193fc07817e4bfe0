"""A container runtime for tests: makes one container and is its parent. `pod_run` says which.

    python pod_container.py SPEC.json

It runs in the mounts of the node and in the network of the pod, as root. The container gets a root
file system of its own (a tmpfs with what the image has, bound read-only), new pid, IPC and UTS
namespaces, its own /proc, /sys and /dev, the user, groups and capabilities of the spec and no
others, no_new_privs and a seccomp filter; then it is the command, as pid 1. The output is
the container's pid, and the output ends when it is the command; the exit code is its own,
128 and the signal where one ended it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from pod_seccomp import Filter

LIBC = ctypes.CDLL(None, use_errno=True)
_READ_ONLY, _NO_SUID, _NO_DEV, _NO_EXEC, _REMOUNT, _BIND = 1, 2, 4, 8, 32, 4096
_RECURSIVE, _PRIVATE = 1 << 14, 1 << 18
_NEW_MOUNTS, _NEW_UTS, _NEW_IPC, _NEW_PIDS = 0x20000, 0x4000000, 0x8000000, 0x20000000
_DEATH_SIGNAL, _DROP_BOUNDING, _NO_NEW_PRIVS, _AMBIENT, _AMBIENT_CLEAR = 1, 24, 38, 47, 4
_DETACH = 2
_MOUNT_SETATTR, _HERE, _ALL_BELOW = 442, -100, 0x8000

# As runtimes do: what of /proc a container sees not at all, and what it may not write to.
_MASKED = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug")
_KEPT = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def call(name: str, *arguments: Any) -> None:
    if getattr(LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = [word.encode() or None for word in (source, target, kind)]
    call("mount", *words, ctypes.c_ulong(flags), data.encode() or None)


def bind(source: str, target: str, *, read_only: bool) -> None:
    """A directory or a file, with what is mounted below it."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
    mount(source, target, flags=_BIND | _RECURSIVE)
    if read_only:
        # With what is mounted below it: mount_setattr, which libc may not have yet.
        wish = (ctypes.c_uint64 * 4)(_READ_ONLY | _NO_SUID)
        call("syscall", _MOUNT_SETATTR, _HERE, target.encode(), _ALL_BELOW, wish, 32)


def make_root(spec: dict[str, Any]) -> None:
    """The container's file system, at `root`."""
    root = spec["root"]
    mount("", "/", flags=_RECURSIVE | _PRIVATE)
    mount("image", root, "tmpfs", _NO_SUID, "mode=755,size=64m")
    for path in ("/run", "/tmp", "/var/tmp"):
        os.makedirs(root + path)
        os.chmod(root + path, 0o755 if path == "/run" else 0o1777)
    os.symlink("../run", f"{root}/var/run")
    for path, source in spec["image"].items():
        if os.path.islink(source):
            os.symlink(os.readlink(source), root + path)
        else:
            bind(source, root + path, read_only=True)
    for path, text in spec["files"].items():
        Path(root + path).parent.mkdir(parents=True, exist_ok=True)
        Path(root + path).write_text(text)
    _kernels(root)
    for path, source, read_only in sorted(spec["mounts"]):
        bind(source, root + path, read_only=read_only)
    if spec["read_only"]:
        mount("", root, flags=_REMOUNT | _READ_ONLY | _NO_SUID)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", _DETACH)
    os.chdir("/")


def _kernels(root: str) -> None:
    """/proc, /sys and /dev."""
    for name in ("proc", "sys", "dev"):
        os.makedirs(f"{root}/{name}")
    safe = _NO_SUID | _NO_DEV | _NO_EXEC
    mount("proc", f"{root}/proc", "proc", safe)
    for path in _MASKED:
        if os.path.exists(root + path):
            mount("/dev/null", root + path, flags=_BIND)
    for path in _KEPT:
        if os.path.exists(root + path):
            bind(root + path, root + path, read_only=True)
    mount("sysfs", f"{root}/sys", "sysfs", safe | _READ_ONLY)
    mount("dev", f"{root}/dev", "tmpfs", _NO_SUID, "mode=755,size=64k")
    for name in _DEVICES:
        bind(f"/dev/{name}", f"{root}/dev/{name}", read_only=False)
    for name, to in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")]:
        os.symlink(f"/proc/self/fd{to}", f"{root}/dev/{name}")


def drop(spec: dict[str, Any], seccomp: Filter | None) -> None:
    """The rights that the container is to have, and no others."""
    call("prctl", _AMBIENT, _AMBIENT_CLEAR, 0, 0, 0)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in set(range(last + 1)) - set(spec["capabilities"]):
        call("prctl", _DROP_BOUNDING, capability, 0, 0, 0)
    os.setgroups(spec["groups"])
    os.setresgid(*[spec["gid"]] * 3)
    # A user but root has no capability from here on; root gets at the exec what is bounded.
    os.setresuid(*[spec["uid"]] * 3)
    if spec["no_new_privs"]:
        call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    # What ends this container's parent ends it. (Set last: a new user forgets it.)
    call("prctl", _DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    if seccomp is not None:
        seccomp.load()


def become(spec: dict[str, Any]) -> None:
    """The container's command, from the inside."""
    seccomp = Filter() if spec["seccomp"] else None
    make_root(spec)
    os.chdir(spec["cwd"])
    call("sethostname", spec["hostname"].encode(), len(spec["hostname"].encode()))
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.umask(0o022)
    drop(spec, seccomp)
    os.execvpe(spec["argv"][0], spec["argv"], spec["env"])


def main() -> int:
    spec = json.loads(Path(sys.argv[1]).read_text())
    told = os.dup(1)
    os.dup2(2, 1)  # The log has both.
    call("unshare", _NEW_MOUNTS | _NEW_UTS | _NEW_IPC | _NEW_PIDS)
    pid = os.fork()
    if pid == 0:
        try:  # `told` is closed when it is the command.
            become(spec)
        except BaseException as e:
            os.write(2, f"the container was not made: {type(e).__name__}: {e}\n".encode())
        os._exit(125)
    os.write(told, f"{pid}\n".encode())
    os.close(told)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
