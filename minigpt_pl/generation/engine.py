"""Token ids in, token ids out. This file knows nothing about text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_pl.cpu.linear import inference_without_autocast
from minigpt_pl.cpu.threads import FreeCores
from minigpt_pl.generation import beam_search, decoders, filters
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.inference import InferenceModel, num_candidates
from minigpt_pl.model import MiniGPT

MAX_PRESELECTED_SHARE = 1 / 20  # of the vocabulary; a larger top_k does not use the 8-bit pre-selection
GROUP_SIZE = 20  # tokens in a group of `_top_indices`
_CORES = FreeCores()

Model = MiniGPT | InferenceModel
Prompts = Sequence[Sequence[int]]


class Step(NamedTuple):
    """The next token of each unfinished text. The last three fields are empty without `with_probabilities`.

    Attributes:
        texts: index of the prompt of each unfinished text, ascending.
        ids: the new token of each text; `end_id` if the text ends here.
        probabilities: probability of each token at temperature 1, without controls.
        ranks: rank of the token among the network's logits; 1 is the likeliest.
        entropies: entropy in bits of the distribution after the controls.
    """

    texts: list[int]
    ids: list[int]
    probabilities: list[float] = []
    ranks: list[int] = []
    entropies: list[float] = []


def generate_ids(model: Model, prompts: Prompts, controls: Controls, seeds: Sequence[int]) -> list[list[int]]:
    """The new ids of each prompt: `num_tokens`, or fewer if the text ends. The end token is left out.

    The arguments and errors are those of `stream_ids`.
    """
    new_ids: list[list[int]] = [[] for _ in prompts]
    model = _prepared(model)
    with inference_without_autocast(model.network):
        for step in _on_free_cores(_steps(model, prompts, controls, seeds)):
            for text, id_ in zip(step.texts, step.ids, strict=True):
                if id_ != controls.end_id:
                    new_ids[text].append(id_)
    return new_ids


def stream_ids(
    model: Model, prompts: Prompts, controls: Controls, seeds: Sequence[int], with_probabilities: bool = False
) -> Iterator[Step]:
    """Continue each prompt, one token at a time. The last `max_length` tokens are the context.

    A text depends only on its own prompt and seed, up to rounding. A larger `num_tokens` only makes the text longer.
    The batch size changes the order of additions. This changes probabilities by about 1e-6, and in rare cases a word.
    Other hardware and other numbers of threads have the same effect. Each step uses the free cores (cpu/threads.py).

    Args:
        model: an `InferenceModel` or a network. Dropout is off. The weights must not change before the last step.
        prompts: token ids, at least one per prompt.
        controls: used for all prompts.
        seeds: a random seed for each prompt.
        with_probabilities: also compute probabilities, ranks and entropies. This changes no text.

    Yields:
        The steps. Beam search handles one text after the other. It completes a text before it yields the text's steps.

    Raises:
        InputError: `no_repeat_ngram_size` and the banned tokens exclude every token.
    """
    model = _prepared(model)
    steps = _on_free_cores(_steps(model, prompts, controls, seeds, with_probabilities))
    while True:
        with inference_without_autocast(model.network):  # leave inference mode before `yield`
            step = next(steps, None)
        if step is None:
            return
        yield step


def _prepared(model: Model) -> InferenceModel:
    return InferenceModel(model) if isinstance(model, MiniGPT) else model


def _on_free_cores(steps: Iterator[Step]) -> Iterator[Step]:
    while True:
        with _CORES.step():  # the caller of this generator has all threads
            step = next(steps, None)
        if step is None:
            return
        yield step


def _steps(
    model: InferenceModel, prompts: Prompts, controls: Controls, seeds: Sequence[int], with_probabilities: bool = False
) -> Iterator[Step]:
    if controls.num_beams > 1:
        for text, prompt in enumerate(prompts):
            new_ids = beam_search.search(model, prompt, controls)
            # Force the same ids again to compute their probabilities.
            forced = replace(controls, num_tokens=len(new_ids), forced_ids=dict(enumerate(new_ids)))
            forced = replace(forced, num_beams=1, length_penalty=1.0, stop_sequences=())
            for step in _steps(model, [prompt], forced, [0], with_probabilities):
                yield step._replace(texts=[text])
        return
    if not prompts:
        return
    device, num_tokens = model.network.output.weight.device, controls.num_tokens
    longest = max(map(len, prompts))  # T
    padded = [[-1] * (longest - len(prompt)) + [*prompt] + [0] * num_tokens for prompt in prompts]
    texts = torch.tensor(padded, device=device)  # (B, T + num_tokens)
    # Draw all random numbers of a text in advance, from its own CPU generator. So all devices get the same.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    draws = [torch.rand(num_tokens, generator=generator, dtype=torch.float32, device="cpu") for generator in generators]
    uniform = torch.stack(draws).to(device)  # (B, num_tokens)
    reads_texts = controls.depend_on_text or bool(controls.stop_sequences)
    running = list(range(len(prompts)))  # index of the prompt of each row
    decoder, output = decoders.start(model, prompts), _OutputLayer(model, controls)
    for position in range(num_tokens):
        end = longest + position
        hidden = decoder.last_hidden()  # (B, D)
        logits, ids = output.candidates(hidden, texts[:, :end], position)  # (B, C) each
        if controls.temperature == 0:
            choice = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        else:
            logits = filters.warp(logits, controls)
            choice = draw(logits, uniform[:, position])
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
        if position + 1 >= controls.min_tokens:
            for sequence in controls.stop_sequences:
                finished |= set(filters.end_with(texts[:, : end + 1], sequence).nonzero().flatten().tolist())
        if finished:
            rest = torch.tensor([row for row in range(len(running)) if row not in finished], device=device)
            running = [running[row] for row in rest.tolist()]
            if not running:
                return
            texts, uniform, drawn = texts[rest], uniform[rest], drawn[rest]
            decoder.keep(rest)
        if position + 1 < num_tokens:
            decoder.append(drawn)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw from the softmax of each row by inverse transform sampling. A logit of -inf is never drawn.

    Logits (B, C), uniform (B,) in [0, 1) -> columns (B, 1), each 0 to C - 1.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, C), the last is 1 up to rounding
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)


def probabilities_and_ranks(logits: Tensor, ids: Tensor) -> tuple[list[float], list[int]]:
    """Probability and rank of each row's id: logits (B, V), ids (B,)."""
    chosen = logits.gather(1, ids[:, None])  # (B, 1)
    probabilities = (chosen - logits.logsumexp(dim=-1, keepdim=True)).exp().flatten()
    return probabilities.tolist(), (1 + (logits > chosen).sum(dim=-1)).tolist()


class _OutputLayer:
    """The output layer, limited to the tokens that can be drawn.

    For a small `top_k` it uses an 8-bit pre-selection, because most of the time is spent on reading the output weight.
    An 8-bit copy of the weight has a quarter of its size. It selects somewhat more than `top_k` candidates. Only their
    logits are computed in fp32. On one thread of a Xeon, one text is generated 1.6 times faster, 64 texts 2.1 times.
    `InferenceModel.int8_output` is None where the pre-selection is impossible or not accurate.
    """

    def __init__(self, model: InferenceModel, controls: Controls):
        self.layer, self.controls = model.network.output, controls
        vocab_size, top_k = model.network.vocab_size, 1 if controls.temperature == 0 else controls.top_k
        self.count = vocab_size if top_k is None else min(top_k, vocab_size)  # C
        preselect = self.count <= vocab_size * MAX_PRESELECTED_SHARE and not controls.depend_on_text
        self.int8_layer = model.int8_output if preselect else None
        self.bias_key: tuple[list[int], int | None] | None = None

    def candidates(self, hidden: Tensor, texts: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Logits of the top `top_k` tokens after `filters.process`, and their ids in ascending order.

        Hidden (B, D), texts (B, T) and position as in `filters` -> (B, C) each. Without `top_k`, C = V.
        If `controls.depend_on_text`, `texts` must contain the new tokens.
        """
        if self.int8_layer is None:
            logits = filters.process(self.all_logits(hidden), self.controls, texts, position)  # (B, V)
            filters.require_a_choice(logits, position)
            ids = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
            if self.count == logits.shape[1]:
                return logits, ids
        else:
            # Here the filters do not depend on the texts or the logits, so their result can be a part of the bias.
            key = (self.controls.banned_at(position), self.controls.forced_ids.get(position))
            if key != self.bias_key:
                self.bias_key = key
                self.bias = filters.process(self.layer.bias[None], self.controls, texts, position)[0]
                filters.require_a_choice(self.bias[None], position)
            ids = _top_indices(self.int8_layer(hidden, self.bias), num_candidates(self.count))  # (B, S)
            weight = F.embedding(ids, self.layer.weight)  # (B, S, D)
            logits = weight.mul_(hidden[:, None]).sum(dim=-1) + self.bias.take(ids)  # (B, S)
        best = _top_indices(logits, self.count)  # (B, C)
        ids, order = ids.gather(-1, best).sort()
        return logits.gather(-1, best.gather(-1, order)), ids

    def all_logits(self, hidden: Tensor) -> Tensor:
        """The network's logits: (B, D) -> (B, V)."""
        logits: Tensor = self.layer(hidden)
        return logits.float() if logits.dtype.itemsize < 4 else logits  # half precision is too coarse for drawing


def _top_indices(logits: Tensor, count: int) -> Tensor:
    """Indices of the largest `count` of each row, unsorted: (B, V) -> (B, count).

    The largest values lie in the groups with the largest maxima, so `topk` searches only `count` groups. This takes
    half the time of a `topk` of whole rows: 64 texts are generated 20 % faster.
    """
    num_groups, remainder = divmod(logits.shape[1], GROUP_SIZE)
    if remainder or num_groups < count:
        return logits.topk(count, sorted=False).indices
    grouped = logits.view(len(logits), GROUP_SIZE, num_groups)  # id i is in group i % num_groups
    groups = grouped.amax(dim=1).topk(count, sorted=False).indices  # (B, count)
    members = grouped.gather(2, groups[:, None].expand(-1, GROUP_SIZE, -1)).flatten(1)  # (B, GROUP_SIZE * count)
    best = members.topk(count, sorted=False).indices  # (B, count)
    return best // count * num_groups + groups.gather(1, best % count)
