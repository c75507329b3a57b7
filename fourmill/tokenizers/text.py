"""Text tokenizer: captions and detected objects as WordPiece ids, in 4M's vocabulary layout.

The only module that imports Hugging Face's `tokenizers`. Invariants: ids have no end marker and never pass
`max_tokens`; objects are never cut in two; text of strangers cannot spell a control token.

    0 [PAD]  1 [UNK]  2 [SOS]  3 [EOS]  then [S_0]… sentinels, v0=0… v1=0… v2=0… v3=0… coordinates, class names, pieces
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from fourmill.pipeline.codecs import token_dtype
from fourmill.pipeline.component import ComponentConfig
from fourmill.tokenizers import boxes
from fourmill.tokenizers.base import Tokenizer, TokenizerConfig
from fourmill.tokenizers.files import read_file

log = logging.getLogger(__name__)

FILE = "tokenizer.json"
_MAX_ALPHABET = 1000  # characters; BERT's limit, so that rare scripts do not eat the vocabulary
PAD, UNK, SOS, EOS = "[PAD]", "[UNK]", "[SOS]", "[EOS]"
# Control tokens as a stranger might write them; splitting the word keeps the letters and breaks the spell.
_CONTROL = re.compile(r"\[(?=(?:PAD|UNK|SOS|EOS|S_[0-9]+)\])|(?<=v[0-3])=(?=[0-9])")


class TextTokenizerConfig(TokenizerConfig):
    """Configuration of a text tokenizer."""

    max_tokens: int = 256
    """Longest row stored, in ids; longer texts are cut, objects at the border between two (4M: 256)."""
    min_score: float = boxes.MIN_SCORE
    """Detections below it are left out (4M: 0.6). No effect on text."""


class TextTokenizer(Tokenizer):
    """WordPiece ids of `caption`, `alt_text` (str) and `det` (list of objects)."""

    Config: ClassVar[type[ComponentConfig]] = TextTokenizerConfig
    version = 1
    gpus = 0.0
    config: TextTokenizerConfig  # type: ignore[assignment]

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(read_file(self.checkpoint, FILE), f"{FILE} of checkpoint {self.config.checkpoint!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_tokenizer"}

    def load(self, device: str) -> None:
        assert self._tokenizer is not None  # read now, so that a broken file stops the worker at its start

    @property
    def vocabulary(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @functools.cached_property
    def bins(self) -> int:
        """Values of a coordinate, as the vocabulary has them."""
        return count_tokens(self._tokenizer, "v0={}")

    def encode(self, values: Any) -> list[np.ndarray]:
        """B texts, or B lists of objects -> B arrays (n,), n <= max_tokens; an empty array for nothing."""
        rows = [self._objects(v) for v in values] if self.source == "det" else self._texts(values)
        return [np.asarray(row, dtype=token_dtype(self.vocabulary)) for row in rows]

    def decode(self, tokens: Sequence[np.ndarray]) -> list[Any]:
        """B arrays of ids -> B texts, or B lists of objects with score 1; what is no object is dropped and logged."""
        return [self.parse(row)[0] if self.source == "det" else self._text(row) for row in tokens]

    def parse(self, tokens: np.ndarray) -> tuple[list[dict[str, Any]], list[str]]:
        """Objects in a row of ids, and what of it was not one; never fails for ids of the vocabulary."""
        objects, problems = boxes.parse(self._text(tokens), self.bins)
        if problems:
            log.debug("%s: %d pieces are not objects, such as %s", self.name, len(problems), problems[0])
        return objects, problems

    def _texts(self, values: Sequence[str]) -> list[list[int]]:
        for value in values:
            if not isinstance(value, str):
                raise ValueError(f"{self.name}: a {self.source} of type {type(value).__name__}; str is needed")
        encoded = self._tokenizer.encode_batch([plain(value) for value in values], add_special_tokens=False)
        return [item.ids[: self.config.max_tokens] for item in encoded]

    def _objects(self, objects: Sequence[dict[str, Any]]) -> list[int]:
        phrases = boxes.serialise(objects, self.bins, self.config.min_score)
        row: list[int] = []
        for item in self._tokenizer.encode_batch(phrases, add_special_tokens=False):
            if len(row) + len(item.ids) > self.config.max_tokens:
                break  # the nearest objects come first; one that fits behind a longer one would break the order
            row += item.ids
        return row

    def _text(self, tokens: np.ndarray) -> str:
        ids = np.asarray(tokens).astype(np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise ValueError(f"{self.name}: ids {ids.min()}..{ids.max()}; 0..{self.vocabulary - 1} are known")
        end = np.flatnonzero(ids == self._tokenizer.token_to_id(EOS))
        ids = ids[: end[0]] if len(end) else ids
        dropped = [self._tokenizer.token_to_id(PAD), self._tokenizer.token_to_id(SOS)]
        return str(self._tokenizer.decode(ids[~np.isin(ids, dropped)].tolist(), skip_special_tokens=False))


def plain(text: str) -> str:
    """`text` with words that spell a control token or a coordinate taken apart."""
    return _CONTROL.sub(lambda match: f"{match[0]} ", text)


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
) -> bytes:
    """A `tokenizer.json` with 4M's layout and word pieces learned from `texts`, lower-cased.

    At most `vocabulary_size` entries; the same texts in any order give the same bytes. ValueError if the fixed entries
    alone are more, or if a class name is not lower case or given twice.
    """
    from tokenizers import AddedToken, trainers

    names = list(class_names)
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
