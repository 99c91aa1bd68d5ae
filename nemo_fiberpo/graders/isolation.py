"""Isolation of processes that read a policy's responses: five layers, each used if the kernel permits it.

    namespaces   user (unless root does not need it), PID, network, mount and IPC, one set per worker; mounts are
                 read-only except the scratch folder, and /proc shows only the worker's processes
    uid          if the trainer is root, a uid that owns nothing
    privileges   no capabilities, and none to be gained by exec
    Landlock     no file changes outside the scratch folder; no signal, trace or abstract socket to an outside process;
                 no TCP
    seccomp      no socket, io_uring, trace, mount or namespace

Only the standard library, and only Linux: elsewhere no layer is in force, as `Isolation.in_force` reports.
docs/graders.md lists what the layers do not stop.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 1 << 12, 1 << 14, 1 << 18
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_SET_DUMPABLE, _SET_SECCOMP, _SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS = 4, 22, 36, 38
_FIRST_UID, _UIDS = 61184, 4336  # systemd's range for users that exist as long as a service runs
_PROCESSES, _FILES = 256, 1024
_EPERM = 1

# Landlock: what may be handled since which version of its interface, and what a file (no folder) can be given.
_LANDLOCK_CHANGES = {1: 0b1111111110010, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_LANDLOCK_OF_FILES = 1 << 1 | 1 << 14
_LANDLOCK_TCP, _LANDLOCK_SCOPED = 0b11, 0b11

# Numbers of system calls: (x86_64, aarch64). The first ones are called here, the others refused by the filter.
_CALLS = {
    "capset": (126, 91),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}
_REFUSED = {
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "move_mount": (429, 429),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


@dataclass
class Isolation:
    """The layers of one worker. `enter` is called in the process that forks the worker, `settle` in the worker, and
    `confine` in every process that reads responses."""

    scratch: str
    memory_limit: int  # bytes of address space, and of one file
    uid: int | None = None  # of the processes that read answers, where another than the worker's
    namespaces: tuple[str, ...] = ()
    in_force: list[str] = field(default_factory=list)
    landlock: int | None = None  # descriptor of the rule set
    descriptors: int = _FILES  # none is higher
    _needed: set[Path] = field(default_factory=set)
    _covered: list[Path] = field(default_factory=list)

    def enter(self) -> None:
        """Create the namespaces for the children of this process, if the kernel permits. The process must have one
        thread."""
        if sys.platform != "linux":
            return
        inner, uid, gid = _NEWPID | _NEWNET | _NEWNS | _NEWIPC, os.geteuid(), os.getegid()
        libc = ctypes.CDLL(None, use_errno=True)
        if uid == 0 and libc.unshare(inner) == 0:
            self.namespaces = ("PID", "network", "mount", "IPC")
        elif libc.unshare(_NEWUSER | inner) == 0:
            self.namespaces = ("user", "PID", "network", "mount", "IPC")
            try:
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
                Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
            except OSError:
                pass  # the processes then have the kernel's uid of nobody
        if uid == 0 and "user" not in self.namespaces:
            self._choose_uid()

    def _choose_uid(self) -> None:
        """Choose a uid other than root's, if it can read what graders import. Folders that only root can enter, such as
        /root, are covered by mounts that contain only what is needed, if there is a mount namespace."""
        self._needed = _folders_of_modules()
        closed = {_closed_above(folder) for folder in self._needed} - {None}
        if not (closed and not self.namespaces) and _files_are_readable(self._needed):
            self.uid = _FIRST_UID + os.getpid() % _UIDS
            self._covered = sorted(folder for folder in closed if folder is not None)

    def settle(self, descriptors: int = 0) -> None:
        """In the worker: mounts, and settings for its children. Its own descriptors are below `descriptors`."""
        os.umask(0o022)  # of the folders made here, and what answers write is removed anyway
        lower(resource.RLIMIT_NOFILE, _FILES)
        self.descriptors = max(descriptors, _FILES)
        if sys.platform != "linux":
            return
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)  # its memory and descriptors are closed to its children
        libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what an answer leaves behind becomes its child
        if self.namespaces:
            self._mount(libc)
        if self.uid is not None:
            os.chown(self.scratch, self.uid, self.uid)
        self.landlock = _landlock_ruleset(self.scratch)

    def _mount(self, libc: ctypes.CDLL) -> None:
        libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None)
        for folder in self._covered:
            self._cover(libc, folder)
        attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
        number = _number("mount_setattr")
        # /proc is told apart by its content: a process of this PID namespace is not in the trainer's.
        if libc.mount(b"proc", b"/proc", b"proc", _MS_NOSUID | _MS_NODEV, None):
            libc.mount(b"none", b"/proc", b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_RDONLY, None)
        if number and libc.syscall(number, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes)) == 0:
            self.namespaces += ("read-only mounts",)
        size = f"size={self.memory_limit},mode=0700".encode()
        libc.mount(b"none", self.scratch.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, size)

    def _cover(self, libc: ctypes.CDLL, closed: Path) -> None:
        below = [folder for folder in sorted(self._needed) if folder.is_relative_to(closed)]
        places = [(folder, os.open(folder, os.O_PATH)) for folder in below]
        libc.mount(b"none", bytes(closed), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=0755")
        for folder, place in places:
            if not folder.exists():  # not below another one
                folder.mkdir(parents=True)
                libc.mount(f"/proc/self/fd/{place}".encode(), bytes(folder), None, _MS_BIND | _MS_REC, None)
            os.close(place)
        Path(self.scratch).mkdir(parents=True, exist_ok=True)

    def confine(self) -> None:
        """Confine a process that reads responses, permanently. `in_force` then lists the layers."""
        os.environ["TMPDIR"] = self.scratch
        os.chdir(self.scratch)
        for kind, limit in ((resource.RLIMIT_AS, self.memory_limit), (resource.RLIMIT_FSIZE, self.memory_limit)):
            lower(kind, limit)
        lower(resource.RLIMIT_CORE, 0)
        if sys.platform != "linux":
            return
        self.in_force = [f"namespaces: {', '.join(self.namespaces)}"] if self.namespaces else []
        if self.uid is not None:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
            self.in_force.append(f"uid {self.uid}")
        if self.uid is not None or ("user" in self.namespaces and _kernel() >= (5, 14)):
            # else the limit would count the trainer's processes too
            lower(resource.RLIMIT_NPROC, _PROCESSES)
        libc = ctypes.CDLL(None, use_errno=True)
        if _drop_capabilities(libc) and libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
            self.in_force.append("no privileges")
            if self.landlock is not None and libc.syscall(_number("landlock_restrict_self"), self.landlock, 0) == 0:
                self.in_force.append(f"Landlock {_landlock_version()}")
            if refuse_calls(libc, *_REFUSED):
                self.in_force.append("seccomp")
        if self.landlock is not None:
            os.close(self.landlock)
        libc.prctl(_SET_DUMPABLE, 1, 0, 0, 0)  # its own /proc/self, which subprocess reads


def lower(kind: int, limit: int) -> None:
    """Lower a resource limit permanently, unless it is already lower."""
    hard = resource.getrlimit(kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])


def _number(call: str) -> int | None:
    column = _ARCHITECTURES.get(platform.machine())
    return (_CALLS | _REFUSED)[call][column[0]] if column else None


def _folders_of_modules() -> set[Path]:
    """The folders that imports read, as named and resolved."""
    names = {Path(name).absolute() for name in (*sys.path, sys.prefix, sys.base_prefix) if os.path.isdir(name)}
    return names | {name.resolve() for name in names}


def _closed_above(folder: Path) -> Path | None:
    """The first folder above this one that only its owner can enter."""
    return next((step for step in reversed(folder.parents) if not step.stat().st_mode & 0o001), None)


def _files_are_readable(folders: set[Path]) -> bool:
    """Whether others than their owner can read these folders and the files imported so far."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in folders) and all(
        os.stat(file).st_mode & 0o004 for file in files if file and os.path.isfile(file)
    )


def _drop_capabilities(libc: ctypes.CDLL) -> bool:
    number = _number("capset")
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    return number is not None and libc.syscall(number, header, nothing) == 0


def _landlock_version() -> int:
    number = _number("landlock_create_ruleset")
    return 0 if number is None else max(0, ctypes.CDLL(None).syscall(number, None, 0, 1))


def _landlock_ruleset(scratch: str) -> int | None:
    """A rule set that permits changes only in `scratch`; None if the kernel has no Landlock."""
    version = _landlock_version()
    if version < 1:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    changes = sum(rights for since, rights in _LANDLOCK_CHANGES.items() if version >= since)
    tcp, scoped = _LANDLOCK_TCP if version >= 4 else 0, _LANDLOCK_SCOPED if version >= 6 else 0
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("QQQ", changes, tcp, scoped)[:size]
    ruleset = libc.syscall(_number("landlock_create_ruleset"), attributes, size, 0)
    if ruleset < 0:
        return None
    for path, rights in ((scratch, changes), ("/dev/null", changes & _LANDLOCK_OF_FILES)):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, place)
        added = libc.syscall(_number("landlock_add_rule"), ruleset, 1, rule, 0)
        os.close(place)
        if added:
            os.close(ruleset)
            return None
    return ruleset


def refuse_calls(libc: ctypes.CDLL, *calls: str) -> bool:
    """Install a seccomp filter: these calls, and all of another architecture, fail with EPERM."""
    if platform.machine() not in _ARCHITECTURES:
        return False
    column, architecture = _ARCHITECTURES[platform.machine()]
    numbers = [(_CALLS | _REFUSED)[call][column] for call in calls]
    load, equal, above, give = 0x20, 0x15, 0x35, 0x06

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    count = len(numbers)
    program = [step(load, 4), step(equal, architecture, 0, count + 2), step(load, 0)]
    program.append(step(above, 0x40000000, count, 0))  # x86_64's second table of numbers, x32
    program += [step(equal, number, count - 1 - place, 0) for place, number in enumerate(numbers)]
    program[-1] = step(equal, numbers[-1], 0, 1)
    program += [step(give, 0x00050000 | _EPERM), step(give, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(program))
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    return libc.prctl(_SET_SECCOMP, 2, filters, 0, 0) == 0
