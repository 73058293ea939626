"""A compiled UNet serves sampling, probes and other seeds alike."""

from __future__ import annotations

import math
from typing import Any

import torch
from pipelines.calls import latents_of, scores_of
from tiny import EVERYBODY, NOBODY, watching
from torch._dynamo.testing import CompileCounter


def test_nothing_is_compiled_again_whoever_is_in_doubt(guarded: Any) -> None:
    """A graph of the guided call, and two more with the first doubt: of one lane, and of any number."""
    torch._dynamo.reset()
    counter = CompileCounter()
    pipe = guarded(watching(doubt=EVERYBODY))
    scores = sorted(scores_of(latents_of(pipe)[0]))
    pipe.unet = torch.compile(pipe.unet, backend=counter)
    compiled = []
    for doubt in (NOBODY, (-math.inf, scores[1]), EVERYBODY, (scores[0], math.inf), NOBODY):
        pipe.enable_guard(watching(doubt=doubt, other_seeds=1))
        latents_of(pipe)
        compiled.append(counter.frame_count)
    once = compiled[0]
    assert once > 0
    assert compiled == [once, 3 * once, 3 * once, 3 * once, 3 * once]
