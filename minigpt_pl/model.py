"""The network: embeddings of tokens and positions, Transformer blocks, an output layer.

This file is plain PyTorch. It knows nothing about training and text. Dimensions in comments: B batch, L length,
D width (embed_dim), H heads, K head width (head_dim), F hidden width (feed_forward_dim), V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt_pl.config import ModelConfig, range_problems
from minigpt_pl.dropout import Dropout
from minigpt_pl.errors import InputError
from minigpt_pl.loss import linear_cross_entropy, token_losses

LAYER_NORM_EPSILON = 1e-6  # as in the notebook; PyTorch's default is 1e-5
EMBEDDING_RANGE = 0.05  # default of Keras's Embedding: uniform in +-0.05
# In bf16 on a CPU, up to this length, our own attention code takes half the time of scaled_dot_product_attention.
EXPLICIT_LENGTH = 256


class MiniGPT(nn.Module):
    """The miniature GPT of the notebook. By default it has the notebook's sizes: 10,939,168 parameters.

    Args:
        vocab_size: V, number of token ids.
        max_length: largest L; each position has a learned embedding.
        embed_dim: D, width of the embeddings and of the blocks.
        num_heads: H, attention heads.
        head_dim: K, width of one head. If None, it is `embed_dim`, as in the notebook.
        feed_forward_dim: F, hidden width of the feed-forward layers.
        num_blocks: number of Transformer blocks; the notebook has one.
        dropout: probability of dropout after attention and feed-forward layers, in [0, 1).
        tie_embeddings: use the token embedding as the output layer's weight (arXiv 1608.05859).
        token_shift: half of the channels of keys and values come from the token before; see `CausalSelfAttention`.

    Attributes:
        arguments: the arguments above. `head_dim` is a number here.
        activation_checkpointing: keep only the input of each block for the backward pass, which runs the block again
            (arXiv 1604.06174). False at first.

    Raises:
        InputError: one line per argument of a wrong type or out of range.

    Weights are initialized as in Keras: embeddings uniform in +-0.05, other matrices Glorot uniform, biases zero.
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
        token_shift: bool = False,
    ):
        super().__init__()
        sizes = (vocab_size, max_length, embed_dim, num_heads, head_dim, feed_forward_dim, num_blocks)
        self.arguments = ModelConfig(*sizes, dropout, tie_embeddings, token_shift)
        if problems := [*range_problems(self.arguments)]:
            raise InputError(*problems)
        self.arguments.head_dim = head_dim = embed_dim if head_dim is None else head_dim
        self.vocab_size, self.max_length = vocab_size, max_length
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.position_embedding = nn.Embedding(max_length, embed_dim)
        block_sizes = (embed_dim, num_heads, head_dim, feed_forward_dim)
        blocks = nn.ModuleList(TransformerBlock(*block_sizes, dropout, token_shift) for _ in range(num_blocks))
        self.blocks = cast(Sequence[TransformerBlock], blocks)
        self.output = nn.Linear(embed_dim, vocab_size)
        self.activation_checkpointing = False
        self.apply(_initialize_as_keras)
        if tie_embeddings:
            self.output.weight = self.token_embedding.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the next token at every position.

        Args:
            ids: (B, L) token ids, L <= max_length.

        Returns:
            Logits (B, L, V) and hidden states (B, L, D), the two outputs of the notebook's model.
        """
        hidden = self.hidden_states(ids)  # (B, L, D)
        return self.output(hidden), hidden

    def loss(
        self, ids: Tensor, targets: Tensor, ignore_index: int | None = None, seeds: Tensor | None = None
    ) -> Tensor:
        """The training loss: the sum over all targets of the negative log probability, in nats.

        It equals `F.cross_entropy(logits, targets, reduction="sum")`, and never stores all logits.

        Args:
            ids: (B, L) token ids, L <= max_length.
            targets: (B, L), the next token at every position.
            ignore_index: targets with this id do not count; None if all count.
            seeds: as in `hidden_states`.

        Returns:
            A scalar with derivatives.
        """
        hidden = self.hidden_states(ids, seeds)  # (B, L, D)
        return linear_cross_entropy(hidden, self.output.weight, self.output.bias, targets, ignore_index)

    def token_losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The loss of each target in nats, without derivatives: (B, L), (B, L) -> (B, L) in fp32."""
        return token_losses(self.hidden_states(ids), self.output.weight, self.output.bias, targets)

    def hidden_states(self, ids: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Ids (B, L) -> the last block's output (B, L, D). Position i depends only on ids 0 to i.

        Args:
            seeds: (B,) int64, random seeds of dropout, one per sequence. They must differ by at least 2 * num_blocks,
                because each layer adds its number. If None, PyTorch's global generator draws them.
        """
        x = self.embed(ids)  # (B, L, D)
        saves_memory = self.activation_checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks):
            of_block = None if seeds is None else seeds + 2 * number
            # (B, L, D)
            x = checkpoint(block, x, of_block, use_reentrant=False) if saves_memory else block(x, of_block)
        return x

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (B, L) -> the first block's input (B, L, D)."""
        length = ids.shape[1]
        if length > self.max_length:
            raise ValueError(f"max_length={self.max_length}: the input has {length} tokens; shorten it")
        positions = torch.arange(length, device=ids.device)  # (L,)
        x: Tensor = self.token_embedding(ids) + self.position_embedding(positions)  # (B, L, D) + (L, D)
        return x


class TransformerBlock(nn.Module):
    """Self-attention and a feed-forward network, each as `norm(x + dropout(sublayer(x)))`.

    The norm comes last, as in the notebook and in "Attention Is All You Need" (arXiv 1706.03762). In GPT-2 it is first.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        feed_forward_dim: int,
        dropout: float,
        token_shift: bool = False,
    ):
        super().__init__()
        self.attention = CausalSelfAttention(embed_dim, num_heads, head_dim, token_shift)
        self.feed_forward = nn.Sequential(
            nn.Linear(embed_dim, feed_forward_dim), nn.ReLU(), nn.Linear(feed_forward_dim, embed_dim)
        )
        self.attention_norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPSILON)
        self.feed_forward_norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPSILON)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D). The dropout uses `seeds` (B,) and `seeds + 1`."""
        return self.after_attention(x, self.attention(x), seeds)

    def after_attention(self, x: Tensor, attended: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Everything after the attention: x and attended (..., D) -> (..., D)."""
        x = self.attention_norm(x + self.dropout(attended, seeds))
        output: Tensor = self.feed_forward_norm(x + self.dropout(self.feed_forward(x), seeds, 1))
        return output


class CausalSelfAttention(nn.Module):
    """Multi-head attention. Each position attends to itself and earlier positions.

    Without `token_shift`, it equals Keras's `MultiHeadAttention(H, key_dim=K)`. In `torch.nn.MultiheadAttention(D, H)`,
    K is D / H.

    With `token_shift`, the first channels of each head's keys and values come from the token before. So a head attends
    to pairs of neighbouring tokens. The first token has none before it and keeps its own channels. The name is that of
    RWKV (arXiv 2305.13048), which mixes the two tokens with learned shares.

    Attributes:
        shifted_channels: number of these channels in each head: half of K, rounded up, or 0.
    """

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int, token_shift: bool = False):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.shifted_channels = (head_dim + 1) // 2 if token_shift else 0
        self.query = nn.Linear(embed_dim, num_heads * head_dim)
        self.key = nn.Linear(embed_dim, num_heads * head_dim)
        self.value = nn.Linear(embed_dim, num_heads * head_dim)
        self.output = nn.Linear(num_heads * head_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        query, *others = self.project(x)
        key, value = map(self.shift, others)
        if x.device.type == "cpu" and query.dtype == torch.bfloat16 and x.shape[1] <= EXPLICIT_LENGTH:
            mixed = _attention_weights(query, key) @ value  # (B, H, L, L) @ (B, H, L, K)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # same result
        return self.merge_heads(mixed)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, L, D) -> queries, keys and values, (B, H, L, K) each, before the token shift."""
        layers, heads = (self.query, self.key, self.value), (self.num_heads, self.head_dim)
        return tuple(layer(x).view(*x.shape[:2], *heads).transpose(1, 2) for layer in layers)

    def shift(self, x: Tensor) -> Tensor:
        """Token shift of keys or values (B, H, L, K). They must begin with the first token of the text."""
        if self.shifted_channels == 0:
            return x
        shifted, same = x[..., : self.shifted_channels], x[..., self.shifted_channels :]
        return torch.cat([torch.cat([shifted[:, :, :1], shifted[:, :, :-1]], dim=2), same], dim=3)

    def merge_heads(self, mixed: Tensor) -> Tensor:
        """(B, H, L, K) -> (B, L, D)."""
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))  # (B, L, H*K) -> (B, L, D)
        return output

    def attention_weights(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, L). Row i sums to 1 over the positions j <= i."""
        query, key, _ = self.project(x)
        return _attention_weights(query, self.shift(key))


def _attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax(query @ key.T / sqrt(K)), 0 for later positions (arXiv 1706.03762): (B, H, L, K) each -> (B, H, L, L)."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (B, H, L, L)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(diagonal=1)  # (L, L)
    return scores.masked_fill(later, -math.inf).softmax(dim=-1)


def _initialize_as_keras(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.uniform_(module.weight, -EMBEDDING_RANGE, EMBEDDING_RANGE)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # Glorot: +-sqrt(6 / (in + out))
        nn.init.zeros_(module.bias)
