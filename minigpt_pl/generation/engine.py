"""Token ids in, token ids out. Knows nothing of text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt_pl.generation import filters
from minigpt_pl.model import MiniGPT


@torch.inference_mode()
def generate_ids(
    model: MiniGPT,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    temperature: float,
    top_k: int | None,
    seeds: Sequence[int],
    banned_ids: Sequence[int] = (),
    end_id: int | None = None,
) -> list[list[int]]:
    """Continue each prompt, one token at a time.

    The last `max_length` tokens are the context (the seed, by mistake, goes on with the first). Prompts of
    different lengths share a batch: padding goes to the right, where the causal mask keeps it out of sight and
    the learned positions stay as they were.

    Args:
        model: in eval mode.
        prompts: token ids, at least one each.
        num_tokens: new tokens for each.
        temperature: 0 takes the likeliest token each time.
        top_k: draw from this many likeliest; None: from all.
        seeds: one a prompt; a text depends on its own seed only, whatever stands beside it in the batch.
        banned_ids: never drawn.
        end_id: a text that draws it ends there; None: none does.

    Returns:
        The new ids of each, without the end token: `num_tokens`, or fewer where the text ended itself.
    """
    device = model.output.weight.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    texts = [list(prompt) for prompt in prompts]
    running = list(range(len(texts)))
    for _ in range(num_tokens):
        windows = [texts[i][-model.max_length :] for i in running]
        last = torch.tensor([len(window) - 1 for window in windows], device=device)
        padded = [window + [0] * (int(last.max()) + 1 - len(window)) for window in windows]
        hidden = model.hidden_states(torch.tensor(padded, device=device))  # (B, L, D)
        logits = model.output(hidden[torch.arange(len(running), device=device), last])  # (B, V)
        logits = filters.ban(logits, list(banned_ids))
        drawn = _draw(logits, temperature, top_k, [generators[i] for i in running])
        for i, id_ in zip(running, drawn, strict=True):
            texts[i].append(id_)
        running = [i for i, id_ in zip(running, drawn, strict=True) if id_ != end_id]
        if not running:
            break
    new = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    return [ids[:-1] if ids and ids[-1] == end_id else ids for ids in new]


def _draw(logits: Tensor, temperature: float, top_k: int | None, generators: list[torch.Generator]) -> list[int]:
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    if top_k is not None:
        logits = filters.top_k(logits, top_k)
    probabilities = filters.temperature(logits, temperature).softmax(dim=-1)  # (B, V)
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]
