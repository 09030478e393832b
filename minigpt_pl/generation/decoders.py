"""The last hidden state of texts that grow by one token at a time, without a full forward for each.

B texts, W the model's max_length, L length, D width, H heads, K head width.

Every product has the same shape alone and in company, but for the number of rows, so that a text does not depend on
what stands beside it.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_pl.generation.prepared import AbsorbedAttention, Prepared
from minigpt_pl.model import MiniGPT

SLIDES = 64  # steps of a full window until its tokens are copied back to the beginning of their row


def start(prepared: Prepared, prompts: Sequence[Sequence[int]]) -> "LookupDecoder | CacheDecoder":
    """A decoder that has read the prompts.

    Args:
        prompts: token ids, at least one each; of long ones the last `max_length` count.
    """
    if prepared.attention is None:
        return CacheDecoder(prepared.model, prompts)
    return LookupDecoder(prepared.model, prepared.attention, prompts)


class LookupDecoder:
    """For one block: its attention reads embeddings, so nothing has to be computed for the tokens before.

    Each is token + position. The window holds the token's part, and the position's part is added at each step: when
    the window slides and every position changes, nothing is computed anew.
    """

    def __init__(self, model: MiniGPT, attention: AbsorbedAttention, prompts: Sequence[Sequence[int]]):
        self.block, self.num_heads, self.attention = model.blocks[0], model.blocks[0].attention.num_heads, attention
        self.tokens, self.positions = model.token_embedding.weight, model.position_embedding.weight  # (V, D), (W, D)
        self.size, self.width = self.positions.shape
        prompts = [prompt[-self.size :] for prompt in prompts]
        lengths = [len(prompt) for prompt in prompts]
        self.shortest, self.longest = min(lengths), max(lengths)
        self.places = torch.arange(attention.size, device=self.tokens.device)
        self.lengths = self.places.new_tensor(lengths)  # kept up to date while they differ
        # A text's window begins at slot `start` of its row, and with it position 0; what is beyond its length does not
        # count, but must be finite.
        self.start, self.rows = 0, self.tokens.new_zeros(len(prompts), attention.size + SLIDES, attention.width)
        ids = self.places.new_tensor([[*prompt] + [0] * (self.size - len(prompt)) for prompt in prompts])  # (B, W)
        self.rows[:, : self.size, : self.width] = F.embedding(ids, self.tokens)

    def append(self, ids: Tensor) -> None:
        """One more token for each text: ids (B,)."""
        if self.longest == self.size:
            self._slide()
        new = F.embedding(ids, self.tokens)  # (B, D)
        alike = self.shortest == self.longest
        self.shortest, self.longest = (min(length + 1, self.size) for length in (self.shortest, self.longest))
        if alike:
            self.rows[:, self.start + self.longest - 1, : self.width] = new
        else:
            newest = self.lengths.clamp(max=self.size - 1)  # (B,)
            self.rows[torch.arange(len(ids), device=ids.device), self.start + newest, : self.width] = new
            self.lengths = newest + 1

    def _slide(self) -> None:
        """The window leaves its oldest token; texts that do not fill it yet move along with it."""
        if self.start == SLIDES:
            self.rows[:, : self.attention.size] = self.rows[:, self.start :].clone()
            self.start = 0
        if self.shortest < self.size:
            short = self.lengths < self.size
            self.rows[short] = self.rows[short].roll(1, dims=1)
        self.start += 1

    def keep(self, texts: Tensor) -> None:
        """Go on with these texts only: indices among the present ones."""
        self.rows, self.lengths = self.rows[texts], self.lengths[texts]

    def hidden_states(self) -> Tensor:
        """The last block's output for the newest tokens: (B, D), as `MiniGPT.hidden_states(...)[:, -1]`."""
        size, width = self.attention.size, self.attention.width  # W and D, padded
        window = self.rows[:, self.start : self.start + size]  # (B, W, D)
        if self.shortest == self.longest:  # slices take fewer steps
            x = window[:, self.longest - 1, : self.width] + self.positions[self.longest - 1]  # (B, D)
        else:
            texts, newest = torch.arange(len(window), device=window.device), self.lengths - 1
            x = window[texts, newest, : self.width] + F.embedding(newest, self.positions)
        query, by_place = self.attention.query(x).view(len(x), self.num_heads, -1).split((width, size), dim=2)
        # (B, H, W) + (B, H, D) @ (B, D, W)
        scores = _two_heads_a_time(lambda places, queries: torch.baddbmm(places, queries, window.mT), by_place, query)
        if self.shortest < self.longest:
            scores.masked_fill_((self.places >= self.lengths[:, None])[:, None], -math.inf)
        elif self.longest < size:
            scores[:, :, self.longest :] = -math.inf
        weights = scores.softmax(dim=-1)
        mixed = _two_heads_a_time(lambda part: part @ window, weights)  # (B, H, W) @ (B, W, D)
        mixed = torch.cat([mixed, weights], dim=2)  # (B, H, D + W)
        return self.block.after_attention(x, self.attention.value(mixed.flatten(1)))


def _two_heads_a_time(product: Callable[..., Tensor], *by_head: Tensor) -> Tensor:
    """The product of all heads, (B, H, ...) each -> (B, H, ...), by two of them at a time.

    MKL divides a matrix with more rows among threads, and not in the same way alone as in a batch, which shows in the
    last bits. It did so on 2 to 16 threads with any of 4 to 19 rows, not with one, two or three.
    """
    if by_head[0].shape[1] <= 2:
        return product(*by_head)
    return torch.cat([product(*two) for two in zip(*(x.split(2, dim=1) for x in by_head), strict=True)], dim=1)


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
