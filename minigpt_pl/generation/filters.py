"""What is done to logits before a token is drawn. Pure functions, (B, V) -> (B, V)."""

from torch import Tensor


def ban(logits: Tensor, token_ids: list[int]) -> Tensor:
    """Tokens that must not be drawn."""
    return logits.index_fill(-1, logits.new_tensor(token_ids).long(), float("-inf"))


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens (Fan et al. 2018, arXiv 1805.04833; the seed's `sample_from`).

    Args:
        k: at least 1, at most V. Of equal logits at the border all are kept.
    """
    smallest_kept = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest_kept, float("-inf"))


def temperature(logits: Tensor, value: float) -> Tensor:
    """Divide by the temperature, above 0: under 1 sharpens, over 1 flattens the distribution.

    The largest logit becomes 0, so that no temperature, however small or large, gives an infinity but for what is
    left out already.
    """
    return (logits - logits.amax(dim=-1, keepdim=True)) / min(max(value, 1e-30), 1e30)
