"""Run one untrusted Python program: the script of a process of its own, which reads a request from its stdin.

It imports nothing of this package. It limits itself before it runs the program, and the program can't undo that: Linux
seccomp refuses other processes, signals and sockets, and Landlock refuses all files but the standard library (to read)
and the current folder. The parent sets resource limits, and kills the process when its time is over.
"""

import ctypes
import json
import os
import platform
import struct
import sys

# x86-64 numbers of: fork, vfork, execve, execveat; socket, connect, bind, listen; kill, tkill, tgkill and their
# siblings; ptrace and the memory of other processes; mounts and namespaces; keys, bpf, io_uring; modes, owners and
# extended attributes, which Landlock doesn't cover
REFUSED = (
    *(57, 58, 59, 322, 41, 42, 49, 50, 62, 200, 234, 129, 297, 424, 434, 101, 310, 311, 155, 161, 165, 166, 272, 308),
    *(428, 429, 430, 442, 248, 249, 250, 298, 321, 323, 425, 90, 91, 92, 93, 94, 188, 189, 190, 260, 268, 452),
)
CLONE, CLONE3, PRLIMIT, CLONE_THREAD = 56, 435, 302, 0x10000
EPERM, ENOSYS = 1, 38
SET_NO_NEW_PRIVS, SET_SECCOMP = 38, 22


def seccomp(libc: ctypes.CDLL) -> bool:
    """Refuse the system calls of `REFUSED`, new processes (threads are allowed), and limits of other processes."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return False
    allow, refuse = 0x7FFF0000, 0x00050000
    load = lambda offset: (0x20, 0, 0, offset)
    answer = lambda value: (0x06, 0, 0, value)
    program = [load(4), (0x15, 1, 0, 0xC000003E), answer(refuse | EPERM)]  # another architecture's calls
    program += [load(0), (0x35, 0, 1, 0x40000000), answer(refuse | EPERM)]
    for number in REFUSED:
        program += [(0x15, 0, 1, number), answer(refuse | EPERM)]
    program += [(0x15, 0, 1, CLONE3), answer(refuse | ENOSYS)]  # libc then falls back to clone
    program += [(0x15, 0, 4, CLONE), load(16), (0x45, 1, 0, CLONE_THREAD), answer(refuse | EPERM), answer(allow)]
    program += [(0x15, 0, 4, PRLIMIT), load(16), (0x15, 1, 0, 0), answer(refuse | EPERM), answer(allow), answer(allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    return libc.prctl(SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(header)), 0, 0) == 0


def landlock(libc: ctypes.CDLL, readable: list[str], folder: str) -> bool:
    """Refuse all files but those beneath ``readable`` (to read) and ``folder`` (to read and write)."""
    every, reading = 0x1FFF, 0b1100  # the 13 rights of Landlock's first version; read file, read folder
    create, add, restrict = 444, 445, 446
    rules = libc.syscall(create, struct.pack("Q", every), 8, 0)
    if rules < 0:
        return False
    for path, rights in [*((path, reading) for path in readable), (folder, every)]:
        try:
            beneath = os.open(path, os.O_PATH)
        except OSError:
            continue
        allowed = rights if os.path.isdir(path) else 0b100
        libc.syscall(add, rules, 1, struct.pack("=Qi", allowed, beneath), 0)
        os.close(beneath)
    done = libc.syscall(restrict, rules, 0) == 0
    os.close(rules)
    return done


def confine() -> dict[str, bool]:
    """Apply all limits; whether the system enforces each."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux":
        return {"seccomp": False, "landlock": False}
    libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    readable = [sys.base_prefix, "/usr", "/lib", "/lib64", "/dev/null", "/dev/urandom", "/etc/localtime"]
    return {"landlock": landlock(libc, readable, os.getcwd()), "seccomp": seccomp(libc)}


def main() -> None:
    """Confine this process, run the program on standard input, and write its output or results as JSON."""
    request = json.load(sys.stdin)
    null = os.open("/dev/null", os.O_WRONLY)
    enforced = confine()
    if request.get("probe"):
        print(json.dumps(enforced))
        return
    namespace = {"__name__": "__main__"}
    if "stdin" in request:
        import io

        sys.stdin = io.StringIO(request["stdin"])
        exec(compile(request["code"], "<completion>", "exec"), namespace)
        return
    # the program's own output is not the answer
    answers = os.dup(1)
    os.dup2(null, 1)
    exec(compile(request["code"], "<completion>", "exec"), namespace)
    for expression in request["expressions"]:
        try:
            line = {"value": repr(eval(expression, namespace))}
        except BaseException as error:
            line = {"error": type(error).__name__}
        os.write(answers, json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    main()
