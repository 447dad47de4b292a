"""Restrict the calling process for good, with Linux seccomp and Landlock. Only the standard library is imported."""

import ctypes
import json
import os
import platform
import struct
import sys
from collections.abc import Iterable, Mapping
from functools import partial

# x86-64 numbers of: socket, connect, bind, listen; ptrace and the memory of other processes; mounts and namespaces;
# keys, bpf, io_uring
OUTSIDE = frozenset(
    (41, 42, 49, 50, 101, 310, 311, 155, 161, 165, 166, 272, 308, 428, 429, 430, 442, 248, 249, 250, 298, 321, 323, 425)
)
"""System calls that workers and programs are refused."""
# fork, vfork, execve, execveat; kill, tkill, tgkill and their siblings; setpgid, setsid; modes, owners and extended
# attributes, which Landlock does not cover
PROCESSES = frozenset((57, 58, 59, 322, 62, 200, 234, 129, 297, 424, 434, 109, 112))
MODES = frozenset((90, 91, 92, 93, 94, 188, 189, 190, 260, 268, 452))
# shared memory, semaphores and queues, which outlive a program; priorities and cores, also those of other processes
LASTING = frozenset((29, 30, 31, 64, 65, 66, 68, 69, 70, 71, 220, 240))
PRIORITIES = frozenset((141, 142, 144, 203, 251, 314))
CLONE, CLONE3, PRLIMIT, CLONE_THREAD = 56, 435, 302, 0x10000
EPERM, ENOSYS = 1, 38
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_NO_NEW_PRIVS, SET_SECCOMP = 1, 4, 38, 22
# Landlock's rights of its first version: execute, write file, read file, read folder, and nine more
EVERY, OF_FILES, READ, READ_WRITE = 0x1FFF, 0b111, 0b1101, 0b110


def seccomp(libc: ctypes.CDLL, refused: Iterable[int], *, processes: bool) -> bool:
    """Refuse system calls. Without ``processes``, also new processes (threads are allowed) and limits of others."""
    if platform.machine() != "x86_64":
        return False
    allow, refuse = 0x7FFF0000, 0x00050000
    load = lambda offset: (0x20, 0, 0, offset)
    answer = lambda value: (0x06, 0, 0, value)
    program = [load(4), (0x15, 1, 0, 0xC000003E), answer(refuse | EPERM)]  # another architecture's calls
    program += [load(0), (0x35, 0, 1, 0x40000000), answer(refuse | EPERM)]
    for number in sorted(refused):
        program += [(0x15, 0, 1, number), answer(refuse | EPERM)]
    if not processes:
        program += [(0x15, 0, 1, CLONE3), answer(refuse | ENOSYS)]  # libc then falls back to clone
        program += [(0x15, 0, 4, CLONE), load(16), (0x45, 1, 0, CLONE_THREAD), answer(refuse | EPERM), answer(allow)]
        program += [(0x15, 0, 4, PRLIMIT), load(16), (0x15, 1, 0, 0), answer(refuse | EPERM), answer(allow)]
    program += [answer(allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    return libc.prctl(SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(header)), 0, 0) == 0


def landlock(libc: ctypes.CDLL, allowed: Mapping[str, int]) -> bool:
    """Refuse all files but those beneath these paths, with the rights to each."""
    create, add, restrict = 444, 445, 446
    rules = libc.syscall(create, struct.pack("Q", EVERY), 8, 0)
    if rules < 0:
        return False
    for path, rights in allowed.items():
        try:
            beneath = os.open(path, os.O_PATH)
        except OSError:
            continue
        of_files = 0b111
        libc.syscall(
            add, rules, 1, struct.pack("=Qi", rights if os.path.isdir(path) else rights & of_files, beneath), 0
        )
        os.close(beneath)
    done = libc.syscall(restrict, rules, 0) == 0
    os.close(rules)
    return done


def confine_worker() -> dict[str, bool]:
    """Refuse this process the network, and writing files outside of the current folder; return what is enforced."""
    return _confine({"/": READ, "/dev/null": READ_WRITE}, OUTSIDE, processes=True)


def confine_program() -> dict[str, bool]:
    """Refuse this process the network, other processes, and all files but the standard library (to read) and those in
    the current folder; return what is enforced."""
    paths = (sys.base_prefix, "/usr", "/lib", "/lib64", "/dev/urandom", "/etc/localtime")
    readable = dict.fromkeys(paths, READ & ~1) | {"/dev/null": READ_WRITE}
    return _confine(readable, OUTSIDE | PROCESSES | MODES | LASTING | PRIORITIES, processes=False)


def _confine(readable: Mapping[str, int], refused: Iterable[int], *, processes: bool) -> dict[str, bool]:
    if sys.platform != "linux":
        return {"landlock": False, "seccomp": False}
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return {
        "landlock": landlock(libc, {**readable, os.getcwd(): EVERY}),
        "seccomp": seccomp(libc, refused, processes=processes),
    }


def set_process_flag(flag: int, value: int) -> None:
    """Call Linux' prctl."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(flag, value, 0, 0, 0)


die_with_parent = partial(set_process_flag, SET_DEATH_SIGNAL, 9)
"""Have the kernel kill this process when its parent ends."""
hide_memory = partial(set_process_flag, SET_DUMPABLE, 0)
"""Refuse the memory of this process to other processes of the user."""


if __name__ == "__main__":
    print(json.dumps(confine_program()))
