"""`sd-guard` with a screener that only pretends, for `accelerate launch`: arguments as of `sd-guard`.

The environment says how long a batch takes, by rank, and which rank kills itself at which job.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.null_runs import NullScreener
from sd_guard.cli import main
from sd_guard.screening import loading
from sd_guard.screening.jobs import Job
from sd_guard.screening.screener import Screened

RANK = int(os.environ["RANK"])


@dataclass(frozen=True)
class Ranked(NullScreener):
    """Writes the rank into the rows, where the fingerprint is."""

    def screen(self, jobs: Sequence[Job]) -> Screened:
        time.sleep(float(os.environ["SECONDS"].split(",")[RANK]))
        if os.environ.get("KILL") == f"{RANK}" and jobs[0].index > 20:
            os.kill(os.getpid(), signal.SIGKILL)
        screened = super().screen(jobs)
        for row in screened.rows:
            row["fingerprint"] = f"rank {RANK}"
        return screened


loading.load_screener = lambda settings: Ranked()
sys.exit(main(sys.argv[1:]))
