"""What a guarded call refuses before any sampling: parts that the guard cannot see through, plans that cannot run."""

from __future__ import annotations

from typing import Any

from sd_guard.fingerprint import modules_of
from sd_guard.guard import Guard
from sd_guard.noise import check_scheduler


def check_pipeline(pipe: Any) -> None:
    """Refuses a pipeline that the guard cannot see through.

    Raises:
        ValueError, TypeError: one line that names the component and the remedy.
    """
    check_scheduler(pipe.scheduler)
    if pipe.tokenizer is not None and len(pipe.tokenizer) <= 3:
        raise ValueError(
            f"tokenizer has {len(pipe.tokenizer)} tokens: its files are missing from the checkpoint's tokenizer folder"
        )
    owner = getattr(getattr(pipe.unet, "forward", None), "__module__", None) or ""
    if owner.split(".")[0] == "DeepCache":
        raise ValueError("DeepCache changes what a probe sees: call helper.disable(), or disable_guard()")
    if cache := next(filter(None, map(_cache_of, modules_of(pipe.unet))), None):
        raise ValueError(f"{cache} changes what a probe sees: remove it from the UNet, or disable_guard()")


def _cache_of(module: Any) -> str | None:
    """Name of the hook of diffusers on a module that keeps something from one call to the next; None without one."""
    registry = vars(module).get("_diffusers_hook")  # asking a module for what it has not takes a microsecond
    hooks = registry.hooks.values() if registry is not None else ()
    return next((type(hook).__name__ for hook in hooks if hook._is_stateful), None)


def check_texts(pipe: Any) -> None:
    """Refuses a pipeline that cannot encode the empty prompt, which every image is compared with.

    Raises:
        ValueError: one line that names the component and the remedy.
    """
    for name in ("text_encoder", "tokenizer"):
        if getattr(pipe, name) is None:
            raise ValueError(
                f"{name} is None, and the guard compares with the empty prompt: keep it (enable_model_cpu_offload() "
                "frees the memory of what is not at work), or disable_guard()"
            )


def check_plan(pipe: Any, guard: Guard) -> None:
    """Refuses a plan that cannot run with the pipeline at hand.

    Raises:
        ValueError: one line that names the mitigation and the remedy.
    """
    last = max(guard.observe_at)
    for mitigation in guard.plan:
        if check := getattr(mitigation, "check", None):
            check(pipe)
        asked = max(getattr(mitigation, "resumes_at", ()), default=0.0)
        if asked > last:
            raise ValueError(
                f"plan: {type(mitigation).__name__} resumes at {asked:g} of the steps, and that is possible at "
                f"observed steps only, the last at observe_at={last:g}: observe later, or resume earlier"
            )
