"""How the processes of one run find each other, work for the leader, and part.

Whatever ends one of them must end all, with one sentence from the leader where it still can speak.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

import torch

from medvae.errors import ConfigError, MedvaeError, RunError
from medvae.train.team import FAREWELL_S, LOST, Team

# Longer than any step: who is silent for so long is taken for lost. A process that ends is noticed at once.
TIMEOUT_S = 1800.0
TIMEOUT_NAME = "MEDVAE_TEAM_TIMEOUT_S"


@contextlib.contextmanager
def form_team(device: str = "auto") -> Iterator[Team]:
    """Join the processes that `torchrun` started (its environment says how many), or be alone.

    On the leader, leaving the block tells the others that the run is over, and waits a little for them. Raises
    RunError where the processes do not find each other; ConfigError for fewer GPUs than processes on a machine.
    """
    size, rank, local = _number("WORLD_SIZE", 1), _number("RANK", 0), _number("LOCAL_RANK", 0)
    if size <= 1:
        yield Team()
        return
    import torch.distributed as dist

    if not dist.is_available():
        raise ConfigError("this torch knows no processes: install one with torch.distributed, or leave torchrun out")
    from torch.distributed import distributed_c10d as c10d
    from torch.distributed.rendezvous import rendezvous

    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"{torch.cuda.device_count()} GPUs are here for process {local + 1} of this machine: start one "
                "process a GPU, or use --device cpu"
            )
        torch.cuda.set_device(local)
    wait = timedelta(seconds=float(os.environ.get(TIMEOUT_NAME) or TIMEOUT_S))
    try:
        base, _, _ = next(rendezvous("env://", rank, size, timeout=wait))
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(
            backend, store=c10d.PrefixStore("group", base), rank=rank, world_size=size, timeout=wait
        )
    except (RuntimeError, ValueError):
        raise _alone(
            "the processes of this run did not find each other: check how torchrun was started", rank
        ) from None
    team = Team(rank, size, c10d.PrefixStore("medvae", base))
    patience = FAREWELL_S / 5
    try:
        yield team
        patience = FAREWELL_S
    finally:
        with contextlib.suppress(RuntimeError):
            _part(team, patience)


def _part(team: Team, patience: float) -> None:
    """Close the connections, which wakes whoever waits; the leader ends last, as it may host the store."""
    if team.leads:
        team.store.set("ended", "1")
        _disconnect(ended_well=patience == FAREWELL_S)
        team.store.wait([f"left/{rank}" for rank in range(1, team.size)], timedelta(seconds=patience))
    else:
        _disconnect(ended_well=patience == FAREWELL_S)
        team.store.set(f"left/{team.rank}", "1")


def _disconnect(*, ended_well: bool) -> None:
    import torch.distributed as dist

    # NCCL would wait for who is lost; the end of this process closes its connections all the same.
    waits = dist.is_nccl_available() and torch.cuda.is_initialized() and not ended_well  # type: ignore[no-untyped-call]
    if dist.is_initialized() and not waits:
        dist.destroy_process_group()


def _alone(message: str, rank: int) -> BaseException:
    """Return the error of a process that nobody else speaks for: only the leader's errors are printed further out."""
    if rank == 0:
        return RunError(message)
    print(f"medvae: {message}", file=sys.stderr, flush=True)
    return SystemExit(RunError.exit_code)


@contextlib.contextmanager
def following(team: Team) -> Iterator[None]:
    """Work for the leader: Ctrl-C is the leader's to answer, and so is the sentence when this process fails.

    Raises SystemExit, silently where the leader can speak, and after a line on stderr where it is gone.
    """
    on_main = threading.current_thread() is threading.main_thread()
    before = [(s, signal.signal(s, signal.SIG_IGN)) for s in (signal.SIGINT,) if on_main]
    try:
        yield
    except MedvaeError as error:
        if str(error) == LOST:
            raise _alone(LOST, team.rank) from None
        raise SystemExit(_report(team, str(error), error.exit_code)) from None
    except Exception as error:
        if os.environ.get("MEDVAE_DEBUG", "") not in ("", "0"):
            raise
        raise SystemExit(_report(team, f"a defect of ours ({type(error).__name__})", 1)) from None
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _report(team: Team, message: str, exit_code: int) -> int:
    """Tell the leader why this process failed, and let it speak before this one ends."""
    with contextlib.suppress(RuntimeError):
        team.store.set(f"failed/{team.rank}", json.dumps({"message": message, "exit_code": exit_code}))
        _disconnect(ended_well=False)
        team.store.wait(["ended"], timedelta(seconds=FAREWELL_S))
    return exit_code


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name) or default)
    except ValueError:
        raise ConfigError(f"{name} is not a whole number: start several processes with torchrun") from None
