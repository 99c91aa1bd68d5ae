"""Decisions of the first rank, sent to the others over the launcher's store before process groups exist.

The store listens on the network and accepts messages from anyone. With a secret of the job in FIBERPO_JOB_SECRET,
messages that are not signed with it are refused.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from nemo_fiberpo.aligner.lifecycle.ending import FirstRankError
from nemo_fiberpo.aligner.lifecycle.preemption import Stopped

# Seconds that the first rank, whose process may serve the store, waits for the others to receive its decision.
ACK_TIMEOUT = 10.0
SECRET = "FIBERPO_JOB_SECRET"
Message = dict[str, Any]  # JSON
_SIGNED = 64  # length of the signature before a message
_stores: list[Any] = []  # kept open: the first rank's serves the others until process groups exist


class Ranks:
    """The ranks of a run, seen from one of them: the first leads, the others follow.

    Errors of the store are ValueErrors that name what was waited for; FirstRankError on another rank where the store
    ended with the first.

    timeout  seconds without an answer after which a rank gives up (`collective_timeout`)
    """

    def __init__(self, store: Any, rank: int, number: int, timeout: float):
        self.rank, self.number = rank, number
        self._store, self._timeout, self._round = store, timeout, 0
        self._secret = os.environ.get(SECRET, "").encode()
        store.set_timeout(timedelta(seconds=timeout))

    def lead(self, decide: Callable[[], Message | None]) -> Message | None:
        """First rank: send the result of `decide` to all ranks. An error, or Stopped, ends all of them."""
        try:
            decision = decide()
        except BaseException as error:
            message = {"stopped": True} if isinstance(error, Stopped) else {"error": str(error) or repr(error)}
            with suppress(ValueError):  # the original error matters more
                self._send_last(message)
            raise
        self._send_last({"decision": decision})
        return decision

    def follow(self, answer: Callable[[Message], Message]) -> Message | None:
        """Another rank: answer the first rank's questions and return its decision. Raises Stopped, or FirstRankError
        for its error."""
        while True:
            message = self._wait_for(f"message/{self._round}", "the first rank, or a rank that it waits for,")
            if "question" in message:
                self._set(f"answer/{self._round}/{self.rank}", answer(message["question"]))
                self._round += 1
                continue
            with suppress(FirstRankError):  # it no longer waits
                self._set(f"ack/{self.rank}", {})
            if "decision" not in message:
                raise Stopped if "stopped" in message else FirstRankError(message["error"])
            decision: Message | None = message["decision"]
            return decision

    def ask(self, question: Message, answer: Callable[[Message], Message]) -> list[Message]:
        """First rank: the answers of all ranks, its own first; it computes its own while waiting."""
        number = self._round
        self._send({"question": question})
        keys = (f"answer/{number}/{rank}" for rank in range(1, self.number))
        return [answer(question), *(self._wait_for(key, f"rank {key.rpartition('/')[2]}") for key in keys)]

    def _send(self, message: Message) -> None:
        self._set(f"message/{self._round}", message)
        self._round += 1

    def _send_last(self, message: Message) -> None:
        self._send(message)
        with suppress(dist.DistError):
            self._store.wait([f"ack/{rank}" for rank in range(1, self.number)], timedelta(seconds=ACK_TIMEOUT))

    def _set(self, key: str, message: Message) -> None:
        try:
            self._store.set(key, self._signature(key, text := json.dumps(message)) + text)
        except dist.DistError as error:
            raise self._lost(error) from error

    def _wait_for(self, key: str, who: str) -> Message:
        try:
            raw = self._store.get(key).decode(errors="replace")
        except dist.DistStoreError as error:
            raise ValueError(
                f"collective_timeout: {who} did not answer in {self._timeout:g} s, before training. If it was still "
                "reading a checkpoint, raise collective_timeout above the time that the slowest rank takes; else find "
                "out why it ended"
            ) from error
        except dist.DistError as error:
            raise self._lost(error) from error
        signature, text = raw[:_SIGNED], raw[_SIGNED:]
        if not hmac.compare_digest(signature.encode(), self._signature(key, text).encode()):
            raise ValueError(
                f"{SECRET}: a message in the launcher's store is not signed by this job, or its ranks have different "
                "secrets"
            )
        message: Message = json.loads(text)
        return message

    def _signature(self, key: str, text: str) -> str:
        """HMAC of a message and its key; with the empty secret if the job has none."""
        return hmac.new(self._secret, f"{key}\n{text}".encode(), "sha256").hexdigest()

    def _lost(self, error: Exception) -> ValueError:
        kind = FirstRankError if self.rank > 0 else ValueError
        return kind(f"the launcher's store, which ranks use before training, does not answer: {_first_line(error)}")


def is_first_rank() -> bool:
    """Whether this process writes files and prints."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def connect(timeout: float) -> Ranks | None:
    """The ranks of this run, from the launcher's variables; None if there is only one. ValueError if they do not all
    connect within `timeout` seconds."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    try:
        base, rank, number = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except dist.DistError as error:
        where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ValueError(
            f"collective_timeout: the ranks did not connect at {where} in {timeout:g} s ({_first_line(error)}); "
            "check that all were started and can reach that address"
        ) from error
    _stores.append(base)
    ranks = Ranks(PrefixStore("fiberpo", base), rank, number, timeout)
    os.environ.pop(SECRET, None)  # no child process needs it, least of all graders
    return ranks


def decide_on_first_rank(timeout: float, decide: Callable[[], Message | None]) -> Message | None:
    """The result of `decide`, run on the first rank only, on every rank. Errors as `Ranks`."""
    ranks = connect(timeout)
    if ranks is None:
        return decide()
    return ranks.lead(decide) if ranks.rank == 0 else ranks.follow(lambda _: {})


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
