r"""Words and their ids: the notebook's `TextVectorization` as a pipeline of the `tokenizers` library.

The rules:

- Change only A-Z to a-z, as `tf.strings.lower` does: `É` stays `É`.
- Replace `<br />` by a space.
- Each ASCII punctuation mark starts a new word: `it's real-life` -> `it 's real -life`. The backslash does not start a
  new word. The notebook forgets to escape it in a regular expression.
- Words end only at ASCII white space. A no-break space does not end a word.

Id 0 is `''` (padding), id 1 is `[UNK]`. Then come the words, the most frequent first. Equally frequent words are sorted
by their bytes, in descending order. The last id is `[END]`, the end of a text. The notebook never uses its last output.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

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


def split_words(text: str) -> list[str]:
    """The words of a text. Gives the same as the pipeline of `build_tokenizer`, but is four times as fast."""
    return _find_words(text.translate(_ASCII_LOWER).replace("<br />", " "))


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


def build_tokenizer(vocabulary: Sequence[str]) -> Tokenizer:
    """A word-level tokenizer. `tokenizers` and `PreTrainedTokenizerFast` can load its JSON file."""
    ids = {word: id_ for id_, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    lower = [normalizers.Replace(a, b) for a, b in zip(ascii_uppercase, ascii_lowercase, strict=True)]
    tokenizer.normalizer = normalizers.Sequence([*lower, normalizers.Replace("<br />", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Sequence([_add_spaces(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def _add_spaces() -> decoders.Decoder:
    return decoders.Replace(Regex(_TAKES_SPACE), " ")


def portable(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for other tools: `prompt + portable.decode(new_ids)` is the whole text.

    It keeps the space before the first word, and it calls the padding `[PAD]`. No text contains this word.
    """
    copy = build_tokenizer([PAD, *list_vocabulary(tokenizer)[1:]])
    copy.decoder = decoders.Sequence([_add_spaces(), decoders.Fuse()])
    return copy


def list_vocabulary(tokenizer: Tokenizer) -> list[str]:
    """The words in the order of their ids: the argument of `build_tokenizer`."""
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of the words and their ids."""
    return hashlib.sha256("\n".join(list_vocabulary(tokenizer)).encode()).hexdigest()[:16]


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        InputError: the file is missing, or it is not a tokenizer of minigpt_pl.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; the words of a run are in tokenizer.json, next to its run.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: not a tokenizer file ({error}); copy it again from its run") from error
    if tokenizer.id_to_token(PADDING_ID) != PADDING or tokenizer.id_to_token(UNKNOWN_ID) != UNKNOWN:
        raise InputError(f"{path}: not a tokenizer of minigpt_pl (ids 0 and 1 must be '' and '[UNK]')")
    return tokenizer
