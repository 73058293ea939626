"""Who says a prompt in other words, and which of them are refused."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TOKENS, byte_tokenizer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, GPT2Config, GPT2LMHeadModel

from sd_guard.mitigation import Deletion, Generated, NearestMeaning, rewriters
from sd_guard.mitigation.rewriters import Lexicon, check_rewriter

TOKENIZER = byte_tokenizer()
WORDS = ["a", "b", "c", "d"]


def letter(word: str) -> int:
    """Token of a word of one letter."""
    return TOKENIZER(word, add_special_tokens=False).input_ids[0]


def near(**pairs: str) -> Lexicon:
    """A lexicon in which each key is nearer to its value than to any other word."""
    table = torch.eye(len(TOKENIZER))
    for one, other in pairs.items():
        table[letter(one)] += table[letter(other)] / 2
    return Lexicon(TOKENIZER, table)


def test_places_of_words() -> None:
    lexicon = Lexicon(TOKENIZER, None)
    places = lexicon.places(["a", "bcd", "e"], TOKENS)
    assert places == [range(1, 2), range(2, 5), range(5, 6)]
    ids = TOKENIZER("a bcd e").input_ids
    assert [TOKENIZER.decode(ids[place.start : place.stop]).strip() for place in places] == ["a", "bcd", "e"]


@given(st.lists(st.text("abc", min_size=1, max_size=6), max_size=12))
def test_words_that_are_cut_off_have_no_places(words: list[str]) -> None:
    """Places are those of the encoder's own reading, the first and last token apart."""
    read = TOKENIZER(" ".join(words), truncation=True, max_length=TOKENS).input_ids
    places = Lexicon(TOKENIZER, None).places(words, TOKENS)
    assert [i for place in places for i in place] == list(range(1, len(read) - 1))


def test_what_is_a_word() -> None:
    lexicon = Lexicon(TOKENIZER, None)
    assert lexicon.word(letter("k")) == "k"
    assert lexicon.word(letter("7")) == "7"
    no_words = [TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, letter(","), letter("kk")]
    assert [lexicon.word(token) for token in no_words] == [None] * 4


@given(st.sets(st.integers(0, 3)))
def test_deletion_leaves_the_rest(chosen: set[int]) -> None:
    rest = [word for i, word in enumerate(WORDS) if i not in chosen]
    assert Deletion().rewrite(WORDS, chosen, near()) == (" ".join(rest) if rest else None)


def test_the_nearest_word_by_its_token() -> None:
    assert NearestMeaning().rewrite(WORDS, {1, 3}, near(b="q", d="z")) == "a q c z"


def test_a_word_of_several_tokens_counts_as_their_mean() -> None:
    lexicon = near(y="q", z="q")  # y</w> and z</w>; of "xyz" only z</w> is one of these
    assert NearestMeaning().rewrite(["xyz", "a"], {0}, lexicon) == "q a"


def test_near_pieces_signs_and_the_word_itself_are_no_words() -> None:
    lexicon = near(b="q")
    assert lexicon.embeddings is not None
    own = lexicon.embeddings[letter("b")]
    for token in (letter("bb"), letter("B"), letter(","), TOKENIZER.eos_token_id):  # "bb" starts with a piece
        lexicon.embeddings[token] = own
    assert NearestMeaning().rewrite(WORDS, {1}, lexicon) == "a q c d"


def test_without_embeddings_no_word_is_near() -> None:
    assert NearestMeaning().rewrite(WORDS, {1}, Lexicon(TOKENIZER, None)) == "a b c d"


@dataclass(frozen=True)
class Mute:
    name: str = "mute"

    def rewrite(self, words: Sequence[str], chosen: Collection[int], lexicon: Lexicon) -> str | None:
        return " "


@dataclass(frozen=True)
class Parrot:
    name: str = "parrot"

    def rewrite(self, words: Sequence[str], chosen: Collection[int], lexicon: Lexicon) -> str | None:
        return " ".join(words)


@dataclass
class Counted:
    calls: int = 0
    name: str = "counted"

    def rewrite(self, words: Sequence[str], chosen: Collection[int], lexicon: Lexicon) -> str | None:
        self.calls += 1
        return "other words"


@pytest.fixture
def pipe(parts: dict[str, Any]) -> Any:
    """What a check looks at."""
    return SimpleNamespace(**parts)


@pytest.mark.parametrize("rewriter", [Mute(), Parrot()])
def test_a_rewriter_that_says_nothing_is_refused_when_it_is_configured(pipe: Any, rewriter: Any) -> None:
    with pytest.raises(ValueError, match=f"rewriter: {rewriter.name} returned nothing, or the same prompt"):
        check_rewriter(rewriter, pipe)


def test_a_rewriter_is_tried_once(pipe: Any) -> None:
    """Plans are checked before each call, and a generated answer is dear."""
    rewriter = Counted()
    for _ in range(3):
        check_rewriter(rewriter, pipe)
    assert rewriter.calls == 1


@pytest.mark.parametrize("rewriter", [Deletion(), NearestMeaning()])
def test_those_built_in_pass(pipe: Any, rewriter: Any) -> None:
    check_rewriter(rewriter, pipe)
    assert rewriter in rewriters._passed[pipe.tokenizer]


def test_pipelines_without_words_are_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="deletion rewrites words, and the pipeline has no tokenizer"):
        check_rewriter(Deletion(), SimpleNamespace(tokenizer=None))
    with pytest.raises(ValueError, match="nearest_meaning needs the text encoder's embeddings; use deletion"):
        check_rewriter(NearestMeaning(), SimpleNamespace(tokenizer=pipe.tokenizer, text_encoder=None))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-generation model in safetensors, of random weights but for one: it says nothing but q."""
    folder = tmp_path_factory.mktemp("language")
    size = len(TOKENIZER)
    ends = {"bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    config = GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=300, **ends)
    model = GPT2LMHeadModel(config)
    loud = model.transformer.wte.weight.data[letter("q")].mul_(100.0)  # the weights that tokens are read by, too
    model.transformer.ln_f.bias.data = 100 * loud
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def test_a_local_model_answers(language_model: Path, pipe: Any) -> None:
    """The likeliest answer: torch's global state is neither read nor moved."""
    rewriter = Generated(folder=str(language_model), max_tokens=3)
    check_rewriter(rewriter, pipe)
    state = torch.get_rng_state()
    assert rewriter.rewrite(WORDS, {1}, near()) == "q q q"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prompt_too_long_for_the_model_gets_no_answer(language_model: Path) -> None:
    """The instruction and 4 words are some 200 of its 300 tokens."""
    assert Generated(folder=str(language_model)).rewrite(WORDS * 20, {1}, near()) is None


def test_folders_without_a_model_are_refused(language_model: Path, tmp_path: Path, pipe: Any) -> None:
    """Pickled weights are not read, other models are not asked to write."""
    with pytest.raises(ValueError, match="holds no transformers model in safetensors"):
        Generated(folder=str(tmp_path / "nowhere")).check(pipe)
    with pytest.raises(ValueError, match="holds no transformers model in safetensors"):
        Generated(folder="gpt2").check(pipe)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((language_model / "config.json").read_text())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no transformers model in safetensors"):
        Generated(folder=str(pickled)).check(pipe)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in language_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="holds no text-generation model") as told:
        Generated(folder=str(broken)).check(pipe)
    assert "\n" not in str(told.value)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1))
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="holds no text-generation model"):
        Generated(folder=str(tmp_path / "encoder")).check(pipe)


@dataclass
class Scripted:
    """A tokenizer of code points, and a model that answers what it is told to."""

    answer: str
    chat_template: str | None = None
    asked: str = ""
    pad_token_id: int | None = None
    eos_token_id: int = 0
    device: str = "cpu"
    config: Any = None

    def __call__(self, text: str, **_: Any) -> Any:
        self.asked = text

        class Given(dict[str, Tensor]):
            def to(self, _device: str) -> Given:
                return self

        return Given(input_ids=torch.tensor([[ord(letter) for letter in text]]))

    def apply_chat_template(self, turn: list[dict[str, str]], **_: Any) -> str:
        return f"<user>{turn[0]['content']}<model>"

    def decode(self, ids: Tensor, **_: Any) -> str:
        return "".join(chr(i) for i in ids.tolist())

    def generate(self, input_ids: Tensor, **_: Any) -> Tensor:
        return torch.cat([input_ids, torch.tensor([[ord(letter) for letter in self.answer]])], dim=1)


@pytest.mark.parametrize("template", [None, "a template"])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("\n  a quick cat \nNote: I changed it", "a quick cat"),
        ('"a  quick cat"', "a quick cat"),
        ("   \n \n", None),
        ('""', None),
    ],
)
def test_the_first_line_of_an_answer_counts(
    monkeypatch: pytest.MonkeyPatch, answer: str, expected: str | None, template: str | None
) -> None:
    model = Scripted(answer + " " if answer.isspace() else answer, template)
    monkeypatch.setattr(rewriters, "_load", lambda _folder: (model, model))
    assert Generated(folder="x").rewrite(["a", "fast", "dog"], {1, 2}, near()) == expected
    assert '"fast", "dog"' in model.asked
    assert "Caption: a fast dog\n" in model.asked
    assert model.asked.startswith("<user>") == bool(template)
