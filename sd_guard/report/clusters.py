"""Near-duplicate prompts, found by the letters that they share."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np

SIMILAR: Final = 0.85  # share of common letter triples (Jaccard) from which on two prompts are near-duplicates
LETTERS: Final = 500  # of a prompt that are looked at
_BINS: Final = 4096
_BLOCK: Final = 256


def near_duplicates(prompts: Sequence[str]) -> list[int]:
    """For each prompt, the place of the earlier prompt that it nearly repeats; its own place if there is none.

    A later prompt joins the most similar of those that joined none, never one that joined another itself, so that
    chains of small changes do not grow. Case, punctuation and Unicode forms do not count. Triples are hashed into 4,096
    bins; quadratic in the number of prompts, a second for 2,000.
    """
    triples = np.zeros((len(prompts), _BINS), dtype=np.float32)
    for row, prompt in zip(triples, prompts, strict=True):
        row[_triples(prompt)] = 1.0
    sizes = triples.sum(axis=1)
    leaders = list(range(len(prompts)))
    leads = np.ones(len(prompts), dtype=bool)
    for start in range(0, len(prompts), _BLOCK):
        common = triples[start : start + _BLOCK] @ triples[: start + _BLOCK].T
        for place in range(start, min(start + _BLOCK, len(prompts))):
            own = common[place - start, :place]
            similarity = np.where(leads[:place], own / (sizes[place] + sizes[:place] - own), 0.0)
            if place and similarity.max() >= SIMILAR:
                leaders[place] = int(similarity.argmax())
                leads[place] = False
    return leaders


def _triples(prompt: str) -> list[int]:
    text = unicodedata.normalize("NFKC", prompt[: 4 * LETTERS]).casefold()
    words = re.findall(r"\w+", text)
    line = f" {' '.join(words) or text} "[:LETTERS]
    return list({zlib.crc32(line[i : i + 3].encode()) % _BINS for i in range(max(len(line) - 2, 1))})
