"""The last hidden state of texts that grow by one token at a time, without a full forward for each.

B texts, W the model's max_length, L length, D width, H heads, K head width.

Every product has the same shape alone and in company, but for the number of rows, so that a text does not depend on
what stands beside it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_pl.model import MiniGPT
from minigpt_pl.products import Product


def start(model: MiniGPT, prompts: Sequence[Sequence[int]]) -> "LookupDecoder | CacheDecoder":
    """A decoder that has read the prompts.

    Args:
        model: in eval mode, from `with_products`.
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
        self.tokens, positions = model.token_embedding.weight, model.position_embedding.weight  # (V, D), (W, D)
        self.positions = positions
        self.num_heads, size = attention.num_heads, model.max_length
        heads, scale = (attention.num_heads, attention.head_dim), 1 / math.sqrt(attention.head_dim)
        layers = (attention.query, attention.key, attention.value)
        query, key, value = (layer.weight.unflatten(0, heads) for layer in layers)  # (H*K, D) -> (H, K, D)
        # One product makes the query and its scores on the positions, one the values of tokens and of positions.
        weight = key.mT @ query * scale  # (H, D, D)
        bias = (attention.query.bias.view(heads)[:, None] @ key)[:, 0] * scale  # (H, D)
        weight, bias = (torch.cat([x, y], dim=1) for x, y in ((weight, positions @ weight), (bias, bias @ positions.T)))
        self.query = Product(weight.flatten(0, 1), bias.flatten())  # D -> H*(D + W)
        weight = attention.output.weight.unflatten(1, heads).transpose(0, 1) @ value  # (D, H*K) -> (H, D, D)
        weight = torch.cat([weight, weight @ positions.T], dim=2)  # (H, D, D + W)
        bias = F.linear(attention.value.bias, attention.output.weight, attention.output.bias)  # (D,)
        self.value = Product(weight.transpose(0, 1).flatten(1), bias)  # H*(D + W) -> D

        prompts = [prompt[-size:] for prompt in prompts]
        # Slot `newest` of the ring is the newest token, the one before it is next older, and so on around.
        self.newest = size - 1
        self.window = self.positions.new_zeros(len(prompts), *self.positions.shape)  # (B, W, D)
        self.slots = torch.arange(size, device=self.positions.device)
        for window, prompt in zip(self.window, prompts, strict=True):
            window[size - len(prompt) :] = F.embedding(self.slots.new_tensor(prompt), self.tokens)
        self.empty = self.slots.new_tensor([size - len(prompt) for prompt in prompts])  # (B,): slots not filled yet
        self.most_empty = size - min(map(len, prompts))  # at most; 0: all windows are full, which takes fewer steps
        # Row `newest`: the place of each slot in a text that fills the window.
        self.full_places = (self.slots - self.slots[:, None] - 1) % size  # (W, W)

    def append(self, ids: Tensor) -> None:
        """One more token for each text: ids (B,)."""
        self.newest = (self.newest + 1) % len(self.slots)
        self.window[:, self.newest] = F.embedding(ids, self.tokens)
        if self.most_empty:
            self.empty, self.most_empty = (self.empty - 1).clamp_(min=0), self.most_empty - 1

    def keep(self, texts: Tensor) -> None:
        """Go on with these texts only: indices among the present ones."""
        self.window, self.empty = self.window[texts], self.empty[texts]

    def hidden_states(self) -> Tensor:
        """The last block's output for the newest tokens: (B, D), as `MiniGPT.hidden_states(...)[:, -1]`."""
        size, width = self.positions.shape
        places = self.full_places[self.newest]  # (W,)
        if self.most_empty:
            places = places - self.empty[:, None]  # (B, W); below 0: the text is not that long
            last = F.embedding(size - 1 - self.empty, self.positions)  # (B, D)
        else:
            last = self.positions[-1]
        x = self.window[:, self.newest] + last  # (B, D)
        query, by_place = self.query(x).unflatten(1, (self.num_heads, -1)).split((width, size), dim=2)  # (B, H, D or W)
        at = places.clamp(min=0).view(-1, 1, size).expand(len(x), self.num_heads, -1)  # (B, H, W)
        scores = query @ self.window.mT + by_place.gather(2, at)  # (B, H, W)
        if self.most_empty:
            scores.masked_fill_((places < 0)[:, None], -math.inf)
        weights = scores.softmax(dim=-1)
        by_position = torch.zeros_like(weights).scatter_add_(2, at, weights)  # (B, H, W)
        mixed = torch.cat([weights @ self.window, by_position], dim=2)  # (B, H, D + W)
        return self.block.after_attention(x, self.value(mixed.flatten(1)))


class CacheDecoder:
    """For any number of blocks: the keys and values of the tokens before are kept while the text fits the window.

    Once it slides, each token has a new position, and from the second block on keys and values depend on all the
    tokens before, the dropped one among them: a text of that length is computed in full for each token.
    """

    def __init__(self, model: MiniGPT, prompts: Sequence[Sequence[int]]):
        self.model, self.size = model, model.max_length
        self.windows = [list(prompt[-self.size :]) for prompt in prompts]
        attention = model.blocks[0].attention
        shape = (len(model.blocks), 2, len(prompts), attention.num_heads, self.size, attention.head_dim)
        self.cache = model.output.weight.new_zeros(shape)  # (blocks, keys and values, B, H, W, K)
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
        self.cache, self.hidden = self.cache[:, :, texts], self.hidden[texts]

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
        newest = ids.new_tensor([len(window) - 1 for window in self.windows])  # (B,)
        x = self.model.token_embedding(ids) + self.model.position_embedding(newest)  # (B, D)
        texts, later = torch.arange(len(ids), device=ids.device), (self.slots > newest[:, None])[:, None, None]
        for block, (keys, values) in zip(self.model.blocks, self.cache, strict=True):
            attention = block.attention
            heads = (attention.num_heads, attention.head_dim)
            keys[texts, :, newest] = attention.key(x).unflatten(1, heads)  # (B, H, K)
            values[texts, :, newest] = attention.value(x).unflatten(1, heads)
            query = attention.query(x).unflatten(1, heads)[:, :, None]  # (B, H, 1, K)
            scores = query @ keys.mT / math.sqrt(attention.head_dim)  # (B, H, 1, W)
            weights = scores.masked_fill_(later, -math.inf).softmax(dim=-1)
            x = block.after_attention(x, attention.output((weights @ values).flatten(1)))  # (B, H, 1, K) -> (B, D)
        return x
