"""LID along a trajectory: how many directions the model leaves open, with the prompt, without, and compared.

Each value names its point (`sd_guard.statistics.lid`): FLIPD belongs to a clean one, the others to the noisy latent.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sd_guard.statistics.base import Denoiser, Lane, StepCall
from sd_guard.statistics.flipd_curve import check_probes, conditional_lanes, predict_at
from sd_guard.statistics.lid import estimate_flipd, estimate_trajectory_lid, stein_lid
from sd_guard.trace import FiniteDifference, Hutchinson, RowSeeds

# Directions that a control counts with at least: a ratio to a control that leaves none open says nothing.
LEAST_CONTROL = 1.0


def measure_lid(call: StepCall, model: Denoiser, lane: Lane, probes: int) -> Tensor:
    """(B,) trajectory LID at the noisy latent of a call, by `probes` finite differences along Rademacher vectors.

    An image's vectors come from its seed and the step, and are the same in both lanes.

    Raises:
        ValueError: no control to look at, or as many seeds as images are not at hand.
    """
    predict, e_hat, seeds = model.noise_function(call, lane), model.read(call, lane).e_hat, model.seeds
    source = RowSeeds(seeds, call.step)
    estimate = estimate_trajectory_lid(
        predict, call.x, call.level, FiniteDifference(), Hutchinson(probes), source, e_hat=e_hat
    )
    return estimate.value


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipdStatistic:
    """FLIPD (Kamkari et al. 2024, arXiv 2406.03537) of the prediction: at ``a x0_hat``, the Tweedie point, as prompted.

    Attributes:
        timestep: training timestep whose level is looked at; None for the step's own, at which a network resolves
            little late in the trajectory. The default told memories best on a few prompts of the first reference.
        probes: Rademacher vectors; each image has its own, from its seed and the step.
        at: anywhere.

    Raises:
        ValueError: no probes.
    """

    name: str = field(default="flipd", init=False)
    higher_is_memorized: bool = field(default=False, init=False)
    timestep: int | None = 200
    probes: int = 2
    at: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse an empty estimate."""
        check_probes(self.probes)

    @property
    def lanes(self) -> float:
        """The prediction at the Tweedie point, and its probes."""
        return 1.0 + self.probes

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,) in directions, in theory 0 to D.

        Raises:
            ValueError: a timestep outside the schedule, or as many seeds as images are not at hand.
        """
        level, predict = call.level, model.noise_function(call, "conditional")
        if self.timestep is not None:
            level, predict = predict_at(model, self.timestep, conditional_lanes(call))
        clean = model.read(call, "conditional").x0_hat.to(call.x.dtype)
        seeds = RowSeeds(model.seeds, call.step)
        return estimate_flipd(predict, clean, level, FiniteDifference(), Hutchinson(self.probes), seeds).value


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryLid:
    """Trajectory LID with the prompt, ``D - s tr(d e_hat/dx)`` at the noisy latent: low where little is left open.

    It tends to 0 with growing noise whatever the prompt: compare within one step of one configuration.

    Attributes:
        probes: Rademacher vectors; each image has its own, from its seed and the step.
        at: anywhere.

    Raises:
        ValueError: no probes.
    """

    name: str = field(default="trajectory_lid", init=False)
    higher_is_memorized: bool = field(default=False, init=False)
    probes: int = 2
    at: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse an empty estimate."""
        check_probes(self.probes)

    @property
    def lanes(self) -> float:
        """A perturbed prediction for each probe; the unperturbed one is the sampler's."""
        return float(self.probes)

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,) in directions, in theory 0 to D."""
        return measure_lid(call, model, "conditional", self.probes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryLidControl:
    """As `TrajectoryLid`, without the prompt. At a memorized latent it is low too: the model knows the image.

    Attributes:
        probes: as there.
        at: anywhere.

    Raises:
        ValueError: no probes.
    """

    name: str = field(default="trajectory_lid_control", init=False)
    higher_is_memorized: bool = field(default=False, init=False)
    probes: int = 2
    at: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse an empty estimate."""
        check_probes(self.probes)

    @property
    def lanes(self) -> float:
        """As of `TrajectoryLid`."""
        return float(self.probes)

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,) in directions, in theory 0 to D.

        Raises:
            ValueError: the sampler evaluated no control.
        """
        return measure_lid(call, model, "control", self.probes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LidContrast:
    """Share of all D directions that the prompt closes: ``(LID without it - LID with it) / D``, on the same probes.

    Attributes:
        probes: Rademacher vectors, shared by the two lanes, so that their noise cancels where the lanes agree.
        at: anywhere.

    Raises:
        ValueError: no probes.
    """

    name: str = field(default="lid_contrast", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    probes: int = 2
    at: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse an empty estimate."""
        check_probes(self.probes)

    @property
    def lanes(self) -> float:
        """A perturbed prediction for each probe in both lanes."""
        return 2.0 * self.probes

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), in theory -1 to 1.

        Raises:
            ValueError: the sampler evaluated no control.
        """
        control, conditional = (measure_lid(call, model, lane, self.probes) for lane in ("control", "conditional"))
        return (control - conditional) / call.x[0].numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class LidRatio:
    """Share of the directions open without the prompt that it leaves open: LID with it over LID without, same probes.

    A control counts with at least `LEAST_CONTROL` directions; where it is down there, the ratio is the LID itself.

    Attributes:
        probes: Rademacher vectors, shared by the two lanes.
        at: anywhere.

    Raises:
        ValueError: no probes.
    """

    name: str = field(default="lid_ratio", init=False)
    higher_is_memorized: bool = field(default=False, init=False)
    probes: int = 2
    at: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse an empty estimate."""
        check_probes(self.probes)

    @property
    def lanes(self) -> float:
        """A perturbed prediction for each probe in both lanes."""
        return 2.0 * self.probes

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), in theory at least 0.

        Raises:
            ValueError: the sampler evaluated no control.
        """
        control, conditional = (measure_lid(call, model, lane, self.probes) for lane in ("control", "conditional"))
        return conditional / control.clamp(min=LEAST_CONTROL)


@dataclass(frozen=True, slots=True, kw_only=True)
class SteinLid:
    """``D - |e_hat|^2`` at the noisy latent, as prompted: the trajectory LID in expectation only, free and noisy.

    Attributes:
        at: anywhere.
    """

    name: str = field(default="stein_lid", init=False)
    higher_is_memorized: bool = field(default=False, init=False)
    lanes: float = field(default=0.0, init=False)
    at: tuple[float, ...] | None = None

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), at most D; its own deviation is about sqrt(2 D)."""
        return stein_lid(model.read(call, "conditional").e_hat)
