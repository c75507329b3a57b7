"""Text tokenizer: captions, objects, palettes and metadata as WordPiece ids, in 4M's vocabulary layout.

The only module that imports Hugging Face's `tokenizers`. Invariants: ids have no end marker and never pass
`max_tokens`; objects are never cut in two; text of strangers cannot spell a control token.

    0 [PAD]  1 [UNK]  2 [SOS]  3 [EOS]  then [S_0]… sentinels, v0=0… v1=0… v2=0… v3=0… numbers, class names, markers,
    pieces
"""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fourmill.pipeline.codecs import token_dtype
from fourmill.pipeline.component import ComponentConfig
from fourmill.tokenizers.base import Tokenizer, TokenizerConfig
from fourmill.tokenizers.files import read_file
from fourmill.tokenizers.sequences import boxes, palettes
from fourmill.tokenizers.sequences.bins import plain
from fourmill.tokenizers.sequences.formats import FORMATS, Format

log = logging.getLogger(__name__)

FILE = "tokenizer.json"
_MAX_ALPHABET = 1000  # characters; BERT's limit, so that rare scripts do not eat the vocabulary
PAD, UNK, SOS, EOS = "[PAD]", "[UNK]", "[SOS]", "[EOS]"
# Words of 4M's serialisations; a vocabulary in which each is one token makes its rows as short as 4M's.
MARKERS = ("point", "polygon", "none", "human", "pose", "global", "camera", "shape")


class SequenceTokenizerConfig(TokenizerConfig):
    """Configuration of every tokenizer that makes text tokens; `checkpoint` is the vocabulary, a folder or a file."""

    max_tokens: int = Field(default=256, ge=1)
    """Longest row stored, in ids; longer texts are cut, objects at the border between two (4M: 256)."""


class SequenceTokenizer(Tokenizer):
    """A vocabulary, phrases to rows of ids, and rows to text. Subclasses make the phrases and read the text."""

    Config: ClassVar[type[ComponentConfig]] = SequenceTokenizerConfig
    gpus = 0.0
    config: SequenceTokenizerConfig  # type: ignore[assignment]

    def __init__(self, name: str, config: ComponentConfig) -> None:
        super().__init__(name, config)
        self._cut: list[int] = []  # phrases left out of each row that was too long

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """In a folder `tokenizer.json`; or the file itself, as 4M's text_tokenizer_4m_wordpiece_30k.json comes."""
        place = Path(self.checkpoint.location)
        data = place.read_bytes() if place.is_file() else read_file(self.checkpoint, FILE)
        return open_tokenizer(data, f"the vocabulary {self.config.checkpoint!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_tokenizer"}

    def load(self, device: str) -> None:
        assert self._tokenizer is not None  # read now, so that a broken file stops the worker at its start

    @property
    def vocabulary(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @functools.cached_property
    def bins(self) -> int:
        """Values of each kind of number word, as the vocabulary has them."""
        return count_tokens(self._tokenizer, "v0={}")

    @property
    def whole(self) -> bool:
        """Whether a row is cut only between two phrases."""
        return True

    def take_notes(self) -> list[str]:
        cut, self._cut = self._cut, []
        what = f" ({sum(cut)} objects left out)" if self.whole else ""
        return [f"{self.name}: {len(cut)} rows cut at {self.config.max_tokens} tokens{what}"] if cut else []

    def rows(self, phrases: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """The phrases of B values -> B arrays of ids (n,), n <= max_tokens."""
        flat = [phrase for row in phrases for phrase in row]
        encoded = iter(self._tokenizer.encode_batch(flat, add_special_tokens=False))
        return [self._row([next(encoded).ids for _ in row]) for row in phrases]

    def _row(self, phrases: Sequence[list[int]]) -> np.ndarray:
        row: list[int] = []
        for number, ids in enumerate(phrases):
            if len(row) + len(ids) > self.config.max_tokens:
                # One that fits behind a longer one would break the order, such as nearest first.
                row += [] if self.whole else ids[: self.config.max_tokens - len(row)]
                self._cut.append(len(phrases) - number)
                break
            row += ids
        return np.asarray(row, dtype=token_dtype(self.vocabulary))

    def text(self, tokens: np.ndarray) -> str:
        """What a row of ids says, up to its end marker; ValueError for ids beyond the vocabulary."""
        ids = np.asarray(tokens).astype(np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise ValueError(f"{self.name}: ids {ids.min()}..{ids.max()}; 0..{self.vocabulary - 1} are known")
        end = np.flatnonzero(ids == self._tokenizer.token_to_id(EOS))
        ids = ids[: end[0]] if len(end) else ids
        dropped = [self._tokenizer.token_to_id(PAD), self._tokenizer.token_to_id(SOS)]
        return str(self._tokenizer.decode(ids[~np.isin(ids, dropped)].tolist(), skip_special_tokens=False))


class TextTokenizerConfig(SequenceTokenizerConfig):
    """Configuration of a text tokenizer. Each setting after `max_tokens` names the sources it is for."""

    min_score: float = boxes.MIN_SCORE
    """det, instance: those below it are left out (4M: 0.6)."""
    order: boxes.Order = "distance"
    """det, instance: nearest to the top left corner first (4M), 'score' or 'area' for the best or largest first."""
    colors: Literal["varied"] | Annotated[int, Field(ge=1, le=palettes.MOST)] = "varied"
    """color_palette: how many, 1 to 7; 'varied': 1 to 7 as the palette's content falls (4M draws it)."""
    tolerance: float = Field(default=0.005, ge=0, le=0.5)
    """instance: how far an outline may be from the mask's, in sides of the picture; 0.005 is 1.1 pixels of 224."""
    max_outlines: int = Field(default=4, ge=1)
    """instance: most separate pieces of one object; the longest outlines are written."""
    size: int = Field(default=224, ge=1, le=4096)
    """instance: side of the masks that decoding gives back, in pixels. Tokens do not depend on it."""


class TextTokenizer(SequenceTokenizer):
    """Text tokens of the sources in the table of formats."""

    Config: ClassVar[type[ComponentConfig]] = TextTokenizerConfig
    version = 1
    config: TextTokenizerConfig  # type: ignore[assignment]

    def __init__(self, name: str, config: ComponentConfig) -> None:
        super().__init__(name, config)
        if self.source not in FORMATS:
            raise ValueError(f"{name}: no text format for {self.source}; there are some for {', '.join(FORMATS)}")
        used = {*SequenceTokenizerConfig.model_fields, *self.format.writes, *self.format.reads}
        for setting in sorted(self.config.model_fields_set - used):
            log.warning("%s: %s has no effect on %s", name, setting, self.source)

    @property
    def format(self) -> Format:
        return FORMATS[self.source]

    @property
    def whole(self) -> bool:
        return self.format.whole

    def lineage(self) -> dict[str, Any]:
        """Of the settings that came after `min_score`, only those that this source's text depends on, and only where
        they are not the defaults: rows made before they existed are the same rows."""
        lineage = super().lineage()
        for name in ("order", "colors", "tolerance", "max_outlines", "size"):
            default = TextTokenizerConfig.model_fields[name].default
            if name not in self.format.writes or lineage["config"][name] == default:
                lineage["config"].pop(name)
        return lineage

    def encode(self, values: Any) -> list[np.ndarray]:
        """B values of the source -> B arrays (n,), n <= max_tokens; an empty array for nothing."""
        settings = self._settings(self.format.writes)
        return self.rows([self.format.serialise(value, self.bins, **settings) for value in values])

    def decode(self, tokens: Sequence[np.ndarray]) -> list[Any]:
        """B arrays of ids -> B values of the source; what is no part of one is dropped and logged."""
        return [self.parse(row)[0] for row in tokens]

    def parse(self, tokens: np.ndarray) -> tuple[Any, list[str]]:
        """The value in a row of ids, and what of it was none; never fails for ids of the vocabulary."""
        value, problems = self.format.parse(self.text(tokens), self.bins, **self._settings(self.format.reads))
        if problems:
            log.debug("%s: %d pieces cannot be read, such as %s", self.name, len(problems), problems[0])
        return value, problems

    def _settings(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in names}


def open_tokenizer(data: bytes, where: str) -> Any:
    """The Hugging Face tokenizer in a `tokenizer.json`; ValueError if it is not one, or not in 4M's layout."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders

    try:
        tokenizer = HFTokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception for every fault
        raise ValueError(f"{where} is not a Hugging Face tokenizer: {error}") from error
    wrong = [token for i, token in enumerate((PAD, UNK, SOS, EOS)) if tokenizer.token_to_id(token) != i]
    if wrong or tokenizer.token_to_id("[S_0]") != 4 or tokenizer.token_to_id("v3=0") is None:
        raise ValueError(
            f"{where} is not in 4M's layout: [PAD], [UNK], [SOS], [EOS], [S_0]… from id 0, v0=0… are needed"
        )
    if tokenizer.decoder is None:
        tokenizer.decoder = decoders.WordPiece()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def count_tokens(tokenizer: Any, pattern: str) -> int:
    """How many tokens of a numbered kind, such as '[S_{}]', the vocabulary has."""
    number = 0
    while tokenizer.token_to_id(pattern.format(number)) is not None:
        number += 1
    return number


def vocabulary_size(data: bytes) -> int:
    """Entries of a `tokenizer.json`."""
    return int(open_tokenizer(data, FILE).get_vocab_size())


def train_text_tokenizer(
    texts: Iterable[str],
    vocabulary_size: int,
    num_sentinels: int,
    coordinate_bins: int,
    class_names: Sequence[str] = (),
    markers: Sequence[str] = (),
) -> bytes:
    """A `tokenizer.json` with 4M's layout and word pieces learned from `texts`, lower-cased.

    `markers`: further words that are one token each, such as `MARKERS`. At most `vocabulary_size` entries; the same
    texts in any order give the same bytes. ValueError if the fixed entries alone are more, or if a class name or marker
    is not lower case or given twice.
    """
    from tokenizers import AddedToken, trainers

    names = [*class_names, *markers]
    bad = [name for name in names if name != name.lower() or not name.strip() or names.count(name) > 1]
    if bad:
        raise ValueError(f"bad class name {bad[0]!r}: lower case, not empty, and given once")
    fixed = [PAD, UNK, SOS, EOS, *(f"[S_{i}]" for i in range(num_sentinels))]
    fixed += [f"v{axis}={i}" for axis in range(4) for i in range(coordinate_bins)]
    if len(fixed) + len(names) > vocabulary_size:
        raise ValueError(f"vocabulary_size {vocabulary_size} is less than the {len(fixed) + len(names)} fixed tokens")
    tokenizer = _empty_tokenizer()
    words = _count_words(tokenizer, texts)
    alphabet, continuing = _characters(words)
    # single_word: 'boxes' must not become 'box' and a stray 'es'.
    whole = [AddedToken(name, single_word=True, normalized=True, special=True) for name in names]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[*fixed, *whole, *continuing],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    tokenizer.train_from_iterator(_repeated(words), trainer)
    result = json.loads(tokenizer.to_str())
    result["added_tokens"] = [token for token in result["added_tokens"] if token["content"] not in set(continuing)]
    return json.dumps(result, ensure_ascii=False).encode()


def _empty_tokenizer() -> Any:
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    tokenizer = HFTokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _count_words(tokenizer: Any, texts: Iterable[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(plain(text))
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    return words


def _characters(words: Counter[str]) -> tuple[list[str], list[str]]:
    """The commonest characters, and those of them that occur inside a word, as '##c'; both sorted.

    The trainer numbers '##c' in the order of a randomly seeded hash map, and breaks ties by number: two runs would
    learn different pieces. Given as special tokens they have their numbers beforehand.
    """
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    kept = {c for c, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_MAX_ALPHABET]}
    inside = {character for word in words for character in word[1:]}
    return sorted(kept), [f"##{character}" for character in sorted(kept & inside)]


def _repeated(words: Counter[str]) -> Iterator[str]:
    """Every word as often as it occurred, at most 1,000 to a line."""
    for word, count in sorted(words.items()):
        for start in range(0, count, 1000):
            yield " ".join([word] * min(1000, count - start))
