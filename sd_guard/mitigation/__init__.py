"""Mitigations: what to change about a flagged image's sampling. A file a family."""

from sd_guard.mitigation.base import Change, Mitigation, Subject
from sd_guard.mitigation.guidance import DelayedGuidance
from sd_guard.mitigation.prompt import EmbeddingNoise, WordAblation

MITIGATIONS: dict[str, type[Mitigation]] = {
    "word_ablation": WordAblation,
    "embedding_noise": EmbeddingNoise,
    "delayed_guidance": DelayedGuidance,
}

__all__ = ["MITIGATIONS", "Change", "DelayedGuidance", "EmbeddingNoise", "Mitigation", "Subject", "WordAblation"]
