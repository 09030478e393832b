"""A network prepared for generation: everything that depends only on the weights is computed once."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_pl.cpu import int8
from minigpt_pl.cpu.linear import PackedLinear, inference_without_autocast, pack_linear_layers
from minigpt_pl.model import MiniGPT

# In the worst case, a true top-k token had rank k + 4 in the 8-bit logits for k = 20. For k = 100, 500 and 1,000, the
# worst ranks were k + 26, k + 58 and k + 124. Measured in 12,000 contexts of four trained networks.
SPARE, SPARE_SHARE = 12, 1 / 4  # extra candidates: SPARE + SPARE_SHARE * k
CHECKED_TOP_K = 20  # the 8-bit output layer must find the top 20 of random hidden states


def num_candidates(top_k: int) -> int:
    """S, the number of tokens that the 8-bit output layer selects, so that the top `top_k` are among them."""
    return top_k + SPARE + int(top_k * SPARE_SHARE)


class InferenceModel:
    """A `MiniGPT` in eval mode that is prepared for generation. The preparation takes 50 ms at the notebook's size.

    If the network's weights change, make a new one. `is_current` detects a change.

    Attributes:
        network: a copy that shares the weights, with a `PackedLinear` for each `nn.Linear`.
        attention: the attention of a network with one block; None if there are more blocks.
    """

    def __init__(self, network: MiniGPT):
        self.network = pack_linear_layers(network)
        self.source, self._embedding = network, network.token_embedding.weight
        with inference_without_autocast(network):
            self.attention = AbsorbedAttention(self.network) if len(network.blocks) == 1 else None
            self._copies = [weight.clone() for weight in self._prepared_weights()]

    def _prepared_weights(self) -> list[Tensor]:
        # The token embedding is not included: generation reads its present values.
        network = self.source
        blocks = [weight for block in network.blocks for weight in block.parameters()]
        return [network.position_embedding.weight, *blocks, *network.output.parameters()]

    def is_current(self) -> bool:
        """Whether the network still has the weights that were prepared. Takes 2 to 8 ms at the notebook's size.

        Compares values, because writes to `parameter.data` do not change `parameter._version`.
        """
        pairs = zip(self._prepared_weights(), self._copies, strict=True)
        return self.source.token_embedding.weight is self._embedding and all(
            (now.device, now.dtype) == (then.device, then.dtype) and torch.equal(now, then) for now, then in pairs
        )

    @functools.cached_property
    def int8_output(self) -> int8.Int8Linear | None:
        """The output layer in 8 bits; None if this is not faster, or not accurate enough for this network."""
        output, norm = self.network.output, self.network.blocks[-1].feed_forward_norm
        count = num_candidates(CHECKED_TOP_K)
        is_fp32_on_cpu = output.weight.dtype == torch.float32 and output.weight.device.type == "cpu"
        if not (int8.HAS_INT8 and is_fp32_on_cpu) or count > self.network.vocab_size:
            return None
        with inference_without_autocast(self.network):
            approximate = int8.Int8Linear(output.weight)
            # This norm computes the hidden states. Its outputs for random inputs resemble them.
            generator = torch.Generator("cpu").manual_seed(0)
            hidden = norm(torch.randn(64, len(norm.weight), generator=generator, dtype=torch.float32, device="cpu"))
            candidates = approximate(hidden, output.bias).topk(count).indices  # (64, S), from hidden (64, D)
            top = F.linear(hidden, output.weight, output.bias).topk(CHECKED_TOP_K).indices  # (64, k)
            return approximate if (top[..., None] == candidates[:, None]).any(dim=-1).all() else None


class AbsorbedAttention:
    """Attention for a network with one block. It computes no keys and values.

    Its inputs x are token + position embeddings. The score of x_i and x_j is (Wq x_i + bq) . (Wk x_j + bk). This equals
    q_i . x_j with q_i = Wk.T (Wq x_i + bq), up to a term that does not depend on j. The softmax ignores this term. The
    output is Wo Wv (sum over j of weight_j x_j) plus a constant. So the products of the matrices are computed once.
    DeepSeek-V2 calls this "absorbed" (arXiv 2405.04434).

    With a token shift, each head has P = 2 parts: the channels that read the token before, and the others. A part has
    its own scores, and the head's score is their sum. Without a shift, P is 1.

    Attributes:
        query: D -> H*P*(D + W) for W = max_length. For each part: q_i, then the scores of q_i for all W positions.
        value: H*P*(D + W) -> D. For each part: the weighted sum of token embeddings, then the weights of all positions.
    """

    def __init__(self, network: MiniGPT):
        attention, positions = network.blocks[0].attention, network.position_embedding.weight  # (W, D)
        heads, scale = (attention.num_heads, attention.head_dim), 1 / math.sqrt(attention.head_dim)
        layers = (attention.query, attention.key, attention.value)
        query, key, value = (layer.weight.view(*heads, -1) for layer in layers)  # (H*K, D) -> (H, K, D)
        shifted = attention.shifted_channels
        parts = (slice(shifted), slice(shifted, None)) if shifted else (slice(None),)  # of K

        def with_positions(x: Tensor) -> Tensor:  # (..., D) -> (..., D + W)
            return torch.cat([x, x @ positions.T], dim=-1)

        query = torch.cat([query, attention.query.bias.view(*heads, 1)], dim=2)  # (H, K, D + 1): with the bias
        product = torch.stack([query[:, part].mT @ key[:, part] for part in parts], dim=1)  # (H, P, D + 1, D)
        weight = with_positions(product * scale).transpose(2, 3).flatten(0, 2)  # (H*P*(D + W), D + 1)
        self.query = PackedLinear(weight[:, :-1].contiguous(), weight[:, -1].contiguous())
        output = attention.output.weight.view(-1, *heads).transpose(0, 1)  # (H, D, K)
        product = torch.stack([output[..., part] @ value[:, part] for part in parts], dim=1)  # (H, P, D, D)
        bias = F.linear(attention.value.bias, attention.output.weight, attention.output.bias)  # (D,)
        self.value = PackedLinear(with_positions(product).permute(2, 0, 1, 3).flatten(1), bias)
