"""The images of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """One image to make: its place in the run, prompt, family and seed."""

    index: int
    prompt: str
    family: str | None
    seed: int
