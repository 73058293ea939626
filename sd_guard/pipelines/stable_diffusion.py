"""`GuardedStableDiffusionPipeline`: diffusers' `StableDiffusionPipeline`, guarded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils import logging
from torch import Tensor

from sd_guard.calibration import Calibration
from sd_guard.fingerprint import forget_weights, take_fingerprint
from sd_guard.guard import Guard, GuardRecord
from sd_guard.pipelines.ahead import Ahead, take_turns, texts_of
from sd_guard.pipelines.checks import check_pipeline, check_plan, check_texts
from sd_guard.pipelines.inputs import (
    GUIDED_TENSORS,
    LOOP_TENSORS,
    RETURNED_TENSORS,
    CallInputs,
    as_long,
    clip_skip_of,
    is_empty,
    lora_scale_of,
    prompts_of,
    size_of,
)
from sd_guard.pipelines.outputs import blank_images
from sd_guard.pipelines.session import Session
from sd_guard.settings import guard_from_json, guard_to_json

logger = logging.get_logger(__name__)

GUARD_FILE = "guard.json"
CALIBRATION_FILE = "guard_calibration.json"  # beside it, where the guard's threshold comes from one
_TOKENIZER = Lock()
_SESSION: ContextVar[Session | None] = ContextVar("sd_guard_session", default=None)
_HOST_SIGNATURE = inspect.signature(StableDiffusionPipeline.__call__)


@dataclass
class GuardedStableDiffusionPipelineOutput(StableDiffusionPipelineOutput):
    """Output of a guarded call.

    Attributes:
        images: as of `StableDiffusionPipeline`; a blocked image is black.
        nsfw_content_detected: as of `StableDiffusionPipeline`.
        records: one an image; None with the guard off.
    """

    records: list[GuardRecord] | None = None


class MemorizedGenerationError(RuntimeError):
    """An image stayed memorized and the policy says `raise`. `output` holds the whole batch, that image black."""

    def __init__(self, message: str, output: GuardedStableDiffusionPipelineOutput) -> None:
        """Keeps what was computed."""
        super().__init__(message)
        self.output = output


class GuardedStableDiffusionPipeline(StableDiffusionPipeline):
    """A `StableDiffusionPipeline` that flags memorized generations while they are sampled, and mitigates them.

    The call takes the arguments of `StableDiffusionPipeline.__call__`. The guard is on from the start; an image that is
    not flagged equals the plain pipeline's bit for bit.
    """

    _callback_tensor_inputs = [  # noqa: RUF012 - the host's own attribute
        *StableDiffusionPipeline._callback_tensor_inputs,
        *(
            name
            for name in (*LOOP_TENSORS, *GUIDED_TENSORS)
            if name not in StableDiffusionPipeline._callback_tensor_inputs
        ),
    ]
    _guard: Guard | None = Guard()
    _calibration: Calibration | None = None
    _ahead: Ahead | None = None

    @property
    def guard(self) -> Guard | None:
        """The settings in force; None with the guard off."""
        return self._guard

    @property
    def calibration(self) -> Calibration | None:
        """Where the guard's threshold comes from; None without one."""
        return self._calibration

    def enable_guard(
        self,
        guard: Guard | None = None,
        *,
        calibration: Calibration | None = None,
        on_failure: str | None = None,
        budget: int | None = None,
    ) -> None:
        """Turns the guard on.

        Args:
            guard: where to look, how to decide, what to do; None keeps the settings in force, or takes the default.
            calibration: thresholds of this very configuration; a call in any other raises. None keeps the one in force
                along with the settings, and drops it where a `guard` is given.
            on_failure: what becomes of an image that nothing rescued: `blank`, `keep` (the best attempt) or `raise`.
            budget: extra lane evaluations an image may cost.

        Raises:
            ValueError: a setting that no call could use, or a pipeline that cannot be guarded.
        """
        if guard is None and calibration is None:
            calibration = self._calibration  # its threshold stays in force, and so must the check of what it holds for
        guard = guard or self._guard or Guard()
        policy = {"on_failure": on_failure, "budget": budget}
        guard = guard.with_policy(**{name: value for name, value in policy.items() if value is not None})
        if calibration is not None:
            guard = calibration.apply(guard)
        check_pipeline(self)
        check_plan(self, guard)
        self._guard, self._calibration = guard, calibration

    def disable_guard(self) -> None:
        """Turns the guard off: calls are those of `StableDiffusionPipeline`."""
        self._guard = self._calibration = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> GuardedStableDiffusionPipeline:
        """As of `DiffusionPipeline`; takes the guard settings that `save_pretrained` left in the folder."""
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        settings = Path(pretrained_model_name_or_path) / GUARD_FILE
        if settings.is_file():
            pipe._guard = guard_from_json(settings.read_text(encoding="utf-8"))
            calibration = settings.with_name(CALIBRATION_FILE)
            pipe._calibration = Calibration.load(calibration) if calibration.is_file() else None
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> GuardedStableDiffusionPipeline:
        """A guarded pipeline on the components of another, which keep their dtypes unless `torch_dtype` is given.

        Where the other is guarded, too, with its settings, on or off.
        """
        pipe = cls._on_components_of(pipeline, **kwargs)
        if isinstance(pipeline, GuardedStableDiffusionPipeline):
            pipe._guard, pipe._calibration = pipeline._guard, pipeline._calibration
        return pipe

    @classmethod
    def _on_components_of(cls, pipeline: Any, **kwargs: Any) -> GuardedStableDiffusionPipeline:
        if kwargs.get("torch_dtype") is None and kwargs.get("dtype") is None:
            # The host would cast the shared components, to float32: build from them instead.
            names = {*inspect.signature(cls.__init__).parameters} - {"self"}
            shared = {name: value for name, value in pipeline.components.items() if name in names}
            flags = {name: pipeline.config[name] for name in ("requires_safety_checker",) if name in pipeline.config}
            pipe = cls(**{**shared, **flags, **kwargs})
            pipe.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
            return pipe
        return cast(GuardedStableDiffusionPipeline, super().from_pipe(pipeline, **kwargs))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As of the host; guard settings that cannot be written are refused before anything is."""
        if self._guard is not None:
            guard_to_json(self._guard)
        super().save_pretrained(*args, **kwargs)

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Names the host as the folder's class, so that any diffusers loads it; guard settings go to their own file."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        index = Path(save_directory) / self.config_name
        content = json.loads(index.read_text(encoding="utf-8")) | {"_class_name": StableDiffusionPipeline.__name__}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name in (GUARD_FILE, CALIBRATION_FILE):
            (Path(save_directory) / name).unlink(missing_ok=True)  # an earlier save's
        if self._guard is not None:
            (Path(save_directory) / GUARD_FILE).write_text(guard_to_json(self._guard), encoding="utf-8")
        if self._calibration is not None:
            self._calibration.save(Path(save_directory) / CALIBRATION_FILE)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As of the host; the weights are another model's from here on, which a calibration does not hold for."""
        super().fuse_lora(*args, **kwargs)
        forget_weights(self.unet, self.text_encoder)

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As of the host."""
        super().unfuse_lora(*args, **kwargs)
        forget_weights(self.unet, self.text_encoder)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As of the host; what `encode_ahead` has begun is waited for, and not encoded again."""
        coming = self._ahead.take(texts_of(self, *args, **kwargs)) if self._ahead is not None else None
        return coming.result() if coming is not None else self._encode_now(*args, **kwargs)

    def encode_ahead(self, prompts: Sequence[str], *, guidance_scale: float = 7.5) -> None:
        """Encodes prompts on another thread, for a later call that has just these, one image each.

        For whoever knows the next batch while one is sampled. The latest two such texts are kept; the text encoder must
        stay as it is meanwhile. Images are the same, bit for bit. Without effect on a pipeline whose parts are moved to
        the device by turns, and under autocast, which is a thread's own.

        Args:
            prompts: of that call, without a negative prompt, `clip_skip` or a LoRA scale.
            guidance_scale: of that call.

        Raises:
            TypeError: one string, where a list is meant.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is one string; give encode_ahead the list of prompts of the later call")
        device = self._execution_device
        if not prompts or take_turns(self.unet, self.text_encoder) or torch.is_autocast_enabled(device.type):
            return
        guided = guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None
        asked = (list(prompts), device, 1, guided)
        if texts := texts_of(self, *asked):
            self._ahead = self._ahead or Ahead()
            self._ahead.begin(texts, lambda: self._encode_now(*asked))

    def _encode_now(self, *args: Any, **kwargs: Any) -> Any:
        """One thread at a time: a fast tokenizer keeps its padding as state that threads share."""
        with _TOKENIZER:
            return super().encode_prompt(*args, **kwargs)

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of the host; where a guarded call's trajectory begins."""
        latents = super().prepare_latents(*args, **kwargs)
        session = _SESSION.get()
        if session is not None and session.watch is None:  # a caller's callback may draw latents, too
            session.begin(self, latents)
        return latents

    def run_safety_checker(self, *args: Any, **kwargs: Any) -> Any:
        """As of the host; a GPU is decoding the images now, and the host would only wait for them."""
        session = _SESSION.get()
        if session is not None:
            session.inputs.fingerprint()
        return super().run_safety_checker(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generates images; see `StableDiffusionPipeline.__call__` for the arguments.

        Returns:
            `GuardedStableDiffusionPipelineOutput`, or with `return_dict=False` the host's tuple: images, NSFW flags.

        Raises:
            MemorizedGenerationError: an image stayed memorized, and the policy is `raise`.
            ValueError: arguments or a pipeline that cannot be guarded.
        """
        bound = _HOST_SIGNATURE.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments: dict[str, Any] = {**bound.arguments, **bound.arguments["kwargs"]}
        del arguments["self"], arguments["kwargs"]
        return_dict = arguments.pop("return_dict")
        session = self._open_session(arguments) if self._guard is not None else None
        if session is not None:
            self._listen(session, arguments)
        token = _SESSION.set(session)
        try:
            plain: Any = super().__call__(**arguments, return_dict=True)
        finally:
            _SESSION.reset(token)
        output = GuardedStableDiffusionPipelineOutput(plain.images, plain.nsfw_content_detected)
        if session is not None:
            self._conclude(session, output)
        return output if return_dict else (output.images, output.nsfw_content_detected)

    __call__.__signature__ = _HOST_SIGNATURE  # pyright: ignore[reportFunctionMemberAccess]

    def _open_session(self, arguments: dict[str, Any]) -> Session:
        """Checks what can be checked before any sampling, and gathers what the session needs."""
        assert self._guard is not None
        check_pipeline(self)
        check_plan(self, self._guard)
        check_texts(self)
        skip = clip_skip_of(arguments)
        if skip is not None and not hasattr(self.text_encoder, "text_model"):
            raise ValueError(
                f"clip_skip={skip} does not work with the installed diffusers and transformers: leave it out"
            )
        custom = next((arguments[name] for name in ("timesteps", "sigmas") if arguments[name] is not None), None)
        steps = len(custom) if custom is not None else arguments["num_inference_steps"]
        guidance = {name: arguments[name] for name in ("guidance_scale", "guidance_rescale")}
        own: dict[str, Any] = {
            **guidance,
            **size_of(arguments, self.vae_scale_factor),
            "eta": arguments["eta"],
            "clip_skip": skip,
            "lora_scale": lora_scale_of(arguments),
        }
        fingerprint = cache(lambda: take_fingerprint(self, steps=steps, schedule=custom, **own))
        if self._calibration is not None:
            self._calibration.check(fingerprint())
        if take_turns(self.unet, self.text_encoder):
            fingerprint()  # now that all weights are on one device
        guided = guidance["guidance_scale"] > 1 and self.unet.config.time_cond_proj_dim is None
        inputs = CallInputs(
            prompts=prompts_of(arguments),
            generator=arguments["generator"],
            seed=self._guard.seed,
            guided=guided,
            control_is_empty=is_empty(arguments["negative_prompt"]) and arguments["negative_prompt_embeds"] is None,
            eta=arguments["eta"],
            encode=self._encoder(arguments),
            fingerprint=fingerprint,
            **guidance,
        )
        return Session(self._guard, inputs)

    def _encoder(self, arguments: dict[str, Any]) -> Callable[[Sequence[str]], Tensor]:
        scale, skip, given = lora_scale_of(arguments), clip_skip_of(arguments), arguments["prompt_embeds"]

        def encode(prompts: Sequence[str]) -> Tensor:
            device = self._execution_device
            embeds = self.encode_prompt(list(prompts), device, 1, False, lora_scale=scale, clip_skip=skip)[0]
            return embeds if given is None else as_long(embeds, given.shape[1])

        return encode

    @staticmethod
    def _listen(session: Session, arguments: dict[str, Any]) -> None:
        """Puts the session into the host's step callback, before the user's."""
        user = arguments["callback_on_step_end"]
        builtin = isinstance(user, (PipelineCallback, MultiPipelineCallbacks))
        wanted: list[str] = list(
            user.tensor_inputs if builtin else arguments["callback_on_step_end_tensor_inputs"] or ()
        )
        allowed = StableDiffusionPipeline._callback_tensor_inputs
        if unknown := [name for name in wanted if name not in allowed]:
            raise ValueError(f"`callback_on_step_end_tensor_inputs` has to be in {allowed}, but found {unknown}")

        asked = list(dict.fromkeys((*LOOP_TENSORS, *(GUIDED_TENSORS if session.inputs.guided else ()), *wanted)))

        def on_step_end(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            tensors = session.on_step_end(pipe, step, timestep, tensors)
            if not session.looks:  # the host goes by this list at each step, and each entry copies all of its locals
                asked[:] = dict.fromkeys((*RETURNED_TENSORS, *wanted))
            result = {name: tensors[name] for name in RETURNED_TENSORS}
            if user is not None or arguments.get("callback") is not None:
                session.inputs.fingerprint()  # before the caller could change the weights
            if user is not None:
                result |= user(pipe, step, timestep, {name: tensors[name] for name in wanted})
            session.before_step(pipe, step + 1, result["latents"])
            return result

        arguments["callback_on_step_end"] = on_step_end
        arguments["callback_on_step_end_tensor_inputs"] = asked

    def _conclude(self, session: Session, output: GuardedStableDiffusionPipelineOutput) -> None:
        """Blanks what was blocked and attaches the records."""
        records = session.records(self, len(output.images))
        blocked = [row for row, record in enumerate(records) if record.outcome == "blocked"]
        unscored = [record.reason for record in records if record.outcome == "unscored"]
        output.images, output.records = blank_images(output.images, blocked), records
        output["records"] = records
        if unscored:
            logger.warning("%d of %d images could not be scored: %s.", len(unscored), len(records), unscored[0])
        if blocked and session.guard.policy.on_failure == "raise":
            raise MemorizedGenerationError(
                f"{len(blocked)} of {len(records)} images stayed memorized after mitigation (rows {blocked}); change "
                "the prompt or the seed, or enable_guard(on_failure='blank')",
                output,
            )
        if blocked:
            logger.warning(
                "%d of %d images stayed memorized after mitigation, and a black image is returned instead. Change the "
                "prompt or the seed.",
                len(blocked),
                len(records),
            )
