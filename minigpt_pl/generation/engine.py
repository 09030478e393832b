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
from minigpt_pl.generation.prepared import Prepared, prepare, screened
from minigpt_pl.model import MiniGPT

SCREENED_SHARE = 1 / 20  # of the vocabulary; more are not looked for in 8 bits


class Step(NamedTuple):
    """One more token for each text that goes on. The last three are empty unless asked for.

    Attributes:
        texts: which of the prompts, ascending.
        ids: the new token of each; `end_id` where a text ended itself.
        probabilities: what the network itself gave it: temperature 1, no controls, all logits in fp32.
        ranks: 1 where it was the network's likeliest.
        entropies: of the distribution that it was drawn from, the controls applied; bits, 0 or above.
    """

    texts: list[int]
    ids: list[int]
    probabilities: list[float] = []
    ranks: list[int] = []
    entropies: list[float] = []


def generate_ids(
    model: MiniGPT, prompts: Sequence[Sequence[int]], controls: Controls, seeds: Sequence[int]
) -> list[list[int]]:
    """The new ids of each prompt, without the end token: `num_tokens`, or fewer where a text ended itself.

    Arguments and errors are those of `stream_ids`.
    """
    new_ids: list[list[int]] = [[] for _ in prompts]
    with inference_without_autocast(model):
        for step in _steps(model, prompts, controls, seeds):
            for text, id_ in zip(step.texts, step.ids, strict=True):
                if id_ != controls.end_id:
                    new_ids[text].append(id_)
    return new_ids


def stream_ids(
    model: MiniGPT,
    prompts: Sequence[Sequence[int]],
    controls: Controls,
    seeds: Sequence[int],
    with_probabilities: bool = False,
) -> Iterator[Step]:
    """Continue each prompt, one token at a time; the last `max_length` tokens are the context.

    A text depends on its own prompt and seed only: the same alone and in any batch, and with more `num_tokens` it
    goes on where it ended. That holds bit for bit in fp32 on one machine with one number of threads; other hardware,
    or precision, adds up in another order, and a draw that falls within the 1e-6 or so that this makes can go to the
    next token. The model's weights must not change before the last step.

    Args:
        model: of one block or more; its dropout is left out.
        prompts: token ids, at least one each, of any lengths.
        controls: the same for all.
        seeds: one a prompt.
        with_probabilities: each token's probability and rank, and the entropy, too; changes no draw.

    Yields:
        The steps; with beams those of one text after the other's, each text once it is found.

    Raises:
        InputError: `no_repeat_ngram_size` or the bans leave nothing to draw.
    """
    steps = _steps(model, prompts, controls, seeds, with_probabilities)
    while True:
        with inference_without_autocast(model):  # not between the steps, where the reader's own work goes on
            step = next(steps, None)
        if step is None:
            return
        yield step


def _steps(
    model: MiniGPT,
    prompts: Sequence[Sequence[int]],
    controls: Controls,
    seeds: Sequence[int],
    with_probabilities: bool = False,
) -> Iterator[Step]:
    prepared = prepare(model)
    if controls.num_beams > 1:
        for text, prompt in enumerate(prompts):
            found = beam_search.search(prepared, prompt, controls)
            # Written once more, each token forced: the steps, with what is asked for.
            forced = {"num_beams": 1, "length_penalty": 1.0, "num_tokens": len(found), "min_tokens": 0}
            again = replace(controls, **forced, stop_sequences=(), forced_ids=dict(enumerate(found)))
            for step in _steps(model, [prompt], again, [0], with_probabilities):
                yield step._replace(texts=[text])
        return
    device = prepared.model.output.weight.device
    longest, num_tokens = max(map(len, prompts)), controls.num_tokens
    texts = torch.tensor(  # (B, T), the prompts on the right
        [[-1] * (longest - len(prompt)) + [*prompt] for prompt in prompts], device=device
    )
    texts = F.pad(texts, (0, num_tokens))  # (B, T + num_tokens)
    # All of a text's chances are drawn ahead, from its own generator; on the CPU, so that they are the same anywhere.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    chances = [torch.rand(num_tokens, generator=own, dtype=torch.float32, device="cpu") for own in generators]
    chances = torch.stack(chances).to(device)  # (B, num_tokens)
    read = controls.depend_on_text or bool(controls.stop_sequences)  # else the texts need not be written
    running = list(range(len(prompts)))  # whose text each row is
    decoder, output = decoders.start(prepared, prompts), _Output(prepared, controls)
    for place in range(num_tokens):
        end = longest + place
        hidden = decoder.hidden_states()  # (B, D)
        logits, ids = output.candidates(hidden, texts[:, :end], place)  # (B, C) twice
        if controls.temperature == 0:
            choice = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        else:
            logits = filters.warp(logits, controls)
            choice = draw(logits, chances[:, place])
        drawn = ids.gather(-1, choice).squeeze(-1)  # (B,)
        if read:
            texts[:, end] = drawn
        step = Step(running, drawn.tolist())
        if with_probabilities:
            entropies = [0.0] * len(drawn) if controls.temperature == 0 else _entropies(logits).tolist()
            probabilities, ranks = probabilities_and_ranks(output.all_logits(hidden), drawn)
            step = step._replace(probabilities=probabilities, ranks=ranks, entropies=entropies)
        yield step
        over = {row for row, id_ in enumerate(step.ids) if id_ == controls.end_id}
        if place + 1 >= controls.min_tokens:
            for sequence in controls.stop_sequences:
                over |= set(filters.end_with(texts[:, : end + 1], sequence).nonzero().flatten().tolist())
        if over:
            rest = torch.tensor([row for row in range(len(running)) if row not in over], device=device)
            running = [running[row] for row in rest.tolist()]
            if not running:
                return
            texts, chances, drawn = texts[rest], chances[rest], drawn[rest]
            decoder.keep(rest)
        if place + 1 < num_tokens:
            decoder.append(drawn)


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


def probabilities_and_ranks(logits: Tensor, ids: Tensor) -> tuple[list[float], list[int]]:
    """What the network gave these tokens, as `Step` has it: all the logits (B, V), and ids (B,)."""
    own = logits.gather(1, ids[:, None])  # (B, 1)
    probabilities = (own - logits.logsumexp(dim=-1, keepdim=True)).exp().flatten()
    return probabilities.tolist(), (1 + (logits > own).sum(dim=-1)).tolist()


def _entropies(logits: Tensor) -> Tensor:
    """In bits: (B, C) -> (B,)."""
    probabilities = logits.softmax(dim=-1)
    return torch.special.entr(probabilities).sum(dim=-1) / math.log(2)


class _Output:
    """The output layer, with what may be drawn.

    Where only the `top_k` likeliest count, a CPU with int8 units finds them, and some more, with the weight in int8,
    which is a quarter of the memory to read; their logits are then computed in fp32.
    """

    def __init__(self, prepared: Prepared, controls: Controls):
        self.layer, self.controls = prepared.model.output, controls
        vocab_size, top_k = prepared.model.vocab_size, 1 if controls.temperature == 0 else controls.top_k
        self.count = vocab_size if top_k is None else min(top_k, vocab_size)
        self.screen = None
        if self.count <= vocab_size * SCREENED_SHARE and not controls.depend_on_text:
            self.screen, self.screened, self.bias_for = prepared.rough_output, screened(self.count), None

    def candidates(self, hidden: Tensor, texts: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Logits after `filters.process`, and their token ids in ascending order.

        Args:
            hidden: (B, D).
            texts: (B, T), filled up with -1 on the left; new tokens only where the controls read them.
            place: how many new tokens each has.

        Returns:
            (B, C) twice: the `top_k` likeliest; C = V without it.
        """
        if self.screen is not None:
            return self._screened(hidden, texts, place)
        logits = filters.process(self.all_logits(hidden), self.controls, texts, place)  # (B, V)
        filters.require_a_choice(logits, place)
        if self.count == logits.shape[1]:
            return logits, torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
        ids = _largest(logits, self.count).sort().values
        return logits.gather(-1, ids), ids

    def all_logits(self, hidden: Tensor) -> Tensor:
        """As the network gives them: (B, D) -> (B, V)."""
        logits = self.layer(hidden)  # (B, V)
        return logits.float() if logits.dtype.itemsize < 4 else logits  # half precision is too coarse to draw from

    def _screened(self, hidden: Tensor, texts: Tensor, place: int) -> tuple[Tensor, Tensor]:
        # What is banned or forced does not depend on the text here: the bias can hold it.
        wanted = (self.controls.banned_at(place), self.controls.forced_ids.get(place))
        if self.bias_for != wanted:
            self.bias = filters.process(self.layer.bias[None], self.controls, texts, place)[0]  # (V,)
            filters.require_a_choice(self.bias[None], place)
            self.bias_for = wanted
        ids = _largest(self.screen(hidden, self.bias), self.screened)  # (B, S), from (B, V)
        rows = F.embedding(ids, self.layer.weight)  # (B, S, D)
        logits = rows.mul_(hidden[:, None]).sum(dim=-1) + self.bias.take(ids)
        best = logits.topk(self.count, sorted=False).indices  # (B, C)
        ids, order = ids.gather(-1, best).sort()
        return logits.gather(-1, best.gather(-1, order)), ids


def _largest(logits: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row are, in no order: (B, V) -> (B, count)."""
    size = logits.shape[1]
    groups = size // 20
    if size % 20 or groups < count:
        return logits.topk(count, sorted=False).indices
    # They are in the `count` groups with the largest maxima: id i is in group i % groups.
    columns = logits.view(len(logits), 20, groups)
    best = columns.amax(dim=1).topk(count, sorted=False).indices  # (B, count)
    members = columns.gather(2, best[:, None].expand(-1, 20, -1)).flatten(1)  # (B, 20 * count)
    found = members.topk(count, sorted=False).indices  # (B, count)
    return found // count * groups + best.gather(1, found % count)
