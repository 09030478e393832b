r"""Tokens and their ids, as a pipeline of the `tokenizers` library.

`word`, the default, follows the notebook's `TextVectorization`:

- Change only A-Z to a-z, as `tf.strings.lower` does: `É` stays `É`.
- Replace `<br />` by a space.
- Each ASCII punctuation mark starts a new word: `it's real-life` -> `it 's real -life`. The backslash does not start a
  new word. The notebook forgets to escape it in a regular expression.
- Words end only at ASCII white space. A no-break space does not end a word.

`char` has one token per Unicode character. `bpe` joins frequent pairs of characters within a word (Sennrich et al.,
arXiv 1508.07909). Both keep white space and line breaks, so decoding gives the text again, except rare characters.

Id 0 is `''` (padding), id 1 is `[UNK]`. Then come the words, the most frequent first. Equally frequent words are sorted
by their bytes, in descending order. The tokens of `bpe` have the order in which they were learned. The last id is
`[END]`, the end of a text. The notebook never uses its last output.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minigpt_pl.errors import InputError

PADDING, UNKNOWN, END = "", "[UNK]", "[END]"
PAD = "[PAD]"  # padding for other tools, which refuse an empty token
PADDING_ID, UNKNOWN_ID = 0, 1
NUM_SPECIAL = 3

_PUNCTUATION = r"""!"#$%&'()*+,\-./:;<=>?@\[\]^_`{|}~"""  # string.punctuation without the backslash
_SPACE = r" \t\n\x0b\x0c\r"
_WORD = rf"[{_PUNCTUATION}][^{_PUNCTUATION}{_SPACE}]*|[^{_PUNCTUATION}{_SPACE}]+"
_find_words = re.compile(_WORD).findall
_ASCII_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)

# Decoding puts a space before each word, except before
# - closing marks: . , ! ? ; : ) ] } % /
# - words that start with a hyphen and a letter: -life
# - a single ' or ", and the endings 's 't 'm 'd 're 've 'll.
# All these words start with a mark, and a mark always starts a word. So encode(decode(ids)) == ids.
_TAKES_SPACE = r"""\A(?![.,!?;:)\]}%/]|-[a-z]|'(?:s|t|m|d|re|ve|ll)?\z|"\z)"""


# GPT-2's pattern: a word with the space before it, a number, marks, or white space.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TRAINING_PIECES = 3_000_000  # BPE learns from so many; counts of a longer text are scaled down


class Rules(NamedTuple):
    """How a text is split into pieces. A piece is a token; with bpe it is a word of one or more tokens.

    Attributes:
        kind: word, bpe or char.
        lowercase: change A-Z to a-z.
    """

    kind: str = "word"
    lowercase: bool = True

    def __str__(self) -> str:
        return f"data.tokenizer={self.kind} with data.lowercase={str(self.lowercase).lower()}"

    def split(self, text: str) -> list[str]:
        """The pieces of a text. For words this is four times as fast as the pipeline of `build_tokenizer`."""
        if self.lowercase:
            text = text.translate(_ASCII_LOWER)
        if self.kind == "word":
            return _find_words(text.replace("<br />", " "))
        if self.kind == "char":
            return list(text)
        return [piece for piece, _ in _pre_tokenizer("bpe").pre_tokenize_str(text)]


NOTEBOOK = Rules()
split_words = NOTEBOOK.split


@cache
def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    if kind == "word":
        return pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    return pre_tokenizers.Split(Regex(r"[\s\S]" if kind == "char" else _GPT2), behavior="isolated")


def build_vocabulary(counts: Mapping[str, int], vocab_size: int) -> list[str]:
    """The words in the order of their ids.

    Args:
        counts: how often each word occurs.
        vocab_size: maximum number of entries, including the three special ones.

    Returns:
        `['', '[UNK]', most frequent word, ..., '[END]']`. Without `[END]` it equals
        `TextVectorization(max_tokens=vocab_size - 1).get_vocabulary()` of Keras.
    """
    by_frequency = sorted(counts, key=lambda word: (counts[word], word.encode()), reverse=True)
    return [PADDING, UNKNOWN, *by_frequency[: vocab_size - NUM_SPECIAL], END]


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs in the texts."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split_words(text))
    return counts


def build_tokenizer(
    vocabulary: Sequence[str], rules: Rules = NOTEBOOK, merges: Sequence[tuple[str, str]] = ()
) -> Tokenizer:
    """A tokenizer of these tokens. `tokenizers` and `PreTrainedTokenizerFast` can load its JSON file.

    Args:
        vocabulary: the tokens in the order of their ids.
        merges: the pairs that bpe joins, in the order in which they were learned.
    """
    ids = {word: id_ for id_, word in enumerate(vocabulary)}
    model = models.BPE(ids, [*merges], unk_token=UNKNOWN) if rules.kind == "bpe" else models.WordLevel(ids, UNKNOWN)
    tokenizer = Tokenizer(model)
    lower = [normalizers.Replace(a, b) for a, b in zip(ascii_uppercase, ascii_lowercase, strict=True)]
    line_break = [normalizers.Replace("<br />", " ")] if rules.kind == "word" else []
    tokenizer.normalizer = normalizers.Sequence([*(lower if rules.lowercase else []), *line_break])
    tokenizer.pre_tokenizer = _pre_tokenizer(rules.kind)
    is_word = rules.kind == "word"
    spaces = [_add_spaces(rules.lowercase), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(spaces) if is_word else decoders.Fuse()
    return tokenizer


def _add_spaces(lowercase: bool) -> decoders.Decoder:
    return decoders.Replace(Regex(_TAKES_SPACE if lowercase else f"(?i){_TAKES_SPACE}"), " ")


def train_bpe(counts: Mapping[str, int], vocab_size: int, lowercase: bool) -> Tokenizer:
    """Learn a bpe tokenizer.

    Args:
        counts: how often each piece of `Rules.split` occurs.
        vocab_size: maximum number of entries, including the three special ones. At most half of them are characters.
            Rarer characters become `[UNK]`.
    """
    tokenizer, size = Tokenizer(models.BPE()), max(vocab_size - NUM_SPECIAL, 1)
    share = min(_TRAINING_PIECES / max(sum(counts.values()), 1), 1)
    pieces = chain.from_iterable(repeat(piece, max(round(count * share), 1)) for piece, count in counts.items())
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=max(size // 2, 1), show_progress=False)
    tokenizer.train_from_iterator(pieces, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    merges = [(left, right) for left, right in learned["merges"]]
    return build_tokenizer([PADDING, UNKNOWN, *tokens, END], Rules("bpe", lowercase), merges)


def rules_of(tokenizer: Tokenizer) -> Rules:
    """The rules of a tokenizer of this file."""
    # The state of these parts is small. That of the whole tokenizer contains the vocabulary.
    splitter, normalizer = (json.loads(part.__getstate__()) for part in (tokenizer.pre_tokenizer, tokenizer.normalizer))
    is_char = splitter["pattern"]["Regex"] == r"[\s\S]"
    kind = "bpe" if isinstance(tokenizer.model, models.BPE) else "char" if is_char else "word"
    return Rules(kind, any(step.get("pattern") == {"String": "A"} for step in normalizer["normalizers"]))


def piece_encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """A function that gives the ids of a piece of `Rules.split`. It is faster than the whole pipeline."""
    ids, model = tokenizer.get_vocab(), tokenizer.model
    if isinstance(model, models.BPE):
        return lambda piece: [token.id for token in model.tokenize(piece)]
    return lambda piece: [ids.get(piece, UNKNOWN_ID)]


def portable(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for other tools: `prompt + portable.decode(new_ids)` is the whole text.

    It keeps the space before the first word, and it calls the padding `[PAD]`. No text contains this word.
    """
    copy, rules = rename_padding(tokenizer, PADDING, PAD), rules_of(tokenizer)
    if rules.kind == "word":
        copy.decoder = decoders.Sequence([_add_spaces(rules.lowercase), decoders.Fuse()])
    return copy


def rename_padding(tokenizer: Tokenizer, before: str, after: str) -> Tokenizer:
    """A copy with another name for the padding. `rename_padding(portable(tokenizer), PAD, PADDING)` is the tokenizer.

    Raises:
        ValueError: the padding is not called `before`.
    """
    model = json.loads(tokenizer.to_str())["model"]
    words, merges = list_vocabulary(tokenizer), [(left, right) for left, right in model.get("merges", ())]
    if words[PADDING_ID] != before:
        raise ValueError(f"its first entry is {words[PADDING_ID]!r}, not {before!r}")
    return build_tokenizer([after, *words[1:]], rules_of(tokenizer), merges)


def list_vocabulary(tokenizer: Tokenizer) -> list[str]:
    """The words in the order of their ids: the argument of `build_tokenizer`."""
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def content(tokenizer: Tokenizer) -> bytes:
    """What makes two tokenizers equal. For the notebook's rules, the words in the order of their ids."""
    is_notebook = rules_of(tokenizer) == NOTEBOOK
    return ("\n".join(list_vocabulary(tokenizer)) if is_notebook else str(tokenizer.to_str())).encode()


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of the tokens, their ids and the rules."""
    return hashlib.sha256(content(tokenizer)).hexdigest()[:16]


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        InputError: the file is missing, or it is not a tokenizer of minigpt_pl.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; give the tokenizer.json of a run (data.tokenizer also takes word, bpe and char)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: not a tokenizer file ({error}); copy it again from its run") from error
    if tokenizer.id_to_token(PADDING_ID) != PADDING or tokenizer.id_to_token(UNKNOWN_ID) != UNKNOWN:
        raise InputError(f"{path}: not a tokenizer of minigpt_pl (ids 0 and 1 must be '' and '[UNK]')")
    try:
        rules_of(tokenizer)
    except (KeyError, TypeError) as error:  # of other rules
        raise InputError(f"{path}: not a tokenizer of minigpt_pl; copy it again from its run") from error
    return tokenizer
