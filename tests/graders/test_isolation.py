"""What an answer that runs code in its grader can reach: itself alone, as root and as an ordinary user, with
namespaces and Landlock and without.

Each attack is an answer to a grader that executes it. It scores 1 where it got what it wanted, of which nothing else is
believed: what a file, a socket or another process shows is looked at from outside.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.launching import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers are the Linux kernel's")
UID = 23456  # an ordinary user, of whom nothing else is known
MARK = "61.8034"  # seconds that a process of an attack sleeps; tells it from others
ROOT_NEEDED = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
LAYERS = ("namespaces", "Landlock", "seccomp")


@dataclass
class Place:
    """Where the attacks of one mode were made, and what came of them."""

    isolation: str
    scores: dict[str, float | None]  # by attack; None for one that could not be graded
    others: tuple[list[list], ...]  # outcomes of "7" and "8" in the calls before and after
    left: list[str]
    scratch: list[str]
    wrote: dict[str, str]  # the files in the folder that all may write
    victim_lives: bool


def attacks(folder: Path, port: int, victim: int) -> dict[str, str]:
    """What an answer tries, as Python that sets `score` to 1 where it got it."""
    return {
        "write": f"open({str(folder / 'written')!r}, 'w').write('x'); score = 1",
        "append": f"open({str(folder / 'kept')!r}, 'a').write('x'); score = 1",
        "delete": f"import os; os.unlink({str(folder / 'kept')!r}); score = 1",
        "folder": f"import os; os.mkdir({str(folder / 'made')!r}); score = 1",
        "rename": f"import os; os.rename({str(folder / 'kept')!r}, {str(folder / 'renamed')!r}); score = 1",
        "link": f"import os; os.symlink('/', {str(folder / 'link')!r}); score = 1",
        "tcp": f"import socket; socket.create_connection(('127.0.0.1', {port}), 1); score = 1",
        "udp": "import socket; s = socket.socket(socket.AF_INET, 2); s.sendto(b'x', ('127.0.0.1', 9)); score = 1",
        "unix": f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(folder / 'socket')!r}); score = 1",
        "kill": f"import os; os.kill({victim}, 9); score = 1",
        "environment": f"score = float('hidden' in open('/proc/{victim}/environ').read())",
        "environment of the parent": "import os; score = float('=' in open(f'/proc/{os.getppid()}/environ').read())",
        "memory of the parent": "import os; open(f'/proc/{os.getppid()}/mem', 'r+b'); score = 1",
        "descriptors of the parent": "import os\nfor number in range(64):\n"
        "  try: os.open(f'/proc/{os.getppid()}/fd/{number}', 1); score = 1\n  except OSError: pass\n",
        "privileges": "import os; os.setuid(0); os.chroot('/'); score = 1",
        "namespace": "import ctypes; score = float(ctypes.CDLL(None).unshare(0x10000000) == 0)",
    }


# Those that always hold, also where the kernel grants no layer.
HARMLESS = {
    "copy": "import os; os.fork(); score = 0",
    "copies": "import os; [os.fork() for _ in range(3)]; score = 0",
    "poison": "import bad_graders, builtins, json; bad_graders.grade = builtins.float = lambda *a: 1.0;"
    "json.dumps = lambda *a: '[0]'; score = 0",
    "descriptors": "import os\nfor d in range(3, 300):\n  try: os.write(d, b'[1, {\"score\": 1.0}]\\n' * 9)\n"
    "  except OSError: pass\nscore = 0",
    "daemon": f"import os, subprocess\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
    f"    subprocess.run(['sleep', '{MARK}'])\n  os._exit(0)\nscore = 0",
    "scratch": "open('here', 'w').write('x'); import os; os.makedirs('a/b'); score = float(os.path.exists('here'))",
    "scratch again": "import os; score = float(not os.listdir('.'))",
    "kill the parent": "import os, time; os.kill(os.getppid(), 9); time.sleep(60)",
}


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.under_attack"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": "/tmp"},
    )
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((None,), id="this-user"),
        pytest.param((UID,), id="ordinary-user", marks=ROOT_NEEDED),
        pytest.param((None, "unshare"), id="this-user-without-namespaces"),
        pytest.param((UID, "unshare"), id="ordinary-user-without-namespaces", marks=ROOT_NEEDED),
        pytest.param((UID, "landlock_create_ruleset"), id="ordinary-user-without-landlock", marks=ROOT_NEEDED),
        pytest.param((UID, "unshare", "landlock_create_ruleset"), id="ordinary-user-bare", marks=ROOT_NEEDED),
    ],
)
def place(request, server):
    user, *refused = request.param
    folder = Path(tempfile.mkdtemp(prefix="attacks-", dir="/tmp"))
    folder.chmod(0o777)
    (folder / "kept").write_text("kept")
    (folder / "kept").chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(folder / "socket"))
        local.listen()
        (folder / "socket").chmod(0o777)
        owner = {} if user is None else {"user": user, "group": user, "extra_groups": []}
        victim = subprocess.Popen(["sleep", "600"], env={"SECRET": "hidden", "PATH": os.environ["PATH"]}, **owner)
        tried = attacks(folder, listener.getsockname()[1], victim.pid) | HARMLESS
        calls = [["7", "8"], [f"run {code}" for code in tried.values()], ["7", "8", "7"]]
        asked = {"user": user, "refused": refused, "mark": MARK, "limit": 6.0, "answers": calls}
        try:
            server.stdin.write(json.dumps(asked) + "\n")
            server.stdin.flush()
            found = json.loads(server.stdout.readline())
            outcomes = dict(zip(tried, found["outcomes"][1], strict=True))
            scores = {name: None if failure else score for name, (score, failure, _) in outcomes.items()}
            wrote = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
            others = (found["outcomes"][0], found["outcomes"][2])
            yield Place(
                found["isolation"], scores, others, found["left"], found["scratch"], wrote, victim.poll() is None
            )
        finally:
            victim.kill()
            victim.wait()
            shutil.rmtree(folder)


def has(place: Place, *layers: str) -> bool:
    return any(layer in place.isolation for layer in layers)


def test_the_layers_in_force_are_named(place, request):
    asked = request.node.callspec.id
    assert has(place, "namespaces") != ("namespaces" in asked or "bare" in asked)
    assert has(place, "Landlock") != ("landlock" in asked or "bare" in asked)
    assert has(place, "seccomp") and has(place, "no privileges")


def test_answers_before_and_after_are_graded_rightly(place):
    before, after = place.others
    assert before == [[1.0, None, ""], [0.0, None, ""]]
    assert after == [[1.0, None, ""], [0.0, None, ""], [1.0, None, ""]]


def test_a_copy_or_a_poisoned_process_ends_with_its_answer(place):
    assert [place.scores[name] for name in ("copy", "copies", "daemon")] == [0.0, 0.0, 0.0]
    assert place.scores["poison"] in (0.0, None) and place.scores["descriptors"] in (0.0, 1.0, None)
    assert place.left == []


def test_the_scratch_folder_is_there_and_empty_for_every_answer(place):
    assert place.scores["scratch"] == 1.0 and place.scores["scratch again"] == 1.0
    assert place.scratch == []


def test_no_file_is_changed_outside(place):
    if not has(place, "Landlock", "read-only mounts"):
        pytest.skip("neither Landlock nor a mount namespace")
    assert place.wrote == {"kept": "kept"}
    assert not any(place.scores[name] for name in ("write", "append", "delete", "folder", "rename", "link"))


def test_no_socket_is_opened(place):
    assert not any(place.scores[name] for name in ("tcp", "udp", "unix"))


def test_no_other_process_is_seen_or_touched(place):
    if not has(place, "Landlock", "namespaces"):
        pytest.skip("neither Landlock nor namespaces")
    assert place.victim_lives and not place.scores["kill"] and not place.scores["environment"]


def test_the_worker_is_closed_to_its_grading_processes(place):
    assert not any(place.scores[f"{what} of the parent"] for what in ("environment", "memory", "descriptors"))


def test_no_privileges_come_back(place):
    assert not place.scores["privileges"] and not place.scores["namespace"]
