"""A trained subject: its tokens, what they were made for, and whether they fit a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sefi_fast import __version__
from sefi_fast.conditioning.prompt import class_token_id
from sefi_fast.conditioning.text import token_table
from sefi_fast.errors import PromptError, SubjectFileError
from sefi_fast.subject import file

LEAST_SIMILARITY = 0.9


@dataclass(eq=False)
class Subject:
    """What training leaves behind: 2·S tokens for each text encoder (docs/method.md §1).

    Attributes:
        placeholder: the word that stands for the subject in prompts, such as "<me>".
        class_word: the general word that anchors it.
        tokens: one [S, 2, C] for each text encoder (axis 1: K row, V row), or [S, 1, C] if one row
            serves both streams; kept as a float32 copy on the CPU.
        class_embeddings: one [C] for each text encoder, the base model's class-word row; likewise.
        base_model: name or folder of the model it was trained on.
        settings: the training's settings (anything that JSON can hold).
        library_version: version of sefi_fast that trained it.
        history: what training saw; not kept in the file.
        summary: the history in brief, kept in the file.

    Raises:
        ValueError: on making one whose parts do not fit together, or hold NaN or infinity.
    """

    placeholder: str
    class_word: str
    tokens: list[Tensor]
    class_embeddings: list[Tensor]
    base_model: str
    settings: dict[str, Any] = field(default_factory=dict)
    library_version: str = __version__
    history: Any = None
    summary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.placeholder or self.placeholder.split() != [self.placeholder]:
            raise ValueError(
                f"a placeholder must be one word without spaces, got {self.placeholder!r}"
            )
        if not self.class_word.strip():
            raise ValueError("class_word is empty; name what the subject is (person, cat, toy)")
        # Copies, so that training that goes on does not change a subject already taken from it.
        self.tokens = [_own_copy(tokens) for tokens in self.tokens]
        self.class_embeddings = [_own_copy(row) for row in self.class_embeddings]
        if not self.tokens or len(self.tokens) != len(self.class_embeddings):
            raise ValueError(
                f"a subject needs tokens and a class embedding for each text encoder, got "
                f"{len(self.tokens)} and {len(self.class_embeddings)}"
            )
        first = self.tokens[0].shape[:2]
        for tokens, row in zip(self.tokens, self.class_embeddings, strict=True):
            shape = tuple(tokens.shape)
            if len(shape) != 3 or shape[0] < 1 or shape[1] not in (1, 2) or shape[:2] != first:
                raise ValueError(
                    "tokens must be [stages, 2, C], or [stages, 1, C], alike for all text "
                    f"encoders, got {[tuple(t.shape) for t in self.tokens]}"
                )
            if tuple(row.shape) != shape[2:]:
                raise ValueError(
                    f"a class embedding of shape {tuple(row.shape)} does not fit tokens of shape "
                    f"{shape}"
                )
            for name, values in (("tokens", tokens), ("class embedding", row)):
                if not bool(torch.isfinite(values).all()):
                    raise ValueError(f"the {name} of {self.placeholder!r} hold NaN or infinity")

    @property
    def stages(self) -> int:
        """Number of stages S."""
        return self.tokens[0].shape[0]

    @property
    def split(self) -> bool:
        """Whether K and V have rows of their own."""
        return self.tokens[0].shape[1] == 2

    def __repr__(self) -> str:
        kind = "K and V" if self.split else "tied"
        return (
            f"Subject({self.placeholder!r}, a {self.class_word}, {self.stages} stages {kind}, "
            f"trained on {self.base_model!r})"
        )

    def save(self, path: str | Path) -> None:
        """Writes the subject to one safetensors file, whole or not at all.

        The numbers are float32 up to a file of 100 KB (Stable Diffusion 1.x at S = 5: 34 KB) and
        rounded to float16 beyond (10 stages for two text encoders: 87 KB).

        Raises:
            OSError: the file cannot be written.
            ValueError: the settings hold something that JSON cannot.
        """
        file.write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Subject:
        """Reads a subject from the file that ``save`` wrote.

        Raises:
            SubjectFileError: the file is missing, damaged, of another kind or from a newer version.
        """
        return cls(**file.read(Path(path)))

    def check_fits(self, tokenizers: Sequence[Any], text_encoders: Sequence[Any]) -> None:
        """Checks that the subject was made for text encoders like these.

        The class word's embedding row is compared with the one the subject was trained from: a
        fine-tuned model is close to its base (cosine at least 0.9), another family is not.

        Raises:
            SubjectFileError: it was not; the message names the model it was trained on.
        """
        made_for = f"the subject {self.placeholder!r} was trained on {self.base_model!r}"
        if not len(tokenizers) == len(text_encoders) == len(self.tokens):
            raise SubjectFileError(
                f"{made_for} with {len(self.tokens)} text encoder(s), this pipeline has "
                f"{len(text_encoders)}; use it with a model of the same family"
            )
        for number, (tokenizer, text_encoder) in enumerate(
            zip(tokenizers, text_encoders, strict=True)
        ):
            own = self.class_embeddings[number]
            table = token_table(text_encoder)
            if table.embedding_dim != own.shape[0]:
                raise SubjectFileError(
                    f"{made_for}, whose text encoder is {own.shape[0]} wide; this pipeline's is "
                    f"{table.embedding_dim} wide; use it with a model of the same family"
                )
            try:
                class_id = class_token_id(tokenizer, self.class_word)
            except PromptError as error:
                raise SubjectFileError(
                    f"{made_for}, where {self.class_word!r} is one token; in this pipeline it is "
                    "not; use it with a model of the same family"
                ) from error
            row = _table_row(table, class_id)
            similarity = torch.cosine_similarity(row, own.cpu(), dim=0).item()
            if not similarity >= LEAST_SIMILARITY:
                raise SubjectFileError(
                    f"{made_for}; this pipeline's embedding of {self.class_word!r} is another "
                    f"(cosine similarity {similarity:.2f}, needed {LEAST_SIMILARITY}); use it "
                    "with that model or a fine-tuned version of it"
                )


def _own_copy(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float32, copy=True)


def _table_row(table: nn.Module, token_id: int) -> Tensor:
    # Called, not read from its weight: offloading keeps an empty weight until the module runs.
    device = next(table.parameters()).device
    index = torch.tensor([token_id], device="cpu" if device.type == "meta" else device)
    with torch.no_grad():
        return table(index)[0].float().cpu()
