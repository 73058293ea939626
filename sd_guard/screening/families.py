"""What the labels of prompt lists mean: which families are memorized, which are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

Kind: TypeAlias = Literal["verbatim", "template", "memorized", "plain", "novel"]

MEMORIZED: Final[tuple[Kind, ...]] = ("verbatim", "template", "memorized")
OTHER: Final[tuple[Kind, ...]] = ("plain", "novel")

# What prompt lists call their families, in lower case with `_` for spaces and hyphens. Matching, retrieval and template
# verbatim are Webster's (2023, arXiv 2305.08694): the first two give back one image, the last a part of one.
FAMILIES: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("verbatim", "vm", "mv", "matching_verbatim", "rv", "retrieval_verbatim"), "verbatim"),
    **dict.fromkeys(("template", "tm", "tv", "template_verbatim"), "template"),
    **dict.fromkeys(("memorized", "memorised"), "memorized"),
    "plain": "plain",
    **dict.fromkeys(("novel", "other", "ordinary", "benign", "unmemorized", "unmemorised", "not_memorized"), "novel"),
}


def kind_of(family: str) -> Kind | None:
    """What a label means; None for a word that is not known."""
    return FAMILIES.get("_".join(family.casefold().replace("-", " ").split()))
