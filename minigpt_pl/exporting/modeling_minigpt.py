"""The miniature GPT for transformers 5, in one file. It does not need the package minigpt_pl.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Dimensions in comments: B batch, L new tokens, T all tokens, D width, H heads, K head width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

# Newer versions of transformers call the cache `cache`, older ones call it `past_key_values`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class MiniGPTConfig(PreTrainedConfig):
    """The sizes of the network, under the names of transformers."""

    model_type = "minigpt_pl"

    def __init__(
        self,
        vocab_size: int = 20_000,
        max_position_embeddings: int = 80,
        hidden_size: int = 256,
        num_attention_heads: int = 2,
        head_dim: int = 256,
        intermediate_size: int = 256,
        num_hidden_layers: int = 1,
        hidden_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = False,
        token_shift: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.hidden_size, self.num_attention_heads, self.head_dim = hidden_size, num_attention_heads, head_dim
        self.intermediate_size, self.num_hidden_layers = intermediate_size, num_hidden_layers
        self.hidden_dropout_prob, self.layer_norm_eps = hidden_dropout_prob, layer_norm_eps
        self.token_shift = token_shift
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class MiniGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """Embeddings of tokens and positions, Transformer blocks with the norm after each part, an output layer.

    Each position has a learned embedding, and there are W = `max_position_embeddings` of them. A longer text is
    continued from its last W tokens. Their positions start at 0 again, so the cache is used up to W tokens only.
    """

    config_class = MiniGPTConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _is_stateful = True  # no assisted generation: it would need several windows at once
    _tied_weights_keys = {"output.weight": "token_embedding.weight"}

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.output = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.token_embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.output = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position.

        Args:
            input_ids: (B, L) token ids; with a cache, only the tokens that are not in it.
            attention_mask: (B, T), 0 for padding, which may be on the left. T includes the tokens in the cache.
            cache, past_key_values: two names for the same. Keys and values of earlier tokens.
            labels: (B, L) targets, usually `input_ids`. They are shifted here. -100 does not count.
            logits_to_keep: compute the logits of the last positions only; 0 means of all.

        Returns:
            logits (B, L, V); the loss if there are labels; the cache; the hidden states if requested.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        past = 0 if cache is None else int(cache.get_seq_length())
        total, window = past + input_ids.shape[1], self.config.max_position_embeddings
        if total > window:
            raise ValueError(f"the input has {total} tokens; the model takes at most {window}; shorten it")
        columns = torch.arange(total, device=input_ids.device)  # (T,)
        rows = columns[past:, None]  # (L, 1)
        mask, positions = rows >= columns if past else None, columns[past:]  # (L, T), (L,)
        is_first = columns == 0  # (T,)
        if attention_mask is not None:
            # A padding token attends to itself: without any token, the softmax would be NaN.
            attends = (rows >= columns) & attention_mask.bool()[:, None] | (rows == columns)  # (B, L, T)
            mask = attends[:, None]  # (B, 1, L, T)
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # (B, T)
            is_first, positions = (positions == 0)[:, None], positions[:, past:]  # (B, 1, T), (B, L)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)  # (B, L, D)
        states = [x]
        for block in self.blocks:
            x = block(x, mask, is_first, cache)
            states.append(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(x[:, kept])  # (B, L, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        hidden_states = tuple(states) if output_hidden_states else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden_states, **{CACHE: cache})

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of `forward` for the next token: the tokens that are not in the cache, or the last W tokens."""
        cache = past_key_values if cache is None else cache
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        total, window = attention_mask.shape[1], self.config.max_position_embeddings
        names = ("logits_to_keep", "output_hidden_states")
        inputs = {name: kwargs[name] for name in names if name in kwargs}
        if total <= window:
            past = 0 if cache is None else int(cache.get_seq_length())
            new_ids = input_ids[:, past - total :]  # (B, L)
            return inputs | {
                "input_ids": new_ids,
                "attention_mask": attention_mask,
                CACHE: cache,
                "use_cache": use_cache,
            }
        if input_ids.shape[1] < total:
            raise ValueError(f"after {window} tokens, give the whole text, not only the tokens after the cache")
        last_ids, last_mask = input_ids[:, -window:], attention_mask[:, -window:]  # (B, W)
        return inputs | {"input_ids": last_ids, "attention_mask": last_mask, "use_cache": False}


class Block(nn.Module):
    """Self-attention and a feed-forward network, each as `norm(x + dropout(part(x)))`: (B, L, D) -> (B, L, D)."""

    def __init__(self, config: MiniGPTConfig, layer: int) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.attention = CausalSelfAttention(config, layer)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor | None, is_first: Tensor, cache: Cache | None) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, is_first, cache)))
        output: Tensor = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return output


class CausalSelfAttention(nn.Module):
    """Multi-head attention to the token itself and to earlier tokens. H*K need not be D."""

    def __init__(self, config: MiniGPTConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = (config.num_attention_heads, config.head_dim), layer
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.output = nn.Linear(inner, width)
        self.shifted_channels = (config.head_dim + 1) // 2 if config.token_shift else 0

    def forward(self, x: Tensor, mask: Tensor | None, is_first: Tensor, cache: Cache | None) -> Tensor:
        """(B, L, D) -> (B, L, D). `mask`, (L, T) or (B, 1, L, T), is true where a token attends; None for causal.

        `is_first`, (T,) or (B, 1, T), is true at the first token of a text.
        """
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(x).unflatten(-1, self.heads).transpose(1, 2) for layer in layers)  # (B, H, L, K)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)  # (B, H, T, K)
        if self.shifted_channels:
            key, value = (self._shift(states, is_first) for states in (key, value))
        if mask is not None:  # a static cache has room for later tokens
            mask = F.pad(mask, (0, key.shape[2] - mask.shape[-1]))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))  # (B, H, L, K) -> (B, L, H*K) -> (B, L, D)
        return output

    def _shift(self, x: Tensor, is_first: Tensor) -> Tensor:
        """The first channels come from the token before, if there is one: keys or values (B, H, T, K) -> the same."""
        is_first = F.pad(is_first, (0, x.shape[2] - is_first.shape[-1]))  # a static cache is longer
        shifted, same = x[..., : self.shifted_channels], x[..., self.shifted_channels :]
        before = torch.cat([shifted[:, :, :1], shifted[:, :, :-1]], dim=2)
        return torch.cat([torch.where(is_first[..., None], shifted, before), same], dim=3)
