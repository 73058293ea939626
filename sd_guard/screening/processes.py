"""The processes that share a run: one, or those that `accelerate launch` starts on a node.

    accelerate launch --multi_gpu --num_processes 8 -m sd_guard.cli screen prompts.txt --out run

They share nothing but counters, in the store that torch's launcher has started for them. A worker that is lost is the
launcher's concern: it ends the others, and the run is gone on with by `--resume`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
_POLL: float = 0.05  # seconds


class Processes(Protocol):
    """This process among those that share a run."""

    @property
    def rank(self) -> int:
        """Of this process, from 0; rank 0 plans, shows progress and merges."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def add(self, counter: str, amount: int) -> int:
        """Adds to a counter that all share; returns what it is then. Counters begin at 0."""
        ...


@dataclass(frozen=True, slots=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1
    counters: Counter[str] = field(default_factory=Counter[str])

    def add(self, counter: str, amount: int) -> int:
        """As of `Processes`."""
        self.counters[counter] += amount
        return self.counters[counter]


@dataclass(frozen=True, slots=True)
class Launched:
    """One of the processes of `accelerate launch`."""

    rank: int
    size: int
    store: Store

    @classmethod
    def join(cls) -> Launched:
        """Connects to the store that the launcher's environment names."""
        from torch.distributed import PrefixStore, rendezvous

        store, rank, size = next(iter(rendezvous("env://")))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(rank, size, PrefixStore(f"sd_guard/{attempt}", store))

    def add(self, counter: str, amount: int) -> int:
        """As of `Processes`."""
        return self.store.add(counter, amount)


def join_processes() -> Processes:
    """This process as its launcher has started it; imports torch only if there is one."""
    return Launched.join() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()


def wait_until(processes: Processes, counter: str, amount: int) -> None:
    """Waits until a counter has reached an amount."""
    while processes.add(counter, 0) < amount:
        time.sleep(_POLL)


def share_out(items: Iterable[T], processes: Processes) -> Iterator[T]:
    """Of items that all processes list alike, those that fall to this one: it asks for the next when it is done."""
    mine = processes.add("handed out", 1)
    for number, item in enumerate(items, start=1):
        if number == mine:
            yield item
            mine = processes.add("handed out", 1)
