"""Handing work out: every item to one process, however slow another is."""

import threading
import time
from dataclasses import dataclass, field

from sd_guard.screening.processes import Alone, share_out, wait_until


@dataclass(frozen=True)
class Thread:
    """One of several processes, as a thread."""

    rank: int
    size: int
    counters: dict[str, int]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, counter: str, amount: int) -> int:
        with self.lock:
            self.counters[counter] = self.counters.get(counter, 0) + amount
            return self.counters[counter]


def test_a_slow_process_does_not_hold_the_rest() -> None:
    counters: dict[str, int] = {}
    lock = threading.Lock()
    taken: list[list[int]] = [[], [], []]

    def work(rank: int) -> None:
        process = Thread(rank, 3, counters, lock)
        for item in share_out(range(60), process):
            time.sleep(0.2 if rank == 0 else 0.002)
            taken[rank].append(item)
        process.add("finished", 1)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    wait_until(Thread(0, 3, counters, lock), "finished", 3)
    assert sorted(item for items in taken for item in items) == list(range(60))
    assert 1 <= len(taken[0]) < 5


def test_one_process_gets_all() -> None:
    assert list(share_out("abc", Alone())) == ["a", "b", "c"]
    assert list(share_out([], Alone())) == []
