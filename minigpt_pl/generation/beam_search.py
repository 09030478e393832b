"""The likeliest text, searched for with several that grow side by side."""

from collections.abc import Sequence

import torch

from minigpt_pl.generation import decoders, filters
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.prepared import Prepared


def search(prepared: Prepared, prompt: Sequence[int], controls: Controls) -> list[int]:
    """Beam search (Lowerre 1976; for networks Graves, arXiv 1211.3711), as Hugging Face's `generate(num_beams=...)`.

    At each step the `num_beams` likeliest of all continuations of all beams go on. A text that ended is kept with its
    log-probability over its length to the `length_penalty` (the end token counts in both), while it is among the
    `num_beams` best; once as many have ended and the likeliest that goes on is no better, the best is the result. As
    there, `filters.process` sees log-probabilities, to which the repetition penalty does something else than to logits.

    Args:
        prompt: token ids, at least one.
        controls: those of `filters.process`, `num_beams`, `length_penalty`, and what ends a text.

    Returns:
        The new ids, `end_id` among them where the text ended itself.

    Raises:
        InputError: `no_repeat_ngram_size` or the bans leave nothing that could go on.
    """
    model, num_beams, size = prepared.model, controls.num_beams, prepared.model.vocab_size
    decoder = decoders.start(prepared, [prompt])
    texts = torch.tensor([prompt], device=model.output.weight.device)  # (B, T)
    scores = torch.zeros(1, 1, device=texts.device)  # (B, 1): the log-probability of each so far
    finished: list[tuple[float, list[int]]] = []  # the best first
    for place in range(controls.num_tokens):
        log_probabilities = model.output(decoder.hidden_states()).log_softmax(dim=-1)  # (B, V)
        log_probabilities = scores + filters.process(log_probabilities, controls, texts, place)
        if not finished:
            filters.require_a_choice(log_probabilities.view(1, -1), place)
        # If all of the best end, as many go on.
        best, at = log_probabilities.flatten().topk(2 * num_beams)  # (2 * num_beams,) twice
        rows, ids = at // size, at % size
        texts = torch.cat([texts[rows], ids[:, None]], dim=1)
        over = ids == (-1 if controls.end_id is None else controls.end_id)
        if place + 1 >= controls.min_tokens:
            for sequence in controls.stop_sequences:
                over |= filters.end_with(texts, sequence)
        over |= place + 1 == controls.num_tokens
        per_length = best / (place + 1) ** controls.length_penalty
        for beam in range(num_beams):
            if over[beam] and best[beam].isfinite():
                finished.append((float(per_length[beam]), texts[beam, len(prompt) :].tolist()))
        finished = sorted(finished, key=lambda beam: -beam[0])[:num_beams]
        going = (~over & best.isfinite()).nonzero().flatten()[:num_beams]
        if not len(going) or (len(finished) == num_beams and per_length[going[0]] <= finished[-1][0]):
            break
        texts, scores = texts[going], best[going, None]
        decoder.keep(rows[going])
        decoder.append(ids[going])
    return finished[0][1]
