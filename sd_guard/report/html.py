"""From templates to one self-contained HTML file under a strict Content-Security-Policy."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup

from sd_guard.report import texts

_TEMPLATES: Final = Path(__file__).parent / "templates"


def render_page(template: str, **values: Any) -> str:
    """A page as text: everything is escaped but the style sheet and the script that this package brings.

    The policy allows these two by their hash, and images that are inlined; nothing else, and no network.

    Args:
        template: Its file name.
        values: What it shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": texts.number, "count": texts.count, "clean": texts.clean, "short": texts.short}
    style, script = (_TEMPLATES.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    return environment.get_template(template).render(
        policy=policy, style=Markup(style), script=Markup(script), **values
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
