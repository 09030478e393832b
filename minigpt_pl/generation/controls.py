"""What is asked of a text: its length, and what may be drawn."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minigpt_pl.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Controls:
    """How texts are drawn. Checked when made; `filters` says what each does to the logits, and where it comes from.

    Attributes:
        vocab_size: V, of the network that these are for.
        num_tokens: new tokens, at least 1; a text that draws `end_id` has fewer.
        min_tokens: `end_id` is not drawn before this many, 0 to `num_tokens`.
        end_id: the token that ends a text; None: none does.
        temperature: 0 (the likeliest token each time) or above, finite.
        top_k: draw from this many likeliest, 1 to V; None: from all.
        top_p: draw from the fewest likeliest that have this much probability together, in (0, 1]; 1: from all.
        min_p: draw from those with at least this share of the likeliest's probability, in [0, 1]; 0: from all.
        typical_p: draw from those whose surprise is nearest to the mean, until they have this much probability
            together, in (0, 1]; 1: from all.
        repetition_penalty: over 1 makes what the text has already less likely, under 1 likelier; above 0, finite.
        no_repeat_ngram_size: no row of this many tokens comes twice; 0: any may.
        banned_ids: never drawn.
        banned_sequences: token ids that never follow each other like this.
        stop_sequences: token ids that end the text where they have come after each other, `min_tokens` reached. They
            stay in the text, as with Hugging Face's `stop_strings`, and may begin in the prompt.
        forced_ids: place in the continuation (0 the first) -> the token that stands there, banned or not.
        num_beams: texts that grow side by side in the search for the likeliest, 1 (greedy) to V / 2; above 1 only
            with `temperature` 0. `beams` says how.
        length_penalty: finished beams are compared by their log-probability over their length to this power; above 0
            favours long texts.

    Raises:
        InputError: one line for each value that is out of range.
    """

    vocab_size: int
    num_tokens: int = 60
    min_tokens: int = 0
    end_id: int | None = None
    temperature: float = 0.8
    top_k: int | None = 20
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    banned_ids: Sequence[int] = ()
    banned_sequences: Sequence[Sequence[int]] = ()
    stop_sequences: Sequence[Sequence[int]] = ()
    forced_ids: Mapping[int, int] = field(default_factory=dict)
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self):
        whole = ("num_tokens", "min_tokens", "top_k", "no_repeat_ngram_size", "num_beams")
        real = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")
        problems = [
            f"{name}={value!r}: must be a {kind}"
            for names, of, kind in ((whole, numbers.Integral, "whole number"), (real, numbers.Real, "number"))
            for name in names
            if isinstance(value := getattr(self, name), bool)
            or not (isinstance(value, of) or (name, value) == ("top_k", None))
        ]
        if problems:
            raise InputError(*problems)
        size = self.vocab_size
        rules = [
            ("num_tokens", self.num_tokens >= 1, "must be at least 1"),
            (
                "min_tokens",
                0 <= self.min_tokens <= max(self.num_tokens, 0),
                f"must be 0 to num_tokens={self.num_tokens}",
            ),
            (
                "temperature",
                math.isfinite(self.temperature) and self.temperature >= 0,
                "must be 0 (greedy) or a finite number above",
            ),
            (
                "top_k",
                self.top_k is None or 1 <= self.top_k <= size,
                f"must be 1 to {size}, the vocabulary's size, or null for all words",
            ),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1 (1: all words)"),
            ("min_p", 0 <= self.min_p <= 1, "must be 0 to 1 (0: all words)"),
            ("typical_p", 0 < self.typical_p <= 1, "must be above 0 and at most 1 (1: all words)"),
            (
                "repetition_penalty",
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "must be a finite number above 0 (1: no penalty)",
            ),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "must be at least 1, or 0 for no limit"),
            ("end_id", self.end_id is None or 0 <= self.end_id < size, f"must be 0 to {size - 1}, or null for no end"),
            ("banned_ids", all(0 <= id_ < size for id_ in self.banned_ids), f"must be 0 to {size - 1}"),
            *(
                (
                    name,
                    all(len(ids) > 0 and all(0 <= id_ < size for id_ in ids) for ids in getattr(self, name)),
                    f"must be lists of at least one id, each 0 to {size - 1}",
                )
                for name in ("banned_sequences", "stop_sequences")
            ),
            (
                "forced_ids",
                all(0 <= at < self.num_tokens and 0 <= id_ < size for at, id_ in self.forced_ids.items()),
                f"places must be 0 to {self.num_tokens - 1} (num_tokens={self.num_tokens}), ids 0 to {size - 1}",
            ),
            ("num_beams", 1 <= self.num_beams <= size // 2, f"must be 1 to {size // 2}, half the vocabulary's size"),
            (
                "num_beams",
                self.num_beams <= 1 or self.temperature == 0,
                "beams look for the likeliest text and draw nothing; give temperature=0, or num_beams=1",
            ),
            ("length_penalty", math.isfinite(self.length_penalty), "must be a finite number"),
            (
                "length_penalty",
                self.length_penalty == 1 or self.num_beams > 1 or not math.isfinite(self.length_penalty),
                "weighs beams by their length; give num_beams=2 or more too, or leave it at 1",
            ),
        ]
        problems = [f"{name}={getattr(self, name)}: {remedy}" for name, holds, remedy in rules if not holds]
        if len(set(self.banned_ids) | ({self.end_id} if self.min_tokens else set()) - {None}) >= size:
            problems.append(f"banned_ids: all {size} tokens are banned; leave some that can be drawn")
        if problems:
            raise InputError(*problems)

    @property
    def read_the_text(self) -> bool:
        """Whether what is drawn depends on the tokens before, other than through the network."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0 or len(self.banned_sequences) > 0

    def banned_at(self, place: int) -> list[int]:
        """The tokens that must not be drawn at this place of the continuation, whatever stands before it."""
        too_early = self.end_id is not None and place < self.min_tokens
        return [*self.banned_ids, *([self.end_id] if too_early else [])]
