"""The sampling controls on token ids. `config.NumberControls` defines the controls that are numbers."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from minigpt_pl.config import NumberControls, WordControls, range_problems
from minigpt_pl.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(kw_only=True)
class Controls(NumberControls):
    """How tokens are chosen. The values are checked on creation. `filters` applies them to the logits.

    Attributes:
        vocab_size: V of the network.
        end_id: the token that ends a text; None if no token does.
        banned_ids: tokens that are never generated.
        banned_sequences: sequences of tokens that never occur among the new tokens.
        stop_sequences: sequences of tokens that end the text, once `min_tokens` is reached. They stay in the text, as
            with Hugging Face's `stop_strings`. They may begin in the prompt.
        forced_ids: position among the new tokens (0 is the first) -> the token at this position, even a banned one.

    The default `top_k` is limited to V. An explicit value above V is an error.

    Raises:
        InputError: one line per value that is out of range.
    """

    vocab_size: int
    end_id: int | None = None
    banned_ids: Sequence[int] = ()
    banned_sequences: Sequence[Sequence[int]] = ()
    stop_sequences: Sequence[Sequence[int]] = ()
    forced_ids: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.top_k == NumberControls.top_k:
            self.top_k = min(self.top_k or 0, self.vocab_size)
        if problems := [*range_problems(self)] or [*self._problems()]:
            raise InputError(*problems)

    def _problems(self) -> Iterator[str]:
        size, last = self.vocab_size, self.vocab_size - 1
        if self.min_tokens > self.num_tokens:
            yield f"min_tokens={self.min_tokens}: must be at most num_tokens={self.num_tokens}"
        if self.top_k is not None and self.top_k > size:
            yield f"top_k={self.top_k}: must be 1 to {size}, the size of the vocabulary, or None for all words"
        if self.num_beams > 1 and self.num_beams > size // 2:
            yield f"num_beams={self.num_beams}: must be at most {size // 2}, half the size of the vocabulary"
        if self.num_beams > 1 and self.temperature > 0:
            yield f"num_beams={self.num_beams}: beam search does not draw at random; set temperature=0, or num_beams=1"
        if self.num_beams == 1 and self.length_penalty != 1:
            yield f"length_penalty={self.length_penalty}: has no effect without beam search; set num_beams=2 or more"
        if self.end_id is not None and not 0 <= self.end_id < size:
            yield f"end_id={self.end_id}: must be 0 to {last}, or None for no end"
        if not all(0 <= id_ < size for id_ in self.banned_ids):
            yield f"banned_ids={self.banned_ids}: must be 0 to {last}"
        for name in ("banned_sequences", "stop_sequences"):
            sequences = getattr(self, name)
            if not all(len(ids) > 0 and all(0 <= id_ < size for id_ in ids) for ids in sequences):
                yield f"{name}={sequences}: must be lists of at least one id, each 0 to {last}"
        if not all(0 <= at < self.num_tokens and 0 <= id_ < size for at, id_ in self.forced_ids.items()):
            limits = f"positions must be 0 to {self.num_tokens - 1} (num_tokens={self.num_tokens}), ids 0 to {last}"
            yield f"forced_ids={self.forced_ids}: {limits}"
        if len({*self.banned_ids, *([self.end_id] if self.min_tokens else [])} - {None}) >= size:
            yield f"banned_ids: all {size} tokens are banned; leave at least one"

    @property
    def depend_on_text(self) -> bool:
        """Whether a control needs the tokens of the text so far."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0 or len(self.banned_sequences) > 0

    def banned_at(self, position: int) -> list[int]:
        """The tokens that no text may have at this position of its new tokens."""
        if self.end_id is not None and position < self.min_tokens:
            return [*self.banned_ids, self.end_id]
        return [*self.banned_ids]


def lists_controls(function: Function) -> Function:
    """Replace `**controls` by all controls in the signature, for `help` and for completion in notebooks."""
    signature = inspect.signature(function)
    named = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
    for control in fields(WordControls):
        if control.name not in signature.parameters:
            default = [] if control.default is MISSING else control.default
            kind = inspect.Parameter.KEYWORD_ONLY
            named.append(inspect.Parameter(control.name, kind, default=default, annotation=control.type))
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return function
