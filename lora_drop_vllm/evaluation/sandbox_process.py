"""Process that `sandbox.py` starts: it confines itself, then runs a program.

It reads one JSON object from its input and reports to the file descriptor in its first argument:
the token if the program ran to its end, otherwise the name of the exception. It is started by its
path, so it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import sys
from typing import Any

ALLOWED = """
    read readv pread64 write writev lseek close close_range dup dup2 dup3 fcntl poll ppoll select
    pselect6 stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink
    readlinkat getcwd getdents64 mmap mprotect munmap mremap madvise brk rt_sigaction
    rt_sigprocmask rt_sigreturn sigaltstack alarm setitimer getitimer futex sched_yield
    sched_getaffinity nanosleep clock_nanosleep restart_syscall clock_gettime clock_getres
    gettimeofday time times getrandom getpid getppid gettid getuid geteuid getgid getegid getgroups
    getpgrp getrlimit getrusage sysinfo uname exit exit_group
"""
OPENING = {"open": 1, "openat": 2}  # which argument holds the flags
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# constants of libseccomp's header
ALLOW, REFUSE, MASKED_EQUAL = 0x7FFF0000, 0x00050000, 7


class _Compare(ctypes.Structure):
    """`struct scmp_arg_cmp`: the argument, masked by `mask`, must equal `value`."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    ]


def confine(cpu_seconds: int, memory_bytes: int) -> None:
    """Limits this process; the limits cannot be lifted again.

    Raises:
        OSError: the system lacks libseccomp, or refuses a limit.
    """
    for kind, soft, hard in (
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),  # the signal of the first is ignorable
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(REFUSE | errno.EACCES)))
    reads_only = {name: _Compare(at, MASKED_EQUAL, WRITING, 0) for name, at in OPENING.items()}
    for name in [*ALLOWED.split(), *reads_only]:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            continue  # this architecture has no such call
        compare = reads_only.get(name)
        _check(
            library.seccomp_rule_add_array(
                rules,
                ctypes.c_uint32(ALLOW),
                number,
                0 if compare is None else 1,
                None if compare is None else ctypes.byref(compare),
            )
        )
    _check(library.seccomp_load(rules))


def _check(status: int) -> None:
    if status < 0:
        raise OSError(-status, f"libseccomp: {os.strerror(-status)}")


def main() -> None:
    """Runs the program of the input; does not return."""
    report = int(sys.argv[1])
    asked: dict[str, Any] = json.load(sys.stdin)
    token, parts = asked["token"], asked["parts"]
    # bound here, because the program may replace any of them
    run, write, leave = exec, os.write, os._exit
    try:
        confine(asked["cpu_seconds"], asked["memory_bytes"])
    except OSError as error:
        write(report, str(error).encode())
        leave(1)
    said = token
    try:
        codes = [compile(part, "program", "exec") for part in parts]
        namespace: dict[str, Any] = {"__name__": "program"}
        for code in codes:
            run(code, namespace)
    except BaseException as error:
        said = type(error).__name__
    write(report, said.encode())
    leave(0)


if __name__ == "__main__":
    main()
