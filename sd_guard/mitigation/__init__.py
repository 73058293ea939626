"""Mitigations: what to change about a flagged image's sampling. A file a family."""

from sd_guard.mitigation.base import Change, Mitigation, Subject
from sd_guard.mitigation.guidance import DelayedGuidance
from sd_guard.mitigation.optimisation import EmbeddingOptimisation
from sd_guard.mitigation.prompt import EmbeddingNoise, RandomTokens, WordAblation
from sd_guard.mitigation.reanchoring import PromptReanchoring
from sd_guard.mitigation.rewriting import Deletion, Generated, NearestMeaning, Rewriter, TokenReplacement

MITIGATIONS: dict[str, type[Mitigation]] = {
    "word_ablation": WordAblation,
    "embedding_noise": EmbeddingNoise,
    "random_tokens": RandomTokens,
    "embedding_optimisation": EmbeddingOptimisation,
    "token_replacement": TokenReplacement,
    "prompt_reanchoring": PromptReanchoring,
    "delayed_guidance": DelayedGuidance,
}

__all__ = [
    "MITIGATIONS",
    "Change",
    "DelayedGuidance",
    "Deletion",
    "EmbeddingNoise",
    "EmbeddingOptimisation",
    "Generated",
    "Mitigation",
    "NearestMeaning",
    "PromptReanchoring",
    "RandomTokens",
    "Rewriter",
    "Subject",
    "TokenReplacement",
    "WordAblation",
]
