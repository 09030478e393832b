"""Beam search for the likeliest text."""

from collections.abc import Sequence

import torch

from minigpt_pl.generation import decoders, filters
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.inference import InferenceModel


def search(model: InferenceModel, prompt: Sequence[int], controls: Controls) -> list[int]:
    """Beam search (Lowerre 1976; for networks Graves, arXiv 1211.3711), as Hugging Face's `generate(num_beams=...)`.

    Each step keeps the `num_beams` likeliest continuations of all beams, and the `num_beams` best finished texts. The
    score of a text is log-probability / length ** `length_penalty`. Both include the end token. The search ends when
    `num_beams` texts are finished and no unfinished one is better. `filters.process` gets log-probabilities.

    Args:
        prompt: token ids, at least one.
        controls: those of `filters.process`, `num_beams`, `length_penalty`, and those that end a text.

    Returns:
        The new ids, with `end_id` if it ended the text.

    Raises:
        InputError: `no_repeat_ngram_size` and the banned tokens exclude every token of every beam.
    """
    network, num_beams, vocab_size = model.network, controls.num_beams, model.network.vocab_size
    decoder = decoders.start(model, [prompt])
    texts = torch.tensor([prompt], device=network.output.weight.device)  # (B, T)
    totals = torch.zeros(1, 1, device=texts.device)  # (B, 1): log-probability of each beam
    finished: list[tuple[float, list[int]]] = []  # (score, new ids), the best first
    for position in range(controls.num_tokens):
        log_probabilities = network.output(decoder.last_hidden()).log_softmax(dim=-1)  # (B, V)
        log_probabilities = totals + filters.process(log_probabilities, controls, texts, position)
        if not finished:
            filters.require_a_choice(log_probabilities.view(1, -1), position)
        # Choose 2 * num_beams: even if num_beams of them end, num_beams others continue.
        best, indices = log_probabilities.flatten().topk(2 * num_beams)  # (2 * num_beams,) each
        rows, ids = indices // vocab_size, indices % vocab_size
        texts = torch.cat([texts[rows], ids[:, None]], dim=1)
        ends = ids == (-1 if controls.end_id is None else controls.end_id)
        if position + 1 >= controls.min_tokens:
            for sequence in controls.stop_sequences:
                ends |= filters.end_with(texts, sequence)
        ends |= position + 1 == controls.num_tokens
        scores = best / (position + 1) ** controls.length_penalty
        for beam in range(num_beams):
            if ends[beam] and best[beam].isfinite():
                finished.append((float(scores[beam]), texts[beam, len(prompt) :].tolist()))
        finished = sorted(finished, key=lambda text: -text[0])[:num_beams]
        unfinished = (~ends & best.isfinite()).nonzero().flatten()[:num_beams]
        if not len(unfinished) or (len(finished) == num_beams and scores[unfinished[0]] <= finished[-1][0]):
            break
        texts, totals = texts[unfinished], best[unfinished, None]
        decoder.keep(rows[unfinished])
        decoder.append(ids[unfinished])
    return finished[0][1]
