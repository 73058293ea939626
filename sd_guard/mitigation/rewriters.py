"""Who says a prompt in other words, and the words that a pipeline knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor

_TRIAL = "a photo of a red house by the sea".split()  # what a rewriter is tried on when the guard is enabled
_NEAREST = 200  # tokens that are looked through for one that is a word
_passed: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()  # rewriters by tokenizer: each is tried once


@dataclass(frozen=True, slots=True)
class Lexicon:
    """The words that a pipeline's text encoder knows.

    Attributes:
        tokenizer: of the prompts.
        embeddings: (V, width) input embeddings of the text encoder; None without one.
    """

    tokenizer: Any
    embeddings: Tensor | None

    def read(self, prompt: str) -> list[int]:
        """Tokens of a prompt, with the special ones, as diffusers' pipelines ask for them.

        A fast tokenizer keeps padding and truncation as state: asking otherwise could spoil another thread's call.
        """
        length = self.tokenizer.model_max_length
        return self.tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids

    def tokens(self, word: str) -> list[int]:
        """Of one word, as far as a prompt may be long; none of them special."""
        ids = self.read(word)
        return ids[1 : ids.index(self.tokenizer.eos_token_id, 1)]

    def word(self, token: int) -> str | None:
        """The word that a token is by itself; None for pieces, signs and special tokens."""
        text = self.tokenizer.decode([token]).strip()
        return text if text.isalnum() and self.tokens(text) == [token] else None

    def places(self, words: Sequence[str], tokens: int) -> list[range]:
        """Places of each word in an embedding of `tokens` places; empty for words that are cut off.

        CLIP's tokenizers merge nothing across white space, so that words may be read one by one.
        """
        ends = accumulate((len(self.tokens(word)) for word in words), initial=1)  # after the first special token
        return [range(start, min(end, tokens - 1)) for start, end in pairwise(ends)]


class Rewriter(Protocol):
    """Says a prompt otherwise.

    One that needs something of its own also has a method `check(pipe)`, which raises ValueError with one line for the
    user when the guard is enabled.
    """

    @property
    def name(self) -> str:
        """As in `REWRITERS`."""
        ...

    def rewrite(self, words: Sequence[str], chosen: Collection[int], lexicon: Lexicon) -> str | None:
        """The prompt without its chosen words; None where there is nothing to say.

        Args:
            words: of the prompt, as of `prompt.split()`.
            chosen: indices of the words that must not stay.
            lexicon: of the pipeline.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """Leaves the words out."""

    name: str = field(default="deletion", init=False)

    def rewrite(self, words: Sequence[str], chosen: Collection[int], lexicon: Lexicon) -> str | None:
        """What is left; None where that is nothing."""
        return " ".join(word for i, word in enumerate(words) if i not in chosen) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestMeaning:
    """Puts in each place the word whose token is nearest, by cosine, in the text encoder's own input embeddings.

    A word of several tokens counts as their mean. Costs no lanes. On the first reference checkpoint the words nearest
    to a rare name are other rare names, so that of 10 verbatim `tune` rows `TokenReplacement` rescues none by this,
    and 8 by `Deletion`.
    """

    name: str = field(default="nearest_meaning", init=False)

    def check(self, pipe: Any) -> None:
        """Refuses a pipeline whose text encoder has no embeddings at hand.

        Raises:
            ValueError: likewise.
        """
        if lexicon_of(pipe).embeddings is None:
            raise ValueError("rewriter: nearest_meaning needs the text encoder's embeddings; use deletion")

    def rewrite(self, words: Sequence[str], chosen: Collection[int], lexicon: Lexicon) -> str | None:
        """The prompt with near words; one without a neighbour stays."""
        others = [self._neighbour(word, lexicon) or word if i in chosen else word for i, word in enumerate(words)]
        return " ".join(others)

    def _neighbour(self, word: str, lexicon: Lexicon) -> str | None:
        own = lexicon.tokens(word)
        if lexicon.embeddings is None or not own:
            return None
        table = lexicon.embeddings.detach().float()
        alike = torch.nn.functional.cosine_similarity(table, table[own].mean(0, keepdim=True), dim=1)
        alike[own] = -torch.inf
        near = map(lexicon.word, alike.topk(min(_NEAREST, len(table))).indices.tolist())
        return next((other for other in near if other and other.casefold() != word.casefold()), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Has a local transformers text-generation model say it, word for word the likeliest.

    After Ross et al. (2024, arXiv 2411.00113), who ask GPT-4o for a caption of the same meaning with other words for
    the given ones. The model is read once, from safetensors only, and never from the network.

    Attributes:
        folder: of the model and its tokenizer.
        max_tokens: of an answer.
    """

    folder: str
    max_tokens: int = 60
    name: str = field(default="generated", init=False)

    def __post_init__(self) -> None:
        """Refuses settings that no run could use."""
        object.__setattr__(self, "folder", str(self.folder))  # a path could not be saved as JSON
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} leaves no room for an answer; give at least 1")

    def check(self, pipe: Any) -> None:
        """Refuses a folder without such a model, before it is read.

        Raises:
            ValueError: likewise.
        """
        folder = Path(self.folder)
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"rewriter: folder={self.folder!r} holds no transformers model in safetensors; "
                "give the folder that save_pretrained() wrote"
            )
        try:
            _load(self.folder)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"rewriter: folder={self.folder!r} holds no text-generation model ({reason}); give one that does"
            ) from error

    def rewrite(self, words: Sequence[str], chosen: Collection[int], lexicon: Lexicon) -> str | None:
        """The first line of the model's answer; None where that is blank, or the prompt too long for the model."""
        tokenizer, model = _load(self.folder)
        asked = _instruction(words, chosen)
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": asked}]
            asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        given = tokenizer(asked, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
        length, longest = given["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None)
        if longest is not None and length + self.max_tokens > longest:
            return None
        with torch.no_grad():
            answer = model.generate(
                **given,
                max_new_tokens=self.max_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        said = tokenizer.decode(answer[0, length:], skip_special_tokens=True)
        line = next((line for line in said.splitlines() if line.strip()), "")
        return " ".join(line.strip().strip("\"'`").split()) or None


REWRITERS: Final[Mapping[str, type[Any]]] = {
    "deletion": Deletion,
    "nearest_meaning": NearestMeaning,
    "generated": Generated,
}


def read_rewriter(rewriter: Rewriter | Mapping[str, Any]) -> Rewriter:
    """A rewriter, or the one whose name and settings these are.

    Raises:
        ValueError: settings of no rewriter.
    """
    if not isinstance(rewriter, Mapping):
        return rewriter
    options = {key: value for key, value in rewriter.items() if key != "name"}
    if rewriter.get("name") not in REWRITERS:
        raise ValueError(f"rewriter: name={rewriter.get('name')!r} is not one of {', '.join(REWRITERS)}")
    return REWRITERS[rewriter["name"]](**options)


def check_rewriter(rewriter: Rewriter, pipe: Any) -> None:
    """Refuses a rewriter that cannot work with a pipeline, or that has nothing to say: it is tried on a few words.

    Raises:
        ValueError: likewise.
    """
    if getattr(pipe, "tokenizer", None) is None:
        raise ValueError(f"rewriter: {rewriter.name} rewrites words, and the pipeline has no tokenizer; leave it out")
    if check := getattr(rewriter, "check", None):
        check(pipe)
    passed = _passed.setdefault(pipe.tokenizer, [])
    if rewriter in passed:
        return
    lexicon = lexicon_of(pipe)
    said = (rewriter.rewrite(_TRIAL, frozenset({i}), lexicon) for i, word in enumerate(_TRIAL) if len(word) > 2)
    if not any(prompt and prompt.strip() and prompt != " ".join(_TRIAL) for prompt in said):
        raise ValueError(
            f"rewriter: {rewriter.name} returned nothing, or the same prompt, for each word of a trial; use another one"
        )
    passed.append(rewriter)


def lexicon_of(pipe: Any) -> Lexicon:
    """The words of a pipeline; without embeddings where it has no text encoder, or its weights come and go."""
    encoder = getattr(pipe, "text_encoder", None)
    table = None if encoder is None else encoder.get_input_embeddings().weight
    return Lexicon(pipe.tokenizer, None if table is None or table.is_meta else table)


def _instruction(words: Sequence[str], chosen: Collection[int]) -> str:
    others = ", ".join(f'"{words[i]}"' for i in sorted(chosen))
    return (
        "Rewrite the caption below so that it means the same, but with other words in the place of these: "
        f"{others}. Change numbers to near numbers, and names to no name. Answer with the new caption alone.\n"
        f"Caption: {' '.join(words)}\nNew caption:"
    )


@lru_cache(maxsize=1)
def _load(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return tokenizer, model.eval()
