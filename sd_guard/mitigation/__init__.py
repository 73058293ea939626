"""Mitigations: what to change about a flagged image's sampling. A file a family."""

from sd_guard.mitigation.attention import SummaryMask, SummaryReplacement
from sd_guard.mitigation.base import Change, Mitigation, Subject
from sd_guard.mitigation.guidance import DelayedGuidance, DynamicTransition, LowerGuidance, OppositeGuidance
from sd_guard.mitigation.latents import NewSeed, NoiseOptimisation, Renoise
from sd_guard.mitigation.later import Later
from sd_guard.mitigation.optimisation import EmbeddingOptimisation
from sd_guard.mitigation.prompt import EmbeddingNoise, RandomTokens, WordAblation
from sd_guard.mitigation.reanchoring import PromptReanchoring
from sd_guard.mitigation.rewriters import Deletion, Generated, NearestMeaning, Rewriter
from sd_guard.mitigation.rewriting import TokenReplacement
from sd_guard.mitigation.weighting import WordWeighting

MITIGATIONS: dict[str, type[Mitigation]] = {
    "word_ablation": WordAblation,
    "word_weighting": WordWeighting,
    "embedding_noise": EmbeddingNoise,
    "random_tokens": RandomTokens,
    "embedding_optimisation": EmbeddingOptimisation,
    "token_replacement": TokenReplacement,
    "prompt_reanchoring": PromptReanchoring,
    "lower_guidance": LowerGuidance,
    "delayed_guidance": DelayedGuidance,
    "dynamic_transition": DynamicTransition,
    "opposite_guidance": OppositeGuidance,
    "new_seed": NewSeed,
    "noise_optimisation": NoiseOptimisation,
    "renoise": Renoise,
    "summary_mask": SummaryMask,
    "summary_replacement": SummaryReplacement,
    "later": Later,
}

__all__ = [
    "MITIGATIONS",
    "Change",
    "DelayedGuidance",
    "Deletion",
    "DynamicTransition",
    "EmbeddingNoise",
    "EmbeddingOptimisation",
    "Generated",
    "Later",
    "LowerGuidance",
    "Mitigation",
    "NearestMeaning",
    "NewSeed",
    "NoiseOptimisation",
    "OppositeGuidance",
    "PromptReanchoring",
    "RandomTokens",
    "Renoise",
    "Rewriter",
    "Subject",
    "SummaryMask",
    "SummaryReplacement",
    "TokenReplacement",
    "WordAblation",
    "WordWeighting",
]
