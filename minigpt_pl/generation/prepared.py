"""A network ready to write: what its weights alone decide is computed once, not for each token or text."""

import functools
import math
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_pl.cpu.linear import Int8Linear, PackedLinear, has_int8_units, with_packed_linears
from minigpt_pl.model import MiniGPT

# In 8 bits alone the ten likeliest tokens are others in up to 12 % of contexts, so more than `top_k` are looked for. In
# 12,000 contexts of four trained networks, the deepest that one of the likeliest fell was 4 places beyond the others
# for top_k=20, 26 for 100, 58 for 500, 124 for 1,000: SPARE + SPARE_SHARE * top_k are at hand.
SPARE, SPARE_SHARE = 12, 1 / 4
TRIED_FOR = 20  # top_k with which a network's output layer is tried


def screened(top_k: int) -> int:
    """How many are looked for in 8 bits, so that the `top_k` likeliest are among them."""
    return top_k + SPARE + int(top_k * SPARE_SHARE)


def prepare(model: MiniGPT) -> "Prepared":
    """The network as its weights are now; the same again while they stay the same, bit for bit.

    To compare them takes two milliseconds at the seed's size, to prepare them some seventy.
    """
    # Not the token embedding, which is read as it is, so long as it is the same parameter.
    weights = [model.position_embedding.weight, *model.blocks.parameters(), *model.output.parameters()]
    then, prepared = _latest.get(model, ([], None))
    if (
        prepared is None
        or prepared.model.token_embedding.weight is not model.token_embedding.weight
        or not all(map(_same, weights, then))
    ):
        prepared = Prepared(model)
        _latest[model] = [weight.detach().clone() for weight in weights], prepared
    return prepared


class Prepared:
    """A `MiniGPT` in eval mode, its weights shared, and what the engine makes of them.

    Attributes:
        model: with a `PackedLinear` in place of each `nn.Linear`.
        attention: that of the only block; None where there are more.
        rough_output: the output layer in 8 bits; None where it takes longer, or would miss the likeliest.
    """

    def __init__(self, model: MiniGPT):
        self.model = with_packed_linears(model)
        self.attention = AbsorbedAttention(self.model) if len(model.blocks) == 1 else None

    @functools.cached_property
    def rough_output(self) -> Int8Linear | None:
        output, norm = self.model.output, self.model.blocks[-1].feed_forward_norm
        if not has_int8_units(output.weight) or screened(TRIED_FOR) > self.model.vocab_size:
            return None
        rough = Int8Linear(output.weight.detach())
        # Hidden states come from that norm, so what it makes of random numbers is like them.
        random = torch.Generator("cpu").manual_seed(0)
        hidden = norm(torch.randn(64, len(norm.weight), generator=random, dtype=torch.float32, device="cpu")).detach()
        found = rough(hidden, output.bias).topk(screened(TRIED_FOR)).indices  # (64, S)
        likeliest = F.linear(hidden, output.weight, output.bias).topk(TRIED_FOR).indices  # (64, k)
        return rough if (likeliest[..., None] == found[:, None]).any(dim=-1).all() else None


class AbsorbedAttention:
    """The attention of a single block on its inputs x, token + position embeddings, without keys and values.

    The score of query x_i on key x_j is (Wq x_i + bq) . (Wk x_j + bk). With q_i = Wk' (Wq x_i + bq) it is q_i . x_j
    and a term that is the same for all j, which the softmax does not see. Likewise the attention's output is
    Wo Wv (sum of weight_j x_j) and a constant. So the products of the matrices are made once ("absorbed" as in
    DeepSeek-V2's attention, arXiv 2405.04434), and keys and values are the embeddings themselves.

    Attributes:
        width, size: D and W, or what more is a multiple of 4, filled up with zeros: where rows of other lengths follow
            each other in memory, MKL adds up in another order alone than in a batch.
        query: D -> H*(width + size), for each head q_i, to be multiplied with the tokens' embeddings, and its scores on
            the positions.
        value: H*(width + size) -> D, from each head's weighted sum of the tokens' embeddings and its weights of the
            positions.
    """

    def __init__(self, model: MiniGPT):
        attention, positions = model.blocks[0].attention, model.position_embedding.weight  # (W, D)
        heads, scale = (attention.num_heads, attention.head_dim), 1 / math.sqrt(attention.head_dim)
        layers = (attention.query, attention.key, attention.value)
        query, key, value = (layer.weight.unflatten(0, heads) for layer in layers)  # (H*K, D) -> (H, K, D)
        self.size, self.width = (-(-length // 4) * 4 for length in positions.shape)

        def filled(x: Tensor, y: Tensor) -> Tensor:  # (..., D) and (..., W) -> (..., width + size)
            return torch.cat([F.pad(x, (0, self.width - x.shape[-1])), F.pad(y, (0, self.size - y.shape[-1]))], dim=-1)

        weight = query.mT @ key * scale  # (H, D, D), from x_i to q_i
        bias = (attention.query.bias.view(heads)[:, None] @ key)[:, 0] * scale  # (H, D)
        weight, bias = (filled(x, x @ positions.T) for x in (weight, bias))  # (H, D, width + size), (H, width + size)
        self.query = PackedLinear(weight.transpose(1, 2).flatten(0, 1), bias.flatten())
        weight = attention.output.weight.unflatten(1, heads).transpose(0, 1) @ value  # (D, H*K) -> (H, D, D)
        weight = filled(weight, weight @ positions.T)  # (H, D, width + size)
        bias = F.linear(attention.value.bias, attention.output.weight, attention.output.bias)  # (D,)
        self.value = PackedLinear(weight.transpose(0, 1).flatten(1), bias)


_latest: WeakKeyDictionary[MiniGPT, tuple[list[Tensor], Prepared]] = WeakKeyDictionary()


def _same(now: Tensor, then: Tensor) -> bool:
    return (now.device, now.dtype, now.shape) == (then.device, then.dtype, then.shape) and torch.equal(now, then)
