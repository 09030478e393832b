"""The hidden state of the newest token of each text, without a full forward pass per token.

B texts, W max_length, D width, H heads, K head width, P parts of a head (see `AbsorbedAttention`). Both decoders have
the same methods.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_pl.generation.inference import AbsorbedAttention, InferenceModel
from minigpt_pl.model import MiniGPT

SPARE_SLOTS = 64  # tokens that `OneBlockDecoder` appends before it moves the windows back to the start of its buffer


def start(model: InferenceModel, prompts: Sequence[Sequence[int]]) -> "OneBlockDecoder | KVCacheDecoder":
    """Make a decoder that has read the last `max_length` ids of each prompt. A prompt has at least one id."""
    if model.attention is None:
        return KVCacheDecoder(model.network, prompts)
    return OneBlockDecoder(model.network, model.attention, prompts)


class OneBlockDecoder:
    """Decoder for one block. The block's attention reads only embeddings, so keys and values are not needed.

    A buffer holds the windows of token embeddings, aligned at their ends. The attention adds the positions separately.
    When a full window slides, all its tokens change their positions, but nothing needs to be recomputed.
    """

    def __init__(self, network: MiniGPT, attention: AbsorbedAttention, prompts: Sequence[Sequence[int]]):
        self.block, self.attention = network.blocks[0], attention
        self.token_shift = network.arguments.token_shift
        self.embedding, self.positions = network.token_embedding.weight, network.position_embedding.weight
        self.size, width = self.positions.shape  # W, D
        prompts = [prompt[-self.size :] for prompt in prompts]
        self.shortest, self.longest = min(map(len, prompts)), max(map(len, prompts))
        self.slots = torch.arange(self.size, device=self.embedding.device)  # (W,), the slots of a window
        self.lengths = self.slots.new_tensor([len(prompt) for prompt in prompts])  # (B,), used until all are equal
        ids = self.slots.new_tensor([[0] * (self.size - len(prompt)) + [*prompt] for prompt in prompts])  # (B, W)
        self.end = self.size
        self.tokens = self.embedding.new_zeros(len(prompts), self.size + SPARE_SLOTS, width)
        self.tokens[:, : self.end] = F.embedding(ids, self.embedding)

    def append(self, ids: Tensor) -> None:
        """Append one token to each text: ids (B,)."""
        if self.end == self.tokens.shape[1]:
            self.tokens[:, : self.size] = self.tokens[:, -self.size :].clone()
            self.end = self.size
        self.tokens[:, self.end] = F.embedding(ids, self.embedding)
        self.end += 1
        if self.shortest < self.longest:
            self.lengths = (self.lengths + 1).clamp(max=self.size)
        self.shortest, self.longest = min(self.shortest + 1, self.size), min(self.longest + 1, self.size)

    def keep(self, rows: Tensor) -> None:
        """Keep only the texts of these rows, in this order."""
        self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]

    def last_hidden(self) -> Tensor:
        """Hidden state of the last token of each text (B, D): `MiniGPT.hidden_states(...)[:, -1]` up to rounding."""
        length, width = self.longest, self.tokens.shape[2]  # L, D
        window = self.tokens[:, self.end - length : self.end]  # (B, L, D)
        is_equal = self.shortest == self.longest
        positions = self.positions[length - 1] if is_equal else F.embedding(self.lengths - 1, self.positions)
        x = window[:, -1] + positions  # (B, D)
        query = self.attention.query(x).unflatten(1, (-1, width + self.size))  # (B, H*P, D + W)
        query, by_position = query[..., :width], query[..., width : width + length]  # (B, H*P, D), (B, H*P, L)
        if not is_equal:
            # Slot s holds position s - (L - own length), which is s + own length modulo L. Earlier slots are empty.
            empty = (self.slots[:length] < length - self.lengths[:, None])[:, None]  # (B, 1, L)
            by_position = self._roll(by_position, self.lengths).masked_fill_(empty, -math.inf)
        scores = torch.baddbmm(by_position, query, window.mT)  # (B, H*P, L) + (B, H*P, D) @ (B, D, L)
        if self.token_shift:
            first = 0 if is_equal else length - self.lengths[:, None, None]
            before = (self.slots[:length] - 1).clamp(min=first)  # (L,) or (B, 1, L): the slot of the token before
            before = before.expand(len(x), scores.shape[1] // 2, length)  # (B, H, L)
            scores = scores[:, ::2].gather(2, before) + scores[:, 1::2]  # (B, H, L)
        weights = scores.softmax(dim=-1)
        if self.token_shift:
            of_before = torch.zeros_like(weights).scatter_add(2, before, weights)
            weights = torch.stack([of_before, weights], dim=2).flatten(1, 2)  # (B, H*P, L)
        mixed = weights @ window  # (B, H*P, L) @ (B, L, D)
        if not is_equal:
            weights = self._roll(weights, -self.lengths)
        if length < self.size:
            weights = F.pad(weights, (0, self.size - length))  # (B, H*P, W)
        mixed = torch.cat([mixed, weights], dim=2)  # (B, H*P, D + W)
        return self.block.after_attention(x, self.attention.value(mixed.flatten(1)))

    def _roll(self, x: Tensor, shifts: Tensor) -> Tensor:
        """Roll each row to the left, by its own number of slots: (B, H*P, L), (B,) -> (B, H*P, L)."""
        length = x.shape[2]
        return x.gather(2, ((self.slots[:length] + shifts[:, None]) % length)[:, None].expand_as(x))


class KVCacheDecoder:
    """Decoder for any number of blocks. It caches keys and values while a text has at most W tokens.

    In a longer text, each new token changes the positions of all tokens, and so all keys and values. Then each token
    needs a full forward pass over the window.
    """

    def __init__(self, network: MiniGPT, prompts: Sequence[Sequence[int]]):
        self.network, self.size = network, network.max_length
        self.windows = [list(prompt[-self.size :]) for prompt in prompts]
        attention = network.blocks[0].attention
        shape = (len(network.blocks), 2, len(prompts), attention.num_heads, self.size, attention.head_dim)
        self.cache = network.output.weight.new_zeros(shape)  # (blocks, keys and values, B, H, W, K)
        self.slots = torch.arange(self.size, device=self.cache.device)
        longest = max(map(len, self.windows))  # L
        ids = self.slots.new_tensor([window + [0] * (longest - len(window)) for window in self.windows])  # (B, L)
        hidden = self._read(ids, self.slots[:longest].expand_as(ids))  # (B, L, D)
        self.hidden = hidden[torch.arange(len(ids)), [len(window) - 1 for window in self.windows]]  # (B, D)

    def append(self, ids: Tensor) -> None:
        """Append one token to each text: ids (B,)."""
        slid = [row for row, window in enumerate(self.windows) if len(window) == self.size]
        self.windows = [[*window, id_][-self.size :] for window, id_ in zip(self.windows, ids.tolist(), strict=True)]
        if len(slid) < len(ids):
            newest = ids.new_tensor([[len(window) - 1] for window in self.windows])  # (B, 1)
            self.hidden = self._read(ids[:, None], newest)[:, 0]  # wrong for windows that slid; replaced below
        if slid:
            full = ids.new_tensor([self.windows[row] for row in slid])  # (slid rows, W)
            self.hidden[slid] = self.network.hidden_states(full)[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Keep only the texts of these rows, in this order."""
        self.windows = [self.windows[row] for row in rows.tolist()]
        self.cache, self.hidden = self.cache[:, :, rows], self.hidden[rows]

    def last_hidden(self) -> Tensor:
        """Hidden state of the last token of each text (B, D): `MiniGPT.hidden_states(...)[:, -1]` up to rounding."""
        return self.hidden

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Put keys and values of new tokens into the cache. Ids and positions (B, N) -> hidden states (B, N, D)."""
        x: Tensor = self.network.token_embedding(ids) + self.network.position_embedding(positions)  # (B, N, D)
        rows, visible = torch.arange(len(ids))[:, None], (self.slots <= positions[..., None])[:, None]  # (B, 1, N, W)
        for block, cache in zip(self.network.blocks, self.cache, strict=True):
            query, *new = block.attention.project(x)  # (B, H, N, K) each, before the token shift
            cache[:, rows, :, positions] = torch.stack(new).permute(1, 3, 0, 2, 4)  # (B, N, 2, H, K)
            key, value = map(block.attention.shift, cache)  # (B, H, W, K)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)  # (B, H, N, K)
            x = block.after_attention(x, block.attention.merge_heads(mixed))
        return x
