"""How finished the predicted image already is: premature detail.

A memorized prompt's posterior mean is a sharp picture while the noise is still high; a novel prompt's is a blur, since
it averages all that is still possible (law of total variance). Webster (2023, arXiv 2305.08694) recognises one-step
extractions by the same fact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_guard.noise import NoiseLevel
from sd_guard.statistics.base import Denoiser, StepCall

# Detail, in latents of unit scale. Chosen on `tune` rows of four reference checkpoints.
CONTROL_FLOOR = 0.1  # what a control counts with at least in a ratio: below, it is as good as featureless
FAINTEST_CONTROL = 0.05  # likewise in a geometric mean
FINISHED = 0.5  # of a finished picture, about: from 0.4 to 0.6 on average
PLAIN = 0.08  # below it a picture is nearly one even colour
_TINY = 1e-12  # keeps the logarithm finite for a constant prediction
_NOTHING = 0.01  # of the detail it is held against: less than that is none
_WINDOW = 3 / 8  # of the latent's side: large enough to hold a shape, small enough to lie beside a template's free part
_FAINT = 0.02  # of a picture's mean energy, below which a window is as good as empty
# What 99 of 100 ordinary pictures persist by at most, by the log of sigma = s / a: rising with what noise is left, and
# level where the picture is almost done. Fitted on `tune` rows of the first reference checkpoint, and raised by 0.02
# on those of the fourth.
_ORDINARY, _ORDINARY_A_FOLD, _ORDINARY_LEAST = 0.773, 0.112, 0.79


def detail(x0_hat: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring latent pixels (anisotropic total variation, per pixel and channel).

    Without those at the border, where there are at least 4 by 4: an autoencoder's convolutions see zeros beyond the
    image, so that the latents of one even colour have edges there, and small ones most.

    Args:
        x0_hat: (B, C, H, W) predicted clean latents.

    Returns:
        (B,) float32 or better, in the latent's units, at least 0.
    """
    x = x0_hat if x0_hat.dtype == torch.float64 else x0_hat.float()
    return _detail_of(x.diff(dim=-1), x.diff(dim=-2))


def log_detail_ratio(x0_hat: Tensor, x0_hat_control: Tensor) -> Tensor:
    """Log of the detail of a prediction over that of its control at the same latent.

    At the highest noise levels a control is as featureless as its model is good, and a ratio to it says little of the
    prediction: it counts with at least `CONTROL_FLOOR`. Latents have about unit scale, as the noise mixed into them.

    Args:
        x0_hat: (B, C, H, W) conditional prediction.
        x0_hat_control: (B, C, H, W) the unconditional prediction at the same latent and noise level.

    Returns:
        (B,); about 0 or less for prompts that the model knows no better than no prompt, positive for premature detail.
    """
    return (detail(x0_hat) + _TINY).log() - detail(x0_hat_control).clamp(min=CONTROL_FLOOR).log()


def added_detail(x0_hat: Tensor, x0_hat_control: Tensor) -> Tensor:
    """Log of the detail that a prompt adds, over the geometric mean of the detail without it and of a finished picture.

    The detail of the *difference* of the two predictions tells a picture that the prompt brings along from one that the
    model sees in this latent anyway, only more faintly: the latter adds little, however sharp it is. An error that both
    predictions share is not in it either. How much is much? As much as there is without the prompt, and as much as
    finished pictures have: a model whose predictions at these levels are rough would pass for one without memories by
    the first alone, and one whose pictures are faint by the second. The control counts with at least
    `FAINTEST_CONTROL`. Latents have about unit scale, as the noise mixed into them.

    Args:
        x0_hat: (B, C, H, W) conditional prediction.
        x0_hat_control: (B, C, H, W) the unconditional prediction at the same latent and noise level.

    Returns:
        (B,); -0.7 and less for ordinary prompts early in the trajectory, above -0.2 for premature detail.
    """
    return detail_and_added(x0_hat, x0_hat_control)[1]


def detail_and_added(x0_hat: Tensor, x0_hat_control: Tensor) -> tuple[Tensor, Tensor]:
    """`detail` of the prediction and `added_detail`, (B,) each, by one reduction: they are taken within sampling.

    Args:
        x0_hat: (B, C, H, W) conditional prediction.
        x0_hat_control: (B, C, H, W) the unconditional prediction at the same latent and noise level.
    """
    difference = x0_hat.float() - x0_hat_control.float()
    own, control, added = detail(torch.cat([x0_hat, x0_hat_control, difference])).chunk(3)
    relative = added / (control.clamp(min=FAINTEST_CONTROL) * FINISHED).sqrt()
    return own, relative.clamp(min=_NOTHING).log()


def resemblance(x0_hat: Tensor, other: Tensor) -> Tensor:
    """Cosine of the two predictions' spatial differences: whether they show edges in the same places.

    Insensitive to how faint either picture still is, and to flat colour.

    Args:
        x0_hat: (B, C, H, W) predicted clean latents.
        other: (B, C, H, W) likewise.

    Returns:
        (B,) in [-1, 1]; about 0 for unrelated pictures.
    """
    cosine = torch.nn.functional.cosine_similarity(_differences(x0_hat), _differences(other), dim=1)
    return cosine.clamp(-1.0, 1.0)


def what_is_left(x0_hat: Tensor, flagged: Tensor, control: Tensor) -> Tensor:
    """Resemblance to a flagged picture, beyond what the prediction without the prompt has of it anyway.

    All predictions at one latent have something in common, and most where the model is unsure: that is no memory.

    Args:
        x0_hat: (B, C, H, W) predicted clean latents.
        flagged: (B, C, H, W) predicted clean latents of the flagged trajectories, or (1, C, H, W) of one.
        control: likewise, what the model predicted without the prompt at the same latents.

    Returns:
        (B,) in [-1, 1]: 0 is no more than the control's, 1 the picture itself.
    """
    anyway = resemblance(control, flagged).clamp(max=0.99)
    beyond = (resemblance(x0_hat, flagged.expand_as(x0_hat)) - anyway) / (1 - anyway)
    return beyond.clamp(-1.0, 1.0)


def survival(x0_hat: Tensor, flagged: Tensor, control: Tensor) -> Tensor:
    """How much of a flagged picture is left in another one, by edges and by colour.

    By edges it is `resemblance`, and where colour says more, the mean of both: a picture may have lost its edges to a
    new one on the same ground. By colour it is ``1 - d^2 / 2``, d being the root-mean-square distance of the two in
    units of the latents' standard deviation, which diffusers' scaling factor makes 1: 1 for the same picture, about 0
    for unrelated ones. Places count by the square of how far the prompt had moved the prediction there: a memory is
    what the prompt brings along, and the rest of a template is free.

    Args:
        x0_hat: (B, C, H, W) predicted clean latents, or clean ones.
        flagged: (B, C, H, W) predicted clean latents of the flagged trajectories.
        control: (B, C, H, W) what the model predicted without the prompt at the same latents.

    Returns:
        (B,) float32 in [-1, 1].
    """
    brought = (flagged.float() - control.float()).square().mean(1)
    apart = (x0_hat.float() - flagged.float()).square().mean(1)
    distance = (brought * apart).sum((-2, -1)) / brought.sum((-2, -1)).clamp(min=_TINY)
    edges = resemblance(x0_hat, flagged)
    return torch.maximum(edges, (edges + 1 - distance / 2) / 2)


def persistence(then: Tensor, now: Tensor) -> Tensor:
    """How much of a predicted image has stayed where it was while the noise went down.

    The posterior mean is a martingale along a trajectory: what it still moves by is the width that the posterior had
    (law of total variance). A memorized prompt's picture is settled from the start; an ordinary one's is still being
    made up. Taken window by window, over windows of 3/8 of the latent's side, and the better half of these averaged, so
    that a template counts whose remainder is free. In each window, the cosine of the two predictions' spatial
    differences; windows with next to no structure count as unlike. Where either picture has less detail than
    `PLAIN` it counts by as much as there is of that: a plain colour is settled early, and is nobody's memory.

    Args:
        then: (B, C, H, W) predicted clean latents at a higher noise level.
        now: (B, C, H, W) those of the same trajectories at a lower one.

    Returns:
        (B,) float32 in [-1, 1]; NaN for latents of a single pixel, which have no differences.
    """
    pictures = torch.cat([then, now])  # at once, as all that follows: it is taken within sampling
    x = pictures if pictures.dtype == torch.float64 else pictures.float()
    across, down = x.diff(dim=-1), x.diff(dim=-2)
    before, after = _edges(across.float(), down.float()).chunk(2)
    side = max(2, round(_WINDOW * min(then.shape[-2:])))
    window = [min(side, size) for size in then.shape[-2:]]
    products = (torch.cat([before, before, after]) * torch.cat([after, before, after])).sum(1, keepdim=True)
    pooled = torch.nn.functional.avg_pool2d(products, window, stride=1).flatten(1)
    shared, energies = pooled[: len(then)], pooled[len(then) :].reshape(2, len(then), pooled.shape[1])
    faint = _FAINT * energies.mean(2, keepdim=True) + _TINY
    cosine = shared / (energies + faint).prod(0).sqrt()
    structured = (torch.minimum(*_detail_of(across, down).chunk(2)) / PLAIN).clamp(max=1.0)
    return structured * cosine.topk(-(-cosine.shape[1] // 2), dim=1).values.mean(1).clamp(-1.0, 1.0)


def excess_persistence(then: Tensor, now: Tensor, level: NoiseLevel) -> Tensor:
    """`persistence` above what is ordinary by the time that the noise has come down to `level`, that of `now`.

    Returns:
        (B,) float32 in [-2, 1]: positive for pictures that are settled too early.
    """
    fold = math.log(max(level.sigma, _TINY))
    return persistence(then, now) - max(_ORDINARY + _ORDINARY_A_FOLD * fold, _ORDINARY_LEAST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """`detail` of the prediction with the prompt.

    Attributes:
        at: anywhere.
    """

    name: str = field(default="detail", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=0.0, init=False)
    at: tuple[float, ...] | None = None

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), at least 0."""
        return detail(model.read(call, "conditional").x0_hat)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogDetailRatio:
    """`log_detail_ratio` of the predictions with and without the prompt.

    Attributes:
        at: anywhere.
    """

    name: str = field(default="log_detail_ratio", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=0.0, init=False)
    at: tuple[float, ...] | None = None

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,).

        Raises:
            ValueError: the sampler evaluated no control.
        """
        return log_detail_ratio(model.read(call, "conditional").x0_hat, model.read(call, "control").x0_hat)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedDetail:
    """`added_detail` of the predictions with and without the prompt: the free half of the default detector.

    Attributes:
        at: anywhere.
    """

    name: str = field(default="added_detail", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=0.0, init=False)
    at: tuple[float, ...] | None = None

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,).

        Raises:
            ValueError: the sampler evaluated no control.
        """
        return added_detail(model.read(call, "conditional").x0_hat, model.read(call, "control").x0_hat)


def _differences(x: Tensor) -> Tensor:
    """(B, N) differences of neighbouring pixels along both axes."""
    return torch.cat([x.float().diff(dim=axis).flatten(1) for axis in (-1, -2)], dim=1)


def _edges(across: Tensor, down: Tensor) -> Tensor:
    """(B, 2C, H, W) of (B, C, H, W - 1) and (B, C, H - 1, W) differences, 0 at the far border."""
    pad = torch.nn.functional.pad
    return torch.cat([pad(across, (0, 1)), pad(down, (0, 0, 0, 1))], dim=1)


def _detail_of(across: Tensor, down: Tensor) -> Tensor:
    """`detail`, of the same differences."""
    if min(across.shape[-2], down.shape[-1]) >= 4:
        across, down = across[..., 1:-1, 1:-1], down[..., 1:-1, 1:-1]
    return (across.abs().mean(dim=(1, 2, 3)) + down.abs().mean(dim=(1, 2, 3))) / 2
