"""The tokenizer of the bundled model: byte pairs as CLIP's, and one token per word of the world."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from sefi_fast.tiny_world.captions import VOCABULARY

MAX_LENGTH = 32
_END = "</w>"


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """Find the merges of VOCABULARY's words, save the tokenizer, and return it as loaded.

    Any other word falls into letters, and any other character into bytes.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        min_frequency=1,
        end_of_word_suffix=_END,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(VOCABULARY, trainer)
    found = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found]
    pieces = [*alphabet, *(letter + _END for letter in alphabet)]
    pieces += [merge.replace(" ", "") for merge in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocabulary_file.write_text(json.dumps(vocabulary))
    merges_file.write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    made = CLIPTokenizer(str(vocabulary_file), str(merges_file), model_max_length=MAX_LENGTH)
    made.save_pretrained(folder)
    loaded = CLIPTokenizer.from_pretrained(folder)
    assert all(len(loaded(word).input_ids) == 3 for word in VOCABULARY)
    return loaded


class CaptionCodes:
    """A table of token ids, which is faster than the tokenizer."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self._ids = {word: tokenizer(word).input_ids[1] for word in VOCABULARY}
        self._start, self._end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def __call__(self, text: str) -> list[int]:
        """Return MAX_LENGTH ids: start, one per word, end, and end tokens as padding."""
        ids = [self._start, *(self._ids[word] for word in text.split())][: MAX_LENGTH - 1]
        return ids + [self._end] * (MAX_LENGTH - len(ids))
