"""The last hidden state of texts that grow by one token at a time, without a full forward for each.

B texts, R rows (B filled up, see `fill_up`), W the model's max_length, T tokens, D width, H heads, K head width.

Every product has the same shape alone and in company, but for the number of rows, so that a text does not depend on
what stands beside it. `start` makes the one that fits the model.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_pl.model import MiniGPT

ROWS = 4


def fill_up(x: Tensor) -> Tensor:
    """(B, ...) -> (R, ...): rows of zeros up to a multiple of 4.

    MKL takes other kernels, which add up in another order, for the 1 to 3 rows that are left over: with the rows
    filled up a row's product is the same, bit for bit, in any batch (measured with 1 and 2 threads; tested).
    """
    return torch.cat([x, x.new_zeros(-len(x) % ROWS, *x.shape[1:])]) if len(x) % ROWS else x


def start(model: MiniGPT, prompts: Sequence[Sequence[int]]) -> "LookupDecoder | CacheDecoder":
    """A decoder that has read the prompts.

    Args:
        model: in eval mode.
        prompts: token ids, at least one each; of long ones the last `max_length` count.
    """
    return (LookupDecoder if len(model.blocks) == 1 else CacheDecoder)(model, prompts)


class LookupDecoder:
    """For one block: its attention reads embeddings, so nothing has to be computed for the tokens before.

    The score of query x_i on key x_j is (Wq x_i + bq) . (Wk x_j + bk). With q_i = Wk' (Wq x_i + bq) it is q_i . x_j
    and a term that is the same for all j, which the softmax does not see. Likewise the attention's output is
    Wo Wv (sum of weight_j x_j) and a constant. So the products of the matrices are made once ("absorbed" as in
    DeepSeek-V2's attention, arXiv 2405.04434), and keys and values are the embeddings themselves.

    As x_j = token + position, the window holds the token's part, in a ring, and the position's part is added at each
    step: when the window slides and every position changes, nothing is computed anew.
    """

    def __init__(self, model: MiniGPT, prompts: Sequence[Sequence[int]]):
        self.block, attention = model.blocks[0], model.blocks[0].attention
        self.tokens, self.positions = model.token_embedding.weight, model.position_embedding.weight  # (V, D), (W, D)
        size, width = self.positions.shape
        heads = (attention.num_heads, attention.head_dim)
        layers = (attention.query, attention.key, attention.value)
        query, key, value = (layer.weight.unflatten(0, heads) for layer in layers)  # (H*K, D) -> (H, K, D)
        scale = 1 / math.sqrt(attention.head_dim)
        self.query = (query.mT @ key).permute(1, 0, 2).flatten(1) * scale  # (H, D, D) -> (D, H*D)
        self.query_bias = (attention.query.bias.view(heads)[:, None] @ key).flatten() * scale  # (H*D,)
        output = attention.output.weight.unflatten(1, heads).permute(1, 2, 0)  # (D, H*K) -> (H, K, D)
        self.value = (value.mT @ output).flatten(0, 1)  # (H, D, D) -> (H*D, D)
        self.value_bias = F.linear(attention.value.bias, attention.output.weight, attention.output.bias)  # (D,)
        self.num_heads = attention.num_heads

        device = self.positions.device
        prompts = [prompt[-size:] for prompt in prompts]
        self.count = len(prompts)
        # Slot `newest` of the ring is the newest token, the one before it is next older, and so on around.
        self.newest = size - 1
        self.window = self.positions.new_zeros(self.count + -self.count % ROWS, size, width)  # (R, W, D)
        for row, prompt in enumerate(prompts):
            self.window[row, size - len(prompt) :] = self.tokens[torch.tensor(prompt, device=device)]
        # Slots that a text does not fill yet. A filled-up row counts as full: its numbers are finite, and not used.
        self.empty = fill_up(torch.tensor([size - len(prompt) for prompt in prompts], device=device))  # (R,)
        self.slots = torch.arange(size, device=device)

    def append(self, ids: Tensor) -> None:
        """One more token for each text: ids (B,)."""
        self.newest = (self.newest + 1) % len(self.slots)
        self.window[: self.count, self.newest] = self.tokens[ids]
        self.empty = (self.empty - 1).clamp_(min=0)

    def keep(self, texts: Tensor) -> None:
        """Go on with these texts only: indices among the present ones."""
        self.count = len(texts)
        self.window, self.empty = fill_up(self.window[texts]), fill_up(self.empty[texts])

    def hidden_states(self) -> Tensor:
        """The last block's output for the newest tokens: (B, D), as `MiniGPT.hidden_states(...)[:, -1]`."""
        rows, size, width = self.window.shape
        x = self.window[:, self.newest] + self.positions[size - 1 - self.empty]  # (R, D)
        query = torch.addmm(self.query_bias, x, self.query)  # (R, H*D)
        # The place of each slot in its text; below 0: the text is not that long.
        places = (self.slots - self.newest - 1) % size - self.empty[:, None]  # (R, W)
        at = places.clamp(min=0)[:, None].expand(-1, self.num_heads, -1)  # (R, H, W)
        by_position = (query.view(-1, width) @ self.positions.T).view(rows, self.num_heads, size)
        scores = query.view(rows, self.num_heads, width) @ self.window.mT + by_position.gather(2, at)  # (R, H, W)
        weights = scores.masked_fill_((places < 0)[:, None], -math.inf).softmax(dim=-1)
        by_position = torch.zeros_like(weights).scatter_add_(2, at, weights).view(-1, size) @ self.positions
        mixed = (weights @ self.window).view(rows, -1) + by_position.view(rows, -1)  # (R, H*D)
        return self.block.after_attention(x, torch.addmm(self.value_bias, mixed, self.value))[: self.count]


class CacheDecoder:
    """For any number of blocks: the keys and values of the tokens before are kept while the text fits the window.

    Once it slides, each token has a new position, and from the second block on keys and values depend on all the
    tokens before, the dropped one among them: a text of that length is computed in full for each token.
    """

    def __init__(self, model: MiniGPT, prompts: Sequence[Sequence[int]]):
        self.model, self.size = model, model.max_length
        self.windows = [list(prompt[-self.size :]) for prompt in prompts]
        attention = model.blocks[0].attention
        rows = len(prompts) + -len(prompts) % ROWS
        shape = (len(model.blocks), 2, rows, attention.num_heads, self.size, attention.head_dim)
        self.cache = model.output.weight.new_zeros(shape)  # (blocks, keys and values, R, H, W, K)
        self.slots = torch.arange(self.size, device=self.cache.device)
        self.hidden = torch.stack([self._read(row) for row in range(len(prompts))])  # (B, D): each text alone

    def append(self, ids: Tensor) -> None:
        """One more token for each text: ids (B,)."""
        slides = [len(window) == self.size for window in self.windows]
        self.windows = [[*window, id_][-self.size :] for window, id_ in zip(self.windows, ids.tolist(), strict=True)]
        if not all(slides):
            self.hidden = self._step(ids)
        for row, slid in enumerate(slides):
            if slid:
                window = torch.tensor([self.windows[row]], device=ids.device)
                self.hidden[row] = self.model.hidden_states(window)[0, -1]

    def keep(self, texts: Tensor) -> None:
        """Go on with these texts only: indices among the present ones."""
        self.windows = [self.windows[i] for i in texts.tolist()]
        self.cache = fill_up(self.cache[:, :, texts].transpose(0, 2)).transpose(0, 2)
        self.hidden = self.hidden[texts]

    def hidden_states(self) -> Tensor:
        """The last block's output for the newest tokens: (B, D), as `MiniGPT.hidden_states(...)[:, -1]`."""
        return self.hidden

    def _read(self, row: int) -> Tensor:
        """A full forward over one text; its keys and values go to the cache. Returns (D,)."""
        window = torch.tensor([self.windows[row]], device=self.cache.device)
        x = self.model.embed(window)  # (1, L, D)
        for block, cache in zip(self.model.blocks, self.cache, strict=True):
            for kept, new in zip(cache, block.attention.keys_and_values(x), strict=True):
                kept[row, :, : x.shape[1]] = new[0]  # (H, L, K)
            x = block(x)
        return x[0, -1]

    def _step(self, ids: Tensor) -> Tensor:
        """The newest token of each text against its cache. Returns (B, D), of no use for texts that slid."""
        newest = torch.tensor([len(window) - 1 for window in self.windows], device=ids.device)  # (B,)
        x = fill_up(self.model.token_embedding(ids) + self.model.position_embedding(newest))  # (R, D)
        newest = fill_up(newest)
        rows, later = torch.arange(len(x), device=ids.device), (self.slots > newest[:, None])[:, None]  # (R, 1, W)
        for block, (keys, values) in zip(self.model.blocks, self.cache, strict=True):
            attention = block.attention
            heads = (attention.num_heads, attention.head_dim)
            keys[rows, :, newest], values[rows, :, newest] = (
                layer(x).unflatten(1, heads)
                for layer in (attention.key, attention.value)  # (R, H, K)
            )
            query = attention.query(x).unflatten(1, heads)
            scores = (keys @ query[..., None]).squeeze(-1) / math.sqrt(attention.head_dim)  # (R, H, W)
            weights = scores.masked_fill_(later, -math.inf).softmax(dim=-1)
            mixed = (weights[:, :, None] @ values).flatten(1)  # (R, H, 1, K) -> (R, H*K)
            x = block.after_attention(x, attention.output(mixed))
        return x[: len(ids)]
