"""What all ranks take over from the first one before process groups exist, its end too; and the scripts that do."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_fiberpo.aligner.lifecycle import first_rank
from nemo_fiberpo.aligner.lifecycle.ending import FirstRankError, run_main
from nemo_fiberpo.aligner.lifecycle.first_rank import Ranks
from nemo_fiberpo.aligner.lifecycle.preemption import Stopped
from tests.storage.test_run_lock import holder, start
from tests.support.launching import ROOT, arguments, environment, free_ports
from tests.support.processes import started


def fail() -> None:
    raise ValueError("run_dir: in use")


def stop() -> None:
    raise Stopped


def nothing_to_do() -> None:
    return None


@pytest.mark.parametrize(
    ("decide", "own", "others"),
    [(fail, ValueError, FirstRankError), (stop, Stopped, Stopped), (nothing_to_do, None, None)],
)
def test_the_first_rank_ends_when_the_others_have_heard_why(decide, own, others):
    """Its process may be the store: a rank that came late would hear nothing."""
    store, heard = dist.HashStore(), []

    def follow(rank: int) -> None:
        time.sleep(0.3 * rank)
        try:
            heard.append(Ranks(store, rank, 3, 20.0).follow(lambda _: {}))
        except BaseException as error:
            heard.append(type(error))

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    with nullcontext() if own is None else pytest.raises(own):
        assert Ranks(store, 0, 3, 20.0).lead(decide) is None
    assert store.check(["ack/1", "ack/2"])
    for thread in threads:
        thread.join(20)
    assert heard == [others, others]


@pytest.mark.parametrize("theirs", ["another", "", None])
def test_a_message_of_a_stranger_is_refused(theirs, monkeypatch):
    """Who reaches the store could tell a rank which checkpoint to load."""
    store = dist.HashStore()
    if theirs is None:
        store.set("message/0", '{"decision": {"checkpoint": "/tmp/evil"}}')
    else:
        monkeypatch.setenv(first_rank.SECRET, theirs)
        Ranks(store, 0, 1, 20.0).lead(lambda: {"checkpoint": "/tmp/evil"})
    monkeypatch.setenv(first_rank.SECRET, "of this job")
    with pytest.raises(ValueError, match=r"^FIBERPO_JOB_SECRET: a message in the launcher's store is not signed"):
        Ranks(store, 1, 2, 20.0).follow(lambda _: {})


def test_a_message_counts_in_its_own_place_only(monkeypatch):
    """An answer of this very job, copied to where the decision is expected."""
    monkeypatch.setenv(first_rank.SECRET, "of this job")
    store = dist.HashStore()
    Ranks(store, 0, 1, 20.0).lead(lambda: {"checkpoint": "a"})
    store.set("message/1", store.get("message/0"))
    follower = Ranks(store, 1, 2, 20.0)
    assert follower.follow(lambda _: {}) == {"checkpoint": "a"}
    follower._round = 1
    with pytest.raises(ValueError, match="is not signed by this job"):
        follower.follow(lambda _: {})


def test_the_first_rank_ends_although_another_never_hears(monkeypatch):
    monkeypatch.setattr(first_rank, "ACK_TIMEOUT", 0.1)
    with pytest.raises(ValueError, match="in use"):
        Ranks(dist.HashStore(), 0, 2, 600.0).lead(fail)


def test_a_rank_that_hears_nothing_names_the_limit():
    with pytest.raises(
        ValueError, match=r"^collective_timeout: the first rank, .* in 0\.2 s, .* raise collective"
    ) as end:
        Ranks(dist.HashStore(), 1, 2, 0.2).follow(lambda _: {})
    assert not isinstance(end.value, FirstRankError), "nobody else says it"


def test_a_rank_whose_first_rank_is_gone_prints_nothing_more():
    wait = timedelta(seconds=20)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
    follower = Ranks(dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=wait), 1, 2, 20.0)
    del server
    with pytest.raises(FirstRankError, match="does not answer"):
        follower.follow(lambda _: {})


def test_ranks_that_do_not_come_together_are_an_error_with_the_address(monkeypatch):
    port = str(free_ports(1)[0])
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^collective_timeout: the ranks did not connect at 127\.0\.0\.1:{port} "):
        first_rank.connect(1.0)


def test_an_error_of_the_first_rank_is_not_printed_again(capsys):
    def main() -> None:
        raise FirstRankError("run_dir: in use")

    with pytest.raises(SystemExit) as leaving:
        run_main(main)
    assert leaving.value.code == 1 and capsys.readouterr() == ("", "")


@contextmanager
def ranks_of(script: str, run_dir: Path, **variables: str):
    """Two ranks of a script, as srun starts them: no launcher ends one for the other."""
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    command = [sys.executable, str(ROOT / "examples" / script), *arguments(run_dir)]
    with ExitStack() as stack:
        ranks = []
        for rank in ("0", "1"):
            env = environment() | common | {"RANK": rank, "LOCAL_RANK": rank} | variables
            # A file each: in one, the warnings that torch writes piece by piece would break the other rank's lines.
            file = stack.enter_context((run_dir / f"output{rank}").open("w"))
            options = {"cwd": ROOT, "stdout": file, "stderr": subprocess.STDOUT}
            ranks.append(stack.enter_context(started(command, env, **options)))
        yield ranks


def lines(run_dir: Path) -> list[str]:
    """Of both ranks, the first one's before the other's, without torch's own warnings about sockets."""
    outputs = ((run_dir / f"output{rank}").read_text() for rank in (0, 1))
    return [line for output in outputs for line in output.splitlines() if not line.startswith("[W")]


def statuses(ranks: list[subprocess.Popen]) -> list[int]:
    return [process.wait(timeout=100) for process in ranks]


@pytest.mark.parametrize("script", ["train_gpt_fiberpo.py", "warm_start.py"])
def test_another_run_in_the_directory_is_one_error_and_every_rank_ends_with_it(script, tmp_path):
    (tmp_path / "run.json").write_text('{"identity": {"seed": 4}, "changes": [], "checkpoint": null}')
    with ranks_of(script, tmp_path) as ranks:
        assert statuses(ranks) == [1, 1]
    (said,) = lines(tmp_path)
    assert said.startswith("error: seed: 3, but the run in ")


def test_a_warm_start_that_waited_for_another_one_keeps_its_policy(tmp_path):
    with (
        holder(tmp_path, **start("4711", 0)) as other,
        ranks_of("warm_start.py", tmp_path, **start("4711", 1)) as ranks,
    ):
        until = time.monotonic() + 100
        while not any("waiting up to" in line for line in lines(tmp_path)):
            assert time.monotonic() < until and all(process.poll() is None for process in ranks)
            time.sleep(0.05)
        (tmp_path / "warm_start.nemo").write_text("policy")
        other.kill()
        assert statuses(ranks) == [0, 0]
    said = lines(tmp_path)
    assert said[-1] == f"warm start: {tmp_path}/warm_start.nemo exists, nothing to do" and len(said) == 2
    assert (tmp_path / "warm_start.nemo").read_text() == "policy" and not (tmp_path / "data").exists()
