"""The network: token and position embeddings, post-norm Transformer blocks, an output layer.

Plain PyTorch. Dimensions in names and comments: B batch, L length, D width (embed_dim), H heads, K head width
(head_dim), F hidden width of the feed-forward part, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPSILON = 1e-6  # the seed's; PyTorch's own default is 1e-5
EXPLICIT_LENGTH = 256  # on a CPU in bf16 the plain products take half the fused function's time up to here
EMBEDDING_RANGE = 0.05  # Keras's default for Embedding: uniform(-0.05, 0.05)


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """True where attention is forbidden: position i (row) must not see position j (column) when j > i.

    Returns:
        Bool tensor of shape (L, L), True strictly above the diagonal.
    """
    return torch.triu(torch.ones(length, length, dtype=torch.bool, device=device), diagonal=1)


class CausalSelfAttention(nn.Module):
    """Multi-head attention with heads of an explicit width, as Keras's `MultiHeadAttention(H, key_dim=K)`.

    `torch.nn.MultiheadAttention(D, H)` is another, smaller model: its heads share the width (K = D / H).
    """

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.query = nn.Linear(embed_dim, num_heads * head_dim)
        self.key = nn.Linear(embed_dim, num_heads * head_dim)
        self.value = nn.Linear(embed_dim, num_heads * head_dim)
        self.output = nn.Linear(num_heads * head_dim, embed_dim)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # (B, L, H*K) -> (B, H, L, K)

    def attention_weights(self, x: Tensor) -> Tensor:
        """The weights themselves, with the mask written out: what `forward` computes in fused form.

        Args:
            x: (B, L, D).

        Returns:
            (B, H, L, L); row i sums to 1 over the positions j <= i.
        """
        return self._weights(self._split_heads(self.query(x)), self._split_heads(self.key(x)))

    def _weights(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, L, K) twice -> (B, H, L, L)."""
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_dim)
        return scores.masked_fill(causal_mask(query.shape[-2], query.device), float("-inf")).softmax(dim=-1)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What later positions need of these: (B, L, D) -> (B, H, L, K) twice."""
        return self._split_heads(self.key(x)), self._split_heads(self.value(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        query, (key, value) = self._split_heads(self.query(x)), self.keys_and_values(x)
        if query.device.type == "cpu" and query.dtype == torch.bfloat16 and x.shape[1] <= EXPLICIT_LENGTH:
            mixed = self._weights(query, key) @ value  # (B, H, L, K)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # the same, fused
        return self.output(mixed.transpose(1, 2).flatten(-2))  # (B, H, L, K) -> (B, L, H*K) -> (B, L, D)


class Dropout(nn.Dropout):
    """`nn.Dropout`, three times as fast on a CPU: it draws 16 bits a value, so p is rounded to 1/65,536."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = (bits[: x.numel()] >= dropped - 2**15).view_as(x)
        return x * kept.to(x.dtype).mul_(1 / (1 - dropped / 2**16))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each followed by dropout, a sum and a norm: `norm(x + sublayer(x))`.

    Post-norm, as in "Attention Is All You Need" (arXiv 1706.03762) and in the seed; GPT-2 has pre-norm.
    """

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int, feed_forward_dim: int, dropout: float):
        super().__init__()
        self.attention = CausalSelfAttention(embed_dim, num_heads, head_dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(embed_dim, feed_forward_dim), nn.ReLU(), nn.Linear(feed_forward_dim, embed_dim)
        )
        self.attention_norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPSILON)
        self.feed_forward_norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPSILON)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.after_attention(x, self.attention(x))

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output, given its input and what the attention made of it: (..., D) twice -> (..., D)."""
        x = self.attention_norm(x + self.dropout(attended))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class MiniGPT(nn.Module):
    """The miniature GPT of the seed notebook. With the defaults it has exactly 10,939,168 parameters.

    Args:
        vocab_size: V, number of token ids, and of logits.
        max_length: longest input L; there is one learned position embedding for each place.
        embed_dim: D, width of the embeddings and of the blocks.
        num_heads: H, attention heads.
        head_dim: K, width of one head; None means `embed_dim`, as in the seed.
        feed_forward_dim: F, hidden width of the feed-forward part.
        num_blocks: Transformer blocks, one after the other; the seed has one.
        dropout: share of values dropped after the attention and after the feed-forward part, in [0, 1).
        tie_embeddings: the output layer uses the token embedding as its weight (arXiv 1608.05859).

    Weights start as Keras's defaults do: embeddings uniform in +-0.05, kernels Glorot uniform, biases zero.
    """

    def __init__(
        self,
        vocab_size: int = 20_000,
        max_length: int = 80,
        embed_dim: int = 256,
        num_heads: int = 2,
        head_dim: int | None = None,
        feed_forward_dim: int = 256,
        num_blocks: int = 1,
        dropout: float = 0.1,
        tie_embeddings: bool = False,
    ):
        super().__init__()
        head_dim = embed_dim if head_dim is None else head_dim
        self.vocab_size, self.max_length = vocab_size, max_length
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.position_embedding = nn.Embedding(max_length, embed_dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, num_heads, head_dim, feed_forward_dim, dropout) for _ in range(num_blocks)
        )
        self.output = nn.Linear(embed_dim, vocab_size)
        self.apply(_initialize_as_keras)
        if tie_embeddings:
            self.output.weight = self.token_embedding.weight

    def hidden_states(self, ids: Tensor) -> Tensor:
        """The last block's output, before the output layer.

        Args:
            ids: token ids, integers of shape (B, L) with L <= max_length.

        Returns:
            (B, L, D). Row i depends on ids 0..i only.
        """
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x

    def embed(self, ids: Tensor) -> Tensor:
        """The first block's input: ids (B, L) with L <= max_length -> (B, L, D)."""
        length = ids.shape[1]
        if length > self.max_length:
            raise ValueError(f"{length} tokens are more than the model's max_length={self.max_length}")
        positions = torch.arange(length, device=ids.device)
        return self.token_embedding(ids) + self.position_embedding(positions)  # (B, L, D) + (L, D)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) -> logits (B, L, V) and hidden states (B, L, D), the two outputs of the seed's model."""
        hidden = self.hidden_states(ids)
        return self.output(hidden), hidden


def _initialize_as_keras(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.uniform_(module.weight, -EMBEDDING_RANGE, EMBEDDING_RANGE)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # Glorot, on the (in, out) matrix: +-0.0884 for 256 -> 512
        nn.init.zeros_(module.bias)
