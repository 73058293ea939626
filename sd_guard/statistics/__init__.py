"""One number an image (or a prompt) that tells memorized from other generations: the published ones, and the guard's.

A file a family. `STATISTICS` are taken from one sampling step of one image; `SEED_STATISTICS` compare the seeds of a
prompt. The keys are the names of their rows in every table.
"""

from __future__ import annotations

from typing import Final

from sd_guard.statistics.anisotropy import Anisotropy
from sd_guard.statistics.attention_entropy import AttentionEntropy
from sd_guard.statistics.base import SeedStatistic, Statistic
from sd_guard.statistics.bright_ending import BrightEnding, LocalGuidanceNorm
from sd_guard.statistics.complexity import DecodedPngSize, LidPerPngSize
from sd_guard.statistics.curvature import CurvatureDifference
from sd_guard.statistics.dimension import (
    FlipdStatistic,
    LidContrast,
    LidRatio,
    SteinLid,
    TrajectoryLid,
    TrajectoryLidControl,
)
from sd_guard.statistics.flipd_curve import FPRegress
from sd_guard.statistics.guidance import CfgNorm
from sd_guard.statistics.hessian import HessianScoreNorm
from sd_guard.statistics.noise_similarity import NoiseSimilarity
from sd_guard.statistics.normal_bundle import NormalBundleLid
from sd_guard.statistics.norms import NoiseNorm
from sd_guard.statistics.one_step import OneStepEdges
from sd_guard.statistics.reconstruction import ReconstructionCost
from sd_guard.statistics.seed_agreement import SeedAgreement
from sd_guard.statistics.sharpness import AddedDetail, Detail, LogDetailRatio
from sd_guard.statistics.tiled import TiledDistance
from sd_guard.statistics.update_norm import LatentUpdateNorm

STATISTICS: Final[dict[str, type[Statistic]]] = {
    "detail": Detail,
    "log_detail_ratio": LogDetailRatio,
    "added_detail": AddedDetail,
    "seed_agreement": SeedAgreement,
    "trajectory_lid": TrajectoryLid,
    "trajectory_lid_control": TrajectoryLidControl,
    "lid_contrast": LidContrast,
    "lid_ratio": LidRatio,
    "stein_lid": SteinLid,
    "flipd": FlipdStatistic,
    "fp_regress": FPRegress,
    "normal_bundle_lid": NormalBundleLid,
    "decoded_png_size": DecodedPngSize,
    "lid_per_png_size": LidPerPngSize,
    "noise_norm": NoiseNorm,
    "reconstruction_cost": ReconstructionCost,
    "cfg_norm": CfgNorm,
    "latent_update_norm": LatentUpdateNorm,
    "hessian_score_norm": HessianScoreNorm,
    "anisotropy": Anisotropy,
    "attention_entropy": AttentionEntropy,
    "bright_ending": BrightEnding,
    "local_guidance_norm": LocalGuidanceNorm,
    "curvature_difference": CurvatureDifference,
}
SEED_STATISTICS: Final[dict[str, type[SeedStatistic]]] = {
    "noise_similarity": NoiseSimilarity,
    "one_step_edges": OneStepEdges,
    "tiled_distance": TiledDistance,
}
