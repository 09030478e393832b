"""Token ids in, token ids out. Knows nothing of text."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_pl.errors import InputError
from minigpt_pl.generation import decoders, filters
from minigpt_pl.generation.controls import Controls
from minigpt_pl.model import MiniGPT
from minigpt_pl.products import Product, has_bf16_units, with_products

# Candidates beyond top_k. In bf16 alone the ten likeliest tokens were others in 4 to 6 % of the contexts of two trained
# networks, and in 25 % of an untrained one's; the deepest that one of the `top_k` fell was 3 places beyond them for
# top_k=20, 12 for 900.
SPARE = 32


@torch.inference_mode()
def generate_ids(
    model: MiniGPT, prompts: Sequence[Sequence[int]], controls: Controls, seeds: Sequence[int]
) -> list[list[int]]:
    """Continue each prompt, one token at a time; the last `max_length` tokens are the context.

    A text depends on its own prompt and seed only: the same alone and in any batch, and with more `num_tokens` it
    goes on where it ended. That holds bit for bit on one machine with one number of threads; other hardware adds up
    in another order, and a draw that falls within the 1e-6 or so that this makes can go to the next token.

    Args:
        model: in eval mode, of one block or more.
        prompts: token ids, at least one each, of any lengths.
        controls: the same for all.
        seeds: one a prompt.

    Returns:
        The new ids of each, without the end token: `num_tokens`, or fewer where the text ended itself.

    Raises:
        InputError: `no_repeat_ngram_size` or the bans leave nothing to draw.
    """
    device = model.output.weight.device
    longest, num_tokens = max(map(len, prompts)), controls.num_tokens
    texts = torch.tensor(  # (B, T), the prompts on the right
        [[-1] * (longest - len(prompt)) + [*prompt] for prompt in prompts], device=device
    )
    texts = F.pad(texts, (0, num_tokens))  # (B, T + num_tokens)
    # All of a text's chances are drawn ahead, from its own generator; on the CPU, so that they are the same anywhere.
    chances = torch.stack([torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    chances = chances.to(device)  # (B, num_tokens)
    new_ids: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))  # whose text each row is
    model = with_products(model)
    decoder, output = decoders.start(model, prompts), _Output(model, controls)
    for place in range(num_tokens):
        end = longest + place
        logits, ids = output.candidates(decoder.hidden_states(), texts[:, :end], place)  # (B, C) twice
        if not logits.amax(dim=-1).isfinite().all():
            raise _nothing_to_draw(logits, place)
        if controls.temperature == 0:
            choice = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        else:
            choice = draw(filters.warp(logits, controls), chances[:, place])
        drawn = ids.gather(-1, choice).squeeze(-1)  # (B,)
        texts[:, end] = drawn
        if controls.end_id is not None and (ended := drawn == controls.end_id).any():
            for row in ended.nonzero().flatten().tolist():
                new_ids[running[row]] = texts[row, longest:end].tolist()
            rest = (~ended).nonzero().flatten()
            running = [running[row] for row in rest.tolist()]
            if not running:
                return new_ids
            texts, chances, drawn = texts[rest], chances[rest], drawn[rest]
            decoder.keep(rest)
        if place + 1 < num_tokens:
            decoder.append(drawn)
    for i, ids in zip(running, texts[:, longest:].tolist(), strict=True):
        new_ids[i] = ids
    return new_ids


def draw(logits: Tensor, chances: Tensor) -> Tensor:
    """Draw one of the C by its probability: the first at which the probabilities so far exceed the chance.

    Args:
        logits: (B, C), at least one of each row above -inf.
        chances: (B,), uniform in [0, 1).

    Returns:
        (B, 1), 0 to C - 1; never one whose logit is -inf.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, C); its end is 1 but for rounding
    return torch.searchsorted(cumulative, chances[:, None] * cumulative[:, -1:], right=True)


class _Output:
    """The output layer, with what may be drawn.

    Where only the `top_k` likeliest count, a CPU with bf16 units finds them, and `SPARE` more, with the weight in
    bf16, which is half the memory to read; their logits are then computed in fp32.
    """

    def __init__(self, model: MiniGPT, controls: Controls):
        self.layer, self.controls = model.output, controls
        top_k = 1 if controls.temperature == 0 else controls.top_k
        self.count = None if top_k is None else min(top_k + SPARE, model.vocab_size)
        self.screens = self.count is not None and not controls.read_the_text
        self.screens = self.screens and has_bf16_units() and self.layer.weight.device.type == "cpu"
        if self.screens:
            self.screen, self.bias_for = Product(self.layer.weight.bfloat16()), None

    def candidates(self, hidden: Tensor, texts: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Logits after `filters.process`, and their token ids in ascending order.

        Args:
            hidden: (B, D).
            texts: (B, T), filled up with -1 on the left.
            place: how many new tokens each has.

        Returns:
            (B, C) twice: all that `top_k` can keep; C = V without it.
        """
        if self.screens:
            return self._screened(hidden, texts, place)
        logits = self.layer(hidden)  # (B, V)
        logits = filters.process(logits, self.controls, texts, place)
        if self.count is None:
            return logits, torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
        ids = _largest(logits, self.count)
        return logits.gather(-1, ids), ids

    def _screened(self, hidden: Tensor, texts: Tensor, place: int) -> tuple[Tensor, Tensor]:
        # What is banned or forced does not depend on the text here: the bias can hold it.
        wanted = (self.controls.banned_at(place), self.controls.forced_ids.get(place))
        if self.bias_for != wanted:
            self.bias = filters.process(self.layer.bias[None], self.controls, texts, place)[0]  # (V,)
            self.bias_for = wanted
        ids = _largest(self.screen(hidden.bfloat16()) + self.bias, self.count)  # (B, C), from (B, V) in fp32
        rows = F.embedding(ids, self.layer.weight)  # (B, C, D)
        return (rows * hidden[:, None]).sum(dim=-1) + self.bias[ids], ids


def _largest(logits: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row are, ascending: (B, V) -> (B, count)."""
    size = logits.shape[1]
    groups = size // 20
    if size % 20 or groups < count:
        return logits.topk(count, sorted=False).indices.sort().values
    # They are in the `count` groups with the largest maxima: id i is in group i % groups.
    columns = logits.view(len(logits), 20, groups)
    best = columns.amax(dim=1).topk(count, sorted=False).indices  # (B, count)
    members = columns.gather(2, best[:, None].expand(-1, 20, -1)).flatten(1)  # (B, 20 * count)
    at = members.topk(count, sorted=False).indices
    return (at // count * groups + best.gather(1, at % count)).sort().values


def _nothing_to_draw(logits: Tensor, place: int) -> ValueError:
    if logits.isnan().any():
        return ValueError("the network's logits are not numbers (NaN); its training has diverged")
    return InputError(
        f"nothing is left to draw after {place} tokens: every token is banned, or would repeat an n-gram;"
        " raise no_repeat_ngram_size, or ban less"
    )
