"""What is done to logits before a token is drawn: pure functions, (..., V) -> (..., V), in Hugging Face's order.

| setting | function | what it is | source | in `transformers` |
|---|---|---|---|---|
| `repetition_penalty` | `repetition_penalty` | CTRL's penalty | arXiv 1909.05858 | `RepetitionPenaltyLogitsProcessor` |
| `no_repeat_ngram_size` | `no_repeat_ngram` | no n-gram twice | arXiv 1705.04304 | `NoRepeatNGramLogitsProcessor` |
| `banned_sequences` | `ban_sequences` | bad words | fairseq, arXiv 1904.01038 | `NoBadWordsLogitsProcessor` |
| `banned_ids` | `ban` | bad words of one token | as above | `NoBadWordsLogitsProcessor` |
| `min_tokens` | `ban` | no end before | as above | `MinNewTokensLengthLogitsProcessor` |
| `forced_ids` | `force` | a token in its place | BART, arXiv 1910.13461 | `ForcedEOSTokenLogitsProcessor` |
| `temperature` | `temperature` | Boltzmann's | Ackley et al. 1985 | `TemperatureLogitsWarper` |
| `top_k` | `top_k` | the k likeliest | arXiv 1805.04833, the seed | `TopKLogitsWarper` |
| `top_p` | `top_p` | the nucleus | arXiv 1904.09751 | `TopPLogitsWarper` |
| `min_p` | `min_p` | a share of the likeliest | arXiv 2407.01082 | `MinPLogitsWarper` |
| `typical_p` | `typical_p` | locally typical | arXiv 2202.00666 | `TypicalLogitsWarper` |

`process` applies the first six, `warp` the others; greedy decoding has no use for those. The same logits give the
same distribution as there, which is tested.

No filters, and so elsewhere: `stop_sequences` (the engine; `StoppingCriteria` there, whose stop strings heed no minimum
of tokens), `num_beams` and `length_penalty` (`beams`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt_pl.errors import DIVERGED, InputError
from minigpt_pl.generation.controls import Controls

INFINITY = float("inf")


def process(logits: Tensor, controls: Controls, texts: Tensor, place: int) -> Tensor:
    """What depends on the text so far or names tokens: all that must see the whole vocabulary.

    Args:
        logits: (B, V), as the network gives them.
        texts: (B, T), prompts and continuations so far, short ones filled up with -1 on the left.
        place: how many new tokens each has; the next one's place.

    Returns:
        (B, V).
    """
    if controls.repetition_penalty != 1:
        logits = repetition_penalty(logits, controls.repetition_penalty, texts)
    if controls.no_repeat_ngram_size:
        logits = no_repeat_ngram(logits, controls.no_repeat_ngram_size, texts)
    if controls.banned_sequences:
        logits = ban_sequences(logits, controls.banned_sequences, texts)
    logits = ban(logits, controls.banned_at(place))
    if place in controls.forced_ids:
        logits = force(logits, controls.forced_ids[place])
    return logits


def warp(logits: Tensor, controls: Controls) -> Tensor:
    """What shapes the distribution that is drawn from. What is out already, at -inf, may be missing altogether.

    Args:
        logits: (B, C), some of them above -inf.
        controls: with a temperature above 0.

    Returns:
        (B, C).
    """
    logits = temperature(logits, controls.temperature)
    if controls.top_k is not None and controls.top_k < logits.shape[-1]:
        logits = top_k(logits, controls.top_k)
    if controls.top_p < 1:
        logits = top_p(logits, controls.top_p)
    if controls.min_p > 0:
        logits = min_p(logits, controls.min_p)
    if controls.typical_p < 1:
        logits = typical_p(logits, controls.typical_p)
    return logits


def repetition_penalty(logits: Tensor, penalty: float, texts: Tensor) -> Tensor:
    """Divide a logit above 0 by the penalty, multiply one below with it, once for each token that the text has.

    Args:
        logits: (B, V).
        penalty: above 0; 1 changes nothing.
        texts: (B, T), filled up with -1.
    """
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(_mark(logits, texts), penalized, logits)


def no_repeat_ngram(logits: Tensor, size: int, texts: Tensor) -> Tensor:
    """Leave out what would complete a row of `size` tokens that the text has already.

    Args:
        logits: (B, V).
        size: at least 1.
        texts: (B, T), filled up with -1 on the left.
    """
    if texts.shape[1] < size:
        return logits
    ngrams = texts.unfold(1, size, 1)  # (B, T - size + 1, size)
    beginning = texts[:, texts.shape[1] + 1 - size :]  # (B, size - 1): the text's end may begin an n-gram
    repeats = (ngrams[..., :-1] == beginning[:, None]).all(dim=-1)  # (B, T - size + 1)
    return logits.masked_fill(_mark(logits, ngrams[..., -1].where(repeats, -1)), -INFINITY)


def ban_sequences(logits: Tensor, sequences: Sequence[Sequence[int]], texts: Tensor) -> Tensor:
    """Leave out the last token of each sequence where the text ends with the others.

    Args:
        logits: (B, V).
        sequences: token ids, at least one each.
        texts: (B, T), filled up with -1 on the left.
    """
    logits = logits.clone()
    for *beginning, last in sequences:
        logits[end_with(texts, beginning), last] = -INFINITY
    return logits


def end_with(texts: Tensor, ids: Sequence[int]) -> Tensor:
    """Which of the texts end with these ids: (B, T), filled up with -1 on the left -> (B,), true or false."""
    if len(ids) > texts.shape[1]:
        return torch.zeros(len(texts), dtype=torch.bool, device=texts.device)
    return (texts[:, texts.shape[1] - len(ids) :] == texts.new_tensor(ids)).all(dim=-1)


def ban(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Tokens that must not be drawn."""
    return logits.index_fill(-1, torch.tensor(token_ids, dtype=torch.long, device=logits.device), -INFINITY)


def force(logits: Tensor, token_id: int) -> Tensor:
    """The one token that must be drawn."""
    return torch.full_like(logits, -INFINITY).index_fill(-1, torch.tensor([token_id], device=logits.device), 0)


def temperature(logits: Tensor, value: float) -> Tensor:
    """Divide by the temperature, above 0: under 1 sharpens, over 1 flattens the distribution.

    The largest logit becomes 0, so that no temperature, however small or large, gives an infinity but for what is
    left out already.
    """
    return (logits - logits.amax(dim=-1, keepdim=True)) / min(max(value, 1e-30), 1e30)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens.

    Args:
        k: at least 1, at most V. Of equal logits at the border all are kept.
    """
    smallest_kept = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest_kept, -INFINITY)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest of the likeliest tokens whose probabilities sum to p or more.

    Args:
        p: above 0, at most 1. The likeliest token always stays.
    """
    ascending, order = logits.sort(dim=-1)
    out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p  # (B, V): it and all below it are not needed
    out[..., -1] = False
    return logits.masked_fill(out.scatter(-1, order, out), -INFINITY)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens with at least p times the likeliest one's probability.

    Args:
        p: 0 to 1.
    """
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -INFINITY)


def typical_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens whose surprise, -log probability, is nearest to its mean, until their probabilities sum to p.

    Args:
        p: above 0, at most 1.
    """
    log_probabilities = logits.log_softmax(dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).nansum(dim=-1, keepdim=True)  # 0 * -inf counts 0
    distance, order = (-log_probabilities - entropy).abs().sort(dim=-1)
    mass = logits.softmax(dim=-1).gather(-1, order).cumsum(dim=-1)
    last = (mass < p).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)  # (B, 1)
    out = distance > distance.gather(-1, last)
    return logits.masked_fill(out.scatter(-1, order, out), -INFINITY)


def require_a_choice(logits: Tensor, place: int) -> None:
    """Each row of (B, C) must have a token above -inf.

    Raises:
        InputError: the controls leave nothing, after `place` new tokens.
        ValueError: the network has diverged.
    """
    if logits.amax(dim=-1).isfinite().all():
        return
    if logits.isnan().any() or (logits == INFINITY).any():
        raise ValueError(DIVERGED)
    raise InputError(
        f"nothing is left to draw after {place} tokens: every token is banned, or would repeat an n-gram;"
        " raise no_repeat_ngram_size, or ban less"
    )


def _mark(logits: Tensor, ids: Tensor) -> Tensor:
    """True for each row's ids, (B, T) -> (B, V); -1 stands for none."""
    marks = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    return marks.scatter_(1, ids.where(ids >= 0, logits.shape[1]), True)[:, :-1]
