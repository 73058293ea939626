"""A CLIP tokenizer whose vocabulary holds every word of the reference world as one token, and any byte besides."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MAX_LENGTH = 40


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Byte-pair encoding with as many merges as make each word of `captions` one token."""
    words = sorted({word for caption in captions for word in caption.split()})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=20_000,
            min_frequency=1,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        _, merges_file = bpe.model.save(folder)
        lines = [line for line in Path(merges_file).read_text().splitlines() if not line.startswith("#version")]
    merges = [tuple(line.split(" ")) for line in lines]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=json.loads(json.dumps(vocab)), merges=merges, model_max_length=MAX_LENGTH)
