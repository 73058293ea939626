"""Guard settings as JSON: what `save_pretrained` leaves beside the checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from sd_guard.detection import DETECTORS
from sd_guard.guard import Guard
from sd_guard.mitigation import MITIGATIONS
from sd_guard.policy import Policy


def guard_to_json(guard: Guard) -> str:
    """All settings; detector and mitigations by their registered names.

    Raises:
        ValueError: a detector or mitigation that is not registered, and so could not be read back.
    """
    content: dict[str, Any] = {f.name: getattr(guard, f.name) for f in fields(guard)}
    content["detector"] = _named(guard.detector, DETECTORS)
    content["plan"] = [_named(mitigation, MITIGATIONS) for mitigation in guard.plan]
    content["policy"] = asdict(guard.policy)
    return json.dumps(content, indent=2) + "\n"


def guard_from_json(text: str) -> Guard:
    """The inverse of `guard_to_json`.

    Raises:
        ValueError: the text is no guard settings.
    """
    try:
        content: dict[str, Any] = json.loads(text)
        content["detector"] = _build(content["detector"], DETECTORS)
        content["plan"] = tuple(_build(item, MITIGATIONS) for item in content["plan"])
        content["policy"] = Policy(**content["policy"])
        options: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        return Guard(**options)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"guard.json does not hold guard settings ({error}): delete it for the default") from error


def _named(instance: Any, registry: dict[str, type[Any]]) -> dict[str, Any]:
    for name, kind in registry.items():
        if type(instance) is kind:
            values = {f.name: getattr(instance, f.name) for f in fields(instance)}
            nested = {key: _named(v, registry) for key, v in values.items() if type(v) in registry.values()}
            return {"name": name, **asdict(instance), **nested}
    raise ValueError(f"{type(instance).__name__} is not among {', '.join(registry)} and cannot be saved")


def _build(content: dict[str, Any], registry: dict[str, type[Any]]) -> Any:
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items() if key != "name"}
    for key, value in options.items():
        if isinstance(value, dict) and value.get("name") in registry:
            options[key] = _build(value, registry)
    return registry[content["name"]](**options)
