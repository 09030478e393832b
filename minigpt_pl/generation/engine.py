"""Token ids in, token ids out. Knows nothing of text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_pl.cpu.linear import inference_without_autocast
from minigpt_pl.generation import beam_search, decoders, filters
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.inference import InferenceModel, num_candidates
from minigpt_pl.model import MiniGPT

MAX_SCREENED_SHARE = 1 / 20  # of the vocabulary; a larger top_k does not use the 8-bit screen
GROUP_SIZE = 20  # tokens in a group of `_top_indices`

Model = MiniGPT | InferenceModel
Prompts = Sequence[Sequence[int]]


class Step(NamedTuple):
    """One more token for each unfinished text. The last three fields are empty unless requested.

    Attributes:
        texts: indices of the prompts, ascending.
        ids: the new token of each; `end_id` if the text ends here.
        probabilities: the network's own: at temperature 1, without controls.
        ranks: rank of the token among the network's logits; 1 is the likeliest.
        entropies: entropy in bits of the distribution after the controls.
    """

    texts: list[int]
    ids: list[int]
    probabilities: list[float] = []
    ranks: list[int] = []
    entropies: list[float] = []


def generate_ids(model: Model, prompts: Prompts, controls: Controls, seeds: Sequence[int]) -> list[list[int]]:
    """The new ids of each prompt: `num_tokens`, or fewer if the text ends. Without the end token.

    Arguments and errors are those of `stream_ids`.
    """
    new_ids: list[list[int]] = [[] for _ in prompts]
    model = _prepared(model)
    with inference_without_autocast(model.network):
        for step in _steps(model, prompts, controls, seeds):
            for text, id_ in zip(step.texts, step.ids, strict=True):
                if id_ != controls.end_id:
                    new_ids[text].append(id_)
    return new_ids


def stream_ids(
    model: Model, prompts: Prompts, controls: Controls, seeds: Sequence[int], with_probabilities: bool = False
) -> Iterator[Step]:
    """Continue each prompt, one token at a time. The last `max_length` tokens are the context.

    A text depends only on its own prompt and seed. More `num_tokens` continue the same text. A prompt gives the same
    text in any batch, up to rounding: other batch sizes can add in another order (differences about 1e-6), so a draw
    that falls that close to a boundary can differ. The same holds for other hardware and other numbers of threads.

    Args:
        model: an `InferenceModel`, or a network, which is prepared for this call. Its weights must not change before
            the last step. Dropout is off.
        prompts: token ids, at least one per prompt.
        controls: the same for all prompts.
        seeds: a random seed for each prompt.
        with_probabilities: also compute probabilities, ranks and entropies. This changes no text.

    Yields:
        The steps. With beams, a text's steps come only when its search is complete, one text after the other.

    Raises:
        InputError: `no_repeat_ngram_size` or the bans exclude every token.
    """
    model = _prepared(model)
    steps = _steps(model, prompts, controls, seeds, with_probabilities)
    while True:
        with inference_without_autocast(model.network):  # not in the caller's loop body
            step = next(steps, None)
        if step is None:
            return
        yield step


def _prepared(model: Model) -> InferenceModel:
    return InferenceModel(model) if isinstance(model, MiniGPT) else model


def _steps(
    model: InferenceModel, prompts: Prompts, controls: Controls, seeds: Sequence[int], with_probabilities: bool = False
) -> Iterator[Step]:
    if controls.num_beams > 1:
        for text, prompt in enumerate(prompts):
            found = beam_search.search(model, prompt, controls)
            # Generate the same ids again, each one forced, to get their steps.
            again = replace(controls, num_tokens=len(found), forced_ids=dict(enumerate(found)))
            again = replace(again, num_beams=1, length_penalty=1.0, stop_sequences=())
            for step in _steps(model, [prompt], again, [0], with_probabilities):
                yield step._replace(texts=[text])
        return
    if not prompts:
        return
    device, num_tokens = model.network.output.weight.device, controls.num_tokens
    longest = max(map(len, prompts))  # T
    padded = [[-1] * (longest - len(prompt)) + [*prompt] + [0] * num_tokens for prompt in prompts]
    texts = torch.tensor(padded, device=device)  # (B, T + num_tokens)
    # Draw all uniform numbers of a text in advance, from its own generator. On the CPU: equal for all devices.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    draws = [torch.rand(num_tokens, generator=own, dtype=torch.float32, device="cpu") for own in generators]
    uniform = torch.stack(draws).to(device)  # (B, num_tokens)
    reads_texts = controls.depend_on_text or bool(controls.stop_sequences)
    running = list(range(len(prompts)))  # the text of each row
    decoder, output = decoders.start(model, prompts), _OutputLayer(model, controls)
    for place in range(num_tokens):
        end = longest + place
        hidden = decoder.last_hidden()  # (B, D)
        logits, ids = output.candidates(hidden, texts[:, :end], place)  # (B, C) each
        if controls.temperature == 0:
            choice = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        else:
            logits = filters.warp(logits, controls)
            choice = draw(logits, uniform[:, place])
        drawn = ids.gather(-1, choice).squeeze(-1)  # (B,)
        if reads_texts:
            texts[:, end] = drawn
        step = Step(running, drawn.tolist())
        if with_probabilities:
            nats = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)  # (B,)
            entropies = (nats / math.log(2)).tolist()
            step = Step(*step[:2], *probabilities_and_ranks(output.all_logits(hidden), drawn), entropies)
        yield step
        finished = {row for row, id_ in enumerate(step.ids) if id_ == controls.end_id}
        if place + 1 >= controls.min_tokens:
            for sequence in controls.stop_sequences:
                finished |= set(filters.end_with(texts[:, : end + 1], sequence).nonzero().flatten().tolist())
        if finished:
            rest = torch.tensor([row for row in range(len(running)) if row not in finished], device=device)
            running = [running[row] for row in rest.tolist()]
            if not running:
                return
            texts, uniform, drawn = texts[rest], uniform[rest], drawn[rest]
            decoder.keep(rest)
        if place + 1 < num_tokens:
            decoder.append(drawn)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw from the softmax of each row by inverse transform sampling. A logit of -inf is never drawn.

    Logits (B, C), uniform (B,) in [0, 1) -> (B, 1), 0 to C - 1.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, C), the last is 1 up to rounding
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)


def probabilities_and_ranks(logits: Tensor, ids: Tensor) -> tuple[list[float], list[int]]:
    """Probability and rank of each row's id: (B, V), (B,)."""
    own = logits.gather(1, ids[:, None])  # (B, 1)
    probabilities = (own - logits.logsumexp(dim=-1, keepdim=True)).exp().flatten()
    return probabilities.tolist(), (1 + (logits > own).sum(dim=-1)).tolist()


class _OutputLayer:
    """The output layer, limited to the tokens that can be drawn.

    The 8-bit screen: one token needs few computations but the whole output weight, so reading memory is the bottleneck.
    For a small `top_k`, an 8-bit copy of the weight, a quarter of its size, first selects somewhat more than `top_k`
    candidates. Then only their logits are computed, in fp32. On one thread of a Xeon, one text is generated 1.6 times
    faster, 64 texts 2.1 times. `InferenceModel.int8_output` is None where the screen is impossible or not accurate.
    """

    def __init__(self, model: InferenceModel, controls: Controls):
        self.layer, self.controls = model.network.output, controls
        vocab_size, top_k = model.network.vocab_size, 1 if controls.temperature == 0 else controls.top_k
        self.count = vocab_size if top_k is None else min(top_k, vocab_size)  # C
        use_screen = self.count <= vocab_size * MAX_SCREENED_SHARE and not controls.depend_on_text
        self.screen = model.int8_output if use_screen else None
        self.bias_key: tuple[list[int], int | None] | None = None

    def candidates(self, hidden: Tensor, texts: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Logits of the top `top_k` tokens after `filters.process`, and their ids in ascending order.

        Hidden (B, D), texts (B, T) as in `filters`, after `place` new tokens -> (B, C) each; C = V without `top_k`.
        New tokens are in texts only if the controls read them.
        """
        if self.screen is None:
            logits = filters.process(self.all_logits(hidden), self.controls, texts, place)  # (B, V)
            filters.require_a_choice(logits, place)
            ids = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
            if self.count == logits.shape[1]:
                return logits, ids
        else:
            # Here the filters do not depend on the texts or the logits, so the bias can contain their result.
            key = (self.controls.banned_at(place), self.controls.forced_ids.get(place))
            if key != self.bias_key:
                self.bias_key, self.bias = key, filters.process(self.layer.bias[None], self.controls, texts, place)[0]
                filters.require_a_choice(self.bias[None], place)
            ids = _top_indices(self.screen(hidden, self.bias), num_candidates(self.count))  # (B, S)
            weight = F.embedding(ids, self.layer.weight)  # (B, S, D)
            logits = weight.mul_(hidden[:, None]).sum(dim=-1) + self.bias.take(ids)  # (B, S)
        best = _top_indices(logits, self.count)  # (B, C)
        ids, order = ids.gather(-1, best).sort()
        return logits.gather(-1, best.gather(-1, order)), ids

    def all_logits(self, hidden: Tensor) -> Tensor:
        """The network's logits: (B, D) -> (B, V)."""
        logits: Tensor = self.layer(hidden)
        return logits.float() if logits.dtype.itemsize < 4 else logits  # half precision is too coarse to draw from


def _top_indices(logits: Tensor, count: int) -> Tensor:
    """Indices of the largest `count` of each row, unsorted: (B, V) -> (B, count).

    The top `count` are in the `count` groups with the largest maxima, so `topk` searches only these. This takes half
    the time of one `topk`: 64 texts are generated 20 % faster.
    """
    num_groups, remainder = divmod(logits.shape[1], GROUP_SIZE)
    if remainder or num_groups < count:
        return logits.topk(count, sorted=False).indices
    grouped = logits.view(len(logits), GROUP_SIZE, num_groups)  # id i is in group i % num_groups
    groups = grouped.amax(dim=1).topk(count, sorted=False).indices  # (B, count)
    members = grouped.gather(2, groups[:, None].expand(-1, GROUP_SIZE, -1)).flatten(1)  # (B, GROUP_SIZE * count)
    best = members.topk(count, sorted=False).indices  # (B, count)
    return best // count * num_groups + groups.gather(1, best % count)
