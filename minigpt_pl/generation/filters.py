"""Changes to the logits before a token is drawn: pure functions, in the order of Hugging Face's `generate`.

Shapes: logits (B, V) before and after. texts (B, T): prompts and new tokens so far, padded with -1 on the left.
`position` is the number of new tokens so far.

| setting | function | meaning | source | in `transformers` |
|---|---|---|---|---|
| `repetition_penalty` | `repetition_penalty` | fewer repeats | arXiv 1909.05858 | `RepetitionPenaltyLogitsProcessor` |
| `no_repeat_ngram_size` | `no_repeat_ngram` | no n-gram twice | arXiv 1705.04304 | `NoRepeatNGramLogitsProcessor` |
| `banned_sequences` | `ban_sequences` | banned phrases | fairseq, arXiv 1904.01038 | `NoBadWordsLogitsProcessor` |
| `banned_ids` | `ban` | banned words of one token | fairseq | `NoBadWordsLogitsProcessor` |
| `min_tokens` | `ban` | the text does not end before this many tokens | fairseq | `MinNewTokensLengthLogitsProcessor` |
| `forced_ids` | `force` | tokens at given positions | BART, arXiv 1910.13461 | `ForcedEOSTokenLogitsProcessor` |
| `temperature` | `temperature` | sharper or flatter distribution | Ackley et al. 1985 | `TemperatureLogitsWarper` |
| `top_k` | `top_k` | the k likeliest | arXiv 1805.04833, the notebook | `TopKLogitsWarper` |
| `top_p` | `top_p` | nucleus sampling | arXiv 1904.09751 | `TopPLogitsWarper` |
| `min_p` | `min_p` | share of the highest probability | arXiv 2407.01082 | `MinPLogitsWarper` |
| `typical_p` | `typical_p` | locally typical sampling | arXiv 2202.00666 | `TypicalLogitsWarper` |

Greedy decoding needs only the first six. Tests compare the distributions with those of `transformers`.

These controls are not filters: `stop_sequences` (see `engine`), `num_beams` and `length_penalty` (see `beam_search`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt_pl.errors import DIVERGED, InputError
from minigpt_pl.generation.controls import Controls

INFINITY = float("inf")


def process(logits: Tensor, controls: Controls, texts: Tensor, position: int) -> Tensor:
    """Apply the first six filters of the table. Hugging Face calls them logits processors."""
    if controls.repetition_penalty != 1:
        logits = repetition_penalty(logits, controls.repetition_penalty, texts)
    if controls.no_repeat_ngram_size:
        logits = no_repeat_ngram(logits, controls.no_repeat_ngram_size, texts)
    if controls.banned_sequences:
        logits = ban_sequences(logits, controls.banned_sequences, texts)
    logits = ban(logits, controls.banned_at(position))
    if position in controls.forced_ids:
        logits = force(logits, controls.forced_ids[position])
    return logits


def warp(logits: Tensor, controls: Controls) -> Tensor:
    """Apply the others, Hugging Face's logits warpers. (B, C): the engine may pass only the C likeliest tokens."""
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
    """For the tokens of the text: divide positive logits by the penalty (> 0), multiply negative logits by it."""
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(_contains(texts, logits), penalized, logits)


def no_repeat_ngram(logits: Tensor, size: int, texts: Tensor) -> Tensor:
    """Exclude each token that would repeat an n-gram of the text. n is the size, at least 1."""
    if texts.shape[1] < size:
        return logits
    ngrams = texts.unfold(1, size, 1)  # (B, T - n + 1, n)
    prefix = texts[:, texts.shape[1] + 1 - size :]  # (B, n - 1), the last tokens
    repeats = (ngrams[..., :-1] == prefix[:, None]).all(dim=-1)  # (B, T - n + 1)
    return logits.masked_fill(_contains(ngrams[..., -1].where(repeats, -1), logits), -INFINITY)


def ban_sequences(logits: Tensor, sequences: Sequence[Sequence[int]], texts: Tensor) -> Tensor:
    """Exclude the last token of each sequence if the text ends with the tokens before it."""
    logits = logits.clone()
    for *prefix, last in sequences:
        logits[end_with(texts, prefix), last] = -INFINITY
    return logits


def end_with(texts: Tensor, ids: Sequence[int]) -> Tensor:
    """Which texts end with these ids: (B, T) -> (B,), bool."""
    if len(ids) > texts.shape[1]:
        return torch.zeros(len(texts), dtype=torch.bool, device=texts.device)
    return (texts[:, texts.shape[1] - len(ids) :] == texts.new_tensor(ids)).all(dim=-1)


def ban(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Exclude these tokens."""
    return logits.index_fill(-1, torch.tensor(token_ids, dtype=torch.long, device=logits.device), -INFINITY)


def force(logits: Tensor, token_id: int) -> Tensor:
    """Allow only this token, even if it is banned."""
    return torch.full_like(logits, -INFINITY).index_fill(-1, torch.tensor([token_id], device=logits.device), 0)


def temperature(logits: Tensor, value: float) -> Tensor:
    """Divide by the temperature (> 0). A value below 1 sharpens the distribution, a value above 1 flattens it.

    The largest logit is subtracted first, so that extreme temperatures do not overflow.
    """
    return (logits - logits.amax(dim=-1, keepdim=True)) / min(max(value, 1e-30), 1e30)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens, 1 <= k <= V, and all tokens with the same logit as the last of them."""
    smallest_kept = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest_kept, -INFINITY)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the likeliest tokens until they have probability p together, 0 < p <= 1. At least one token stays."""
    ascending, order = logits.sort(dim=-1)
    excluded = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p  # (B, V)
    excluded[..., -1] = False
    return logits.masked_fill(excluded.scatter(-1, order, excluded), -INFINITY)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens with at least p times the highest probability, 0 <= p <= 1."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -INFINITY)


def typical_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens with -log probability nearest to the entropy until they have probability p together, 0 < p <= 1."""
    log_probabilities = logits.log_softmax(dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).nansum(dim=-1, keepdim=True)  # nansum: 0 * -inf is 0
    distance, order = (-log_probabilities - entropy).abs().sort(dim=-1)
    total = logits.softmax(dim=-1).gather(-1, order).cumsum(dim=-1)
    last = (total < p).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)  # (B, 1)
    excluded = distance > distance.gather(-1, last)
    return logits.masked_fill(excluded.scatter(-1, order, excluded), -INFINITY)


def require_a_choice(logits: Tensor, position: int) -> None:
    """Check that each row of logits (B, C) has a token above -inf.

    Raises:
        InputError: the controls exclude every token.
        InputError: the network has diverged.
    """
    if logits.amax(dim=-1).isfinite().all():
        return
    if logits.isnan().any() or (logits == INFINITY).any():
        raise InputError(f"model: {DIVERGED}")
    raise InputError(
        f"no token is left after {position} new tokens: each one is banned or would repeat an n-gram; raise"
        " no_repeat_ngram_size, or ban fewer words"
    )


def _contains(ids: Tensor, logits: Tensor) -> Tensor:
    """Which tokens of the vocabulary are in each row of ids: (B, T), (B, V) -> (B, V), bool."""
    marks = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    return marks.scatter_(1, ids.where(ids >= 0, logits.shape[1]), True)[:, :-1]  # the extra column is for -1
