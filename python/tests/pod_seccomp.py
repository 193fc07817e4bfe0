"""The seccomp profile of a pod that says `RuntimeDefault`, as near as tests need it.

Container runtimes allow a list of system calls, and refuse the rest. This refuses a list and allows
the rest: what runtimes' defaults are known to refuse a process without capabilities, and what is
so new that lists in use do not know it (`ENOSYS` there). So it refuses no less of what tierkeep and
its hosts could miss: io_uring, keys, NUMA's policies, namespaces, userfaultfd, cachestat.
"""

from __future__ import annotations

import ctypes
import errno

_LIBRARY = "libseccomp.so.2"
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_EQUAL, _MASKED_EQUAL = 4, 7

_REFUSED = """
    _sysctl acct add_key adjtimex bpf chroot clock_adjtime clock_settime create_module delete_module
    fanotify_init finit_module fsconfig fsmount fsopen fspick get_kernel_syms get_mempolicy
    init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load
    kexec_load keyctl lookup_dcookie mbind migrate_pages mount mount_setattr move_mount move_pages
    nfsservctl open_by_handle_at open_tree perf_event_open pivot_root query_module quotactl
    quotactl_fd reboot request_key set_mempolicy set_mempolicy_home_node setdomainname sethostname
    setns settimeofday stime swapoff swapon sysfs umount umount2 unshare uselib userfaultfd ustat
    vhangup vm86 vm86old
"""
# Lists in use may end before any of these.
_TOO_NEW = """
    cachestat clone3 fchmodat2 futex_requeue futex_wait futex_waitv futex_wake listmount listxattrat
    map_shadow_stack memfd_secret mseal process_mrelease statmount
"""
_NEW_NAMESPACES = 0x7E020000  # The flags of clone that make any.
_SOCKETS = (38, 40)  # AF_ALG and AF_VSOCK.


class _Argument(ctypes.Structure):
    _fields_ = (
        ("index", ctypes.c_uint),
        ("compare", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


class Filter:
    """Loaded before what it is for: the library is the host's."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(_LIBRARY)
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(_ALLOW))
        assert self._context, _LIBRARY
        for name in _REFUSED.split():
            self._refuse(name, errno.EPERM)
        for name in _TOO_NEW.split():
            self._refuse(name, errno.ENOSYS)
        for family in _SOCKETS:
            self._refuse("socket", errno.EPERM, _Argument(0, _EQUAL, family, 0))
        for bit in range(_NEW_NAMESPACES.bit_length()):
            if _NEW_NAMESPACES >> bit & 1:
                self._refuse("clone", errno.EPERM, _Argument(0, _MASKED_EQUAL, 1 << bit, 1 << bit))

    def _refuse(self, name: str, why: int, *arguments: _Argument) -> None:
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:  # Too new for the library as well.
            return
        add = self._library.seccomp_rule_add_array
        given = (_Argument * len(arguments))(*arguments)
        done = add(self._context, ctypes.c_uint32(_ERRNO | why), number, len(arguments), given)
        # Calls that this architecture has not are no fault.
        assert done in (0, -errno.EDOM, -errno.EOPNOTSUPP), (name, done)

    def load(self) -> None:
        """In force from here on, also for what is executed."""
        done = self._library.seccomp_load(self._context)
        if done != 0:
            raise OSError(-done, "seccomp_load")
