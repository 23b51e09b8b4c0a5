"""A cell: one process that runs untrusted Python behind walls. A script of the standard library alone.

    python cell.py < JOB      `runner` starts two, a program and its tests, and joins them by two pipes

The first line of the input is the job, in JSON; the cell lives until the input ends, its time is used up or
its work is done, and then prints one line of JSON about it. This process, the warden, raises the walls and
forks; the child, the inmate, does the work. On Linux the walls are namespaces of its own: no network, no
other process in sight, and a file system that holds Python's library, read-only, and an empty folder in
memory. Everywhere: no new process or thread, little memory, small files, a limit of processor time, no
environment.

The tests run in another cell than the program, so a program can spoil its own process and nothing else:

    program   executes the program, then answers calls: {"name", "args", "kwargs"} -> {"value"} or {"error"}
    tests     executes the tests; `from candidate import f` gives a function that asks the other cell

Arguments and results are sent as plain data (`packed`), so a result cannot override `==`. An object that is
not plain stays where it is; the other side holds a `Handle` that it can pass back.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any, NoReturn

LONGEST = 1 << 20  # characters of a message
NOBODY = 65534
DOES_NOT_COMPILE = 3  # exit status of a program that is not Python


# --- plain data ------------------------------------------------------------------------------------------

COLLECTIONS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Handle:
    """An object that stays in the program's cell; its attributes are read and set there."""

    def __init__(self, number: int, ask: Callable[..., Any]):
        self.__dict__.update(_number=number, _ask=ask)

    def __getattr__(self, name: str) -> Any:
        return self._ask(".get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask(".set", self, name, value)


def packed(value: Any, kept: list[Any]) -> Any:
    """`value` as JSON values. What is not plain data is appended to `kept` and sent as its place there."""
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, dict):
        return ["dict", [[packed(k, kept), packed(v, kept)] for k, v in value.items()]]
    if isinstance(value, Handle):
        return ["object", value.__dict__["_number"]]
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return ["type", value.__name__]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    for kind, plain in COLLECTIONS.items():
        if isinstance(value, plain):
            return [kind, [packed(item, kept) for item in value]]
    if isinstance(value, Iterator):
        return ["iterator", [packed(item, kept) for item in value]]
    kept.append(value)
    return ["object", len(kept) - 1]


def unpacked(value: Any, object_at: Callable[[int], Any]) -> Any:
    """The inverse; `object_at` gives an object by its place."""
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {unpacked(k, object_at): unpacked(v, object_at) for k, v in content}
    if kind == "range":
        return range(*content)
    if kind == "object":
        return object_at(content)
    if kind == "type":
        return getattr(builtins, content)
    items = (unpacked(item, object_at) for item in content)
    return items if kind == "iterator" else COLLECTIONS[kind](items)


# --- what an inmate does ---------------------------------------------------------------------------------


def run_program(source: str, asked: Any, answers: Any) -> int:
    """Execute a program, then answer calls until the input ends."""
    try:
        code = compile(source, "program.py", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
        return DOES_NOT_COMPILE
    space: dict[str, Any] = {"__name__": "candidate"}
    exec(code, space)
    space |= {".get": getattr, ".set": setattr}
    kept: list[Any] = []
    for line in asked:
        call = json.loads(line)
        try:
            args, kwargs = (unpacked(call[part], kept.__getitem__) for part in ("args", "kwargs"))
            reply = {"value": packed(space[call["name"]](*args, **kwargs), kept)}
        except Exception as error:
            kind = next(k.__name__ for k in type(error).__mro__ if getattr(builtins, k.__name__, None) is k)
            reply = {"error": kind, "message": str(error)[:1000]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
    return 0


class Gone(BaseException):
    """The program's cell gave no answer that can be read."""


class Candidate(ModuleType):
    """The module `candidate` of the tests: every name is a function that runs in the program's cell."""

    def __init__(self, answers: Any, asked: Any):
        super().__init__("candidate")
        self.__dict__.update(_answers=answers, _asked=asked, _gone=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return partial(self._call, name)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        call = {"name": name, "args": packed(args, []), "kwargs": packed(kwargs, [])}
        try:
            self._asked.write(json.dumps(call) + "\n")
            self._asked.flush()
            reply = json.loads(self._answers.readline(LONGEST))
            error = getattr(builtins, reply["error"]) if "error" in reply else None
            value = None if error else unpacked(reply["value"], lambda place: Handle(place, self._call))
        except Exception:  # it has died, or it writes what no honest program would
            self.__dict__["_gone"] = True
            raise Gone from None
        if error:
            raise (error if issubclass(error, Exception) else Exception)(reply.get("message"))
        return value


def run_tests(source: str, answers: Any, asked: Any) -> bool:
    """Whether the tests pass."""
    candidate = sys.modules["candidate"] = Candidate(answers, asked)
    try:
        exec(compile(source, "tests.py", "exec"), {"__name__": "tests"})
    except BaseException:
        return False
    return not candidate.__dict__["_gone"]


# --- walls -----------------------------------------------------------------------------------------------

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
KEPT_FLAGS = 15  # read-only, nosuid, nodev, noexec: a namespace may not take them from a mount
NO_NEW_PRIVILEGES = 38


class _Kernel:
    """System calls that Python does not have."""

    def __init__(self):
        import ctypes

        self.library, self.errno = ctypes.CDLL(None, use_errno=True), ctypes.get_errno

    def __call__(self, name: str, *args: Any) -> None:
        if getattr(self.library, name)(*args) != 0:
            number = self.errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")

    def mount(self, source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
        texts = [text and text.encode() for text in (source, target, kind, data)]
        self("mount", *texts[:3], flags, texts[3])


def enclose(folder: str, size_mb: int) -> _Kernel:
    """Move this process and its children into namespaces, with a file system of their own on `folder`.

    Raises OSError or AttributeError where the system does not allow it.
    """
    kernel, user = _Kernel(), os.geteuid()
    new = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    if user == 0:
        kernel("unshare", new)
    else:
        group = os.getegid()
        kernel("unshare", new | NEWUSER)
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {user} 1"),
            ("gid_map", f"{NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as map_:
                map_.write(text)
    kernel.mount("none", "/", None, REC | PRIVATE)
    kernel.mount("tmpfs", folder, "tmpfs", NOSUID | NODEV, f"mode=755,size={size_mb}m")
    for path in library_folders():
        inside = folder + path
        os.makedirs(inside, exist_ok=True)
        kernel.mount(os.path.realpath(path), inside, None, BIND | REC)
        flags = os.statvfs(inside).f_flag & KEPT_FLAGS
        kernel.mount("none", inside, None, BIND | REMOUNT | RDONLY | NOSUID | flags)
    os.mkdir(f"{folder}/work")
    os.chmod(f"{folder}/work", 0o777)
    os.chroot(folder)
    os.chdir("/work")
    return kernel


def library_folders() -> list[str]:
    """Where Python's library and the system's shared libraries lie; none lies inside another."""
    known = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", os.path.join(sys.base_prefix, "lib")]
    known.append(os.path.dirname(os.__file__))
    found = sorted({path for path in known if os.path.isdir(path)})
    return [path for path in found if not any(path.startswith(f"{other}/") for other in found)]


def give_up_rights(kernel: _Kernel | None) -> None:
    """From here on: an ordinary user without capabilities, who cannot get any."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if kernel:
        import ctypes

        kernel("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        kernel("capset", header, nothing)


def limit(seconds: int, memory_mb: int, file_mb: int) -> None:
    """The kernel's limits for this process."""
    for name, most in {
        "CPU": seconds,
        "AS": memory_mb << 20,
        "FSIZE": file_mb << 20,
        "NOFILE": 32,
        "CORE": 0,
        "NPROC": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }.items():
        if (kind := getattr(resource, f"RLIMIT_{name}", None)) is not None:
            most = min(most, resource.getrlimit(kind)[1] % (1 << 63))
            resource.setrlimit(kind, (most, most))


# --- the warden ------------------------------------------------------------------------------------------


def main() -> None:
    """Read the job, raise the walls, fork the inmate, wait for it, and report."""
    os.umask(0o022)
    job, null = json.loads(_first_line()), os.open(os.devnull, os.O_RDWR)
    walls = None
    try:
        if job["walls"]:
            walls = enclose(job["folder"], job["file_mb"])
        else:
            os.chdir(job["folder"])
    except (OSError, AttributeError, ImportError) as error:
        print(json.dumps({"broken": str(error)}))
        return
    alive, working = os.pipe()
    verdict, report = os.pipe()
    if not (inmate := os.fork()):
        _serve(job, walls, null, working, report)
    for end in (working, report, job["read"], job["write"]):
        os.close(end)
    ready, _, _ = select.select([0, alive], [], [], job["patience"])
    os.kill(inmate, signal.SIGKILL)
    _, status, used = os.wait4(inmate, 0)
    processor = used.ru_utime + used.ru_stime  # exact; the kernel's limit counts ticks, so it may be less
    result = {
        "late": not ready or (status == signal.SIGKILL and processor > job["seconds"] / 2),
        "passed": os.read(verdict, 10) == b"passed",  # all write ends are closed: an empty pipe gives b""
        "exit": os.waitstatus_to_exitcode(status),
    }
    print(json.dumps(result))


def _first_line() -> bytes:
    """The job. Not through sys.stdin, whose buffer would hide the end of the input from `select`."""
    line = b""
    while not line.endswith(b"\n"):
        some = os.read(0, 1 << 16)
        if not some:
            sys.exit(0)
        line += some
    return line


def _serve(job: dict[str, Any], walls: _Kernel | None, null: int, working: int, report: int) -> NoReturn:
    """The inmate: do the work behind the walls. `working` stays open until this process ends."""
    status = 1
    try:
        os.setsid()  # or a signal to its process group would reach the warden
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        keep = [2, *sorted({working, report, job["read"], job["write"]}), 256]
        for low, high in pairwise(keep):
            os.closerange(low + 1, high)
        give_up_rights(walls)
        limit(job["seconds"], job["memory_mb"], job["file_mb"])
        read = os.fdopen(job["read"], encoding="ascii")
        write = os.fdopen(job["write"], "w", encoding="ascii")
        if job["role"] == "program":
            os.close(report)
            status = run_program(job["source"], read, write)
        elif run_tests(job["source"], read, write):
            os.write(report, b"passed")
            status = 0
    finally:  # neither an exception nor what the program registered for its end goes further
        os._exit(status)


if __name__ == "__main__":
    main()
