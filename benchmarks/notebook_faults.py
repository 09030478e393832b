"""The cost of the notebook's faults, measured on a model trained as in the notebook.

    python benchmarks/notebook_faults.py RUN REVIEWS [OTHER_RUN ...]

RUN is a run folder of `experiment=keras`. REVIEWS is a folder of IMDB in the hub's layout. The held-out reviews are the
first 1,000 of `unsupervised`. Each further run is evaluated on the same reviews. The script prints one JSON object;
docs/notebook_faults.md has the table.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import minigpt_pl
from minigpt_pl.generation import filters
from minigpt_pl.loss import token_losses
from minigpt_pl.model import MiniGPT
from minigpt_pl.tokenizer import END, PADDING_ID, UNKNOWN_ID

HELD_OUT, TEXTS, NEW_TOKENS, TOP_K, PROMPT_WORDS = 1_000, 64, 200, 10, 5


@torch.inference_mode()
def generate_as_notebook(
    network: MiniGPT,
    prompts: list[list[int]],
    max_tokens: int,
    *,
    first_tokens_as_context: bool = True,
    one_token_more: bool = True,
    specials_allowed: bool = True,
) -> list[list[int]]:
    """The notebook's `TextGenerator`: the new ids of each prompt. A switch that is off corrects its fault.

    All prompts must have the same length.
    """
    generator = torch.Generator().manual_seed(0)
    texts = torch.tensor(prompts)  # (B, L)
    start, length = texts.shape[1], network.max_length
    for _ in range(max_tokens + one_token_more):
        window = texts[:, :length] if first_tokens_as_context else texts[:, -length:]
        logits = network.output(network.hidden_states(window)[:, -1])  # (B, V)
        if not specials_allowed:
            logits = filters.ban(logits, [PADDING_ID, UNKNOWN_ID])
        probabilities = filters.top_k(logits, TOP_K).softmax(-1)
        texts = torch.cat([texts, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return texts[:, start:].tolist()


def ids_of(model: minigpt_pl.TextModel, texts: list[str]) -> np.ndarray:
    """The first 81 ids of each text, with padding: (N, 81)."""
    length = model.network.max_length + 1
    rows = [encoding.ids[:length] for encoding in model.tokenizer.encode_batch(texts)]
    return np.array([row + [PADDING_ID] * (length - len(row)) for row in rows])


@torch.inference_mode()
def held_out_losses(model: minigpt_pl.TextModel, texts: list[str]) -> dict[str, float]:
    """Losses in nats, and perplexities: as in the notebook, without padding, and of words only (without `[UNK]`)."""
    rows = torch.from_numpy(ids_of(model, texts))
    targets, output = rows[:, 1:], model.network.output
    losses = torch.cat(
        [
            token_losses(model.network.hidden_states(part[:, :-1]), output.weight, output.bias, part[:, 1:])
            for part in rows.split(100)
        ]
    )
    means = {
        "padding_counted": losses.mean(),
        "padding_left_out": losses[targets != PADDING_ID].mean(),
        "words_only": losses[(targets != PADDING_ID) & (targets != UNKNOWN_ID)].mean(),
    }
    return {name: value.item() for name, value in means.items()} | {
        f"perplexity_{name}": value.exp().item() for name, value in means.items()
    }


@torch.inference_mode()
def packed_loss(model: minigpt_pl.TextModel, texts: list[str]) -> float:
    """Loss of all tokens of the texts, in consecutive windows as with `data.cut=pack`."""
    length, end_id = model.network.max_length, model.tokenizer.token_to_id(END)
    ids = torch.tensor([id_ for text in texts for id_ in [*model.tokenizer.encode(text).ids, end_id]])
    losses = []
    for start in range(0, len(ids) - length, 64 * length):
        windows = ids[start : start + 64 * length + 1]
        rows = (len(windows) - 1) // length
        inputs, targets = (windows[i : i + rows * length].view(rows, length) for i in (0, 1))
        output = model.network.output
        losses.append(token_losses(model.network.hidden_states(inputs), output.weight, output.bias, targets).flatten())
    return torch.cat(losses).mean().item()


@torch.inference_mode()
def past_the_context(network: MiniGPT, prompts: list[list[int]], texts: list[list[int]]) -> dict[str, float]:
    """The tokens after token 80: different words per text, and perplexity under the same model.

    The model predicts each token from the last 80 tokens.
    """
    whole = torch.tensor([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    length, losses = network.max_length, []
    for place in range(length, whole.shape[1]):
        logits = network.output(network.hidden_states(whole[:, place - length : place])[:, -1])
        losses.append(F.cross_entropy(logits, whole[:, place], reduction="none"))
    tails = whole[:, length:].tolist()
    return {
        "tokens": len(tails[0]),
        "different_words": statistics.mean(len(set(tail)) for tail in tails),
        "perplexity": torch.stack(losses).mean().exp().item(),
    }


def lost_words(model: minigpt_pl.TextModel, texts: list[str]) -> dict[str, float]:
    """How many words of five-word prompts become `[UNK]`: with a split on spaces, and with this package."""
    vocabulary = model.tokenizer.get_vocab()
    prompts = [text.split()[:PROMPT_WORDS] for text in texts]
    notebook = [[word not in vocabulary for word in prompt] for prompt in prompts]
    ours = [[id_ == UNKNOWN_ID for id_ in model.tokenizer.encode(" ".join(prompt)).ids] for prompt in prompts]
    return {
        f"{whose}_{what}": value
        for whose, lost in (("notebook", notebook), ("ours", ours))
        for what, value in (
            ("words_lost", sum(map(sum, lost)) / sum(map(len, lost))),
            ("prompts_with_a_lost_word", sum(map(any, lost)) / len(lost)),
        )
    }


def token_seconds(network: MiniGPT, prompt: list[int], everything: bool) -> float:
    """Median seconds per new token at 80 tokens of context.

    everything: compute all 80 rows of logits, as the notebook does, or only the last one.
    """
    window = torch.tensor([(prompt * 80)[: network.max_length]])
    seconds = []
    with torch.inference_mode():
        for _ in range(50):
            start = time.perf_counter()
            network(window) if everything else network.output(network.hidden_states(window)[:, -1])
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(run: str, reviews: str, *others: str) -> None:
    import pyarrow.parquet as parquet

    torch.manual_seed(0)
    files = sorted(Path(reviews).glob("plain_text/unsupervised-*.parquet"))
    texts = parquet.read_table(files[0])["text"].to_pylist()[:HELD_OUT]
    model = minigpt_pl.load(Path(run) / "checkpoints" / "last.ckpt")
    encoded = ids_of(model, texts)
    prompts = [row[:PROMPT_WORDS].tolist() for row in encoded if UNKNOWN_ID not in row[:PROMPT_WORDS]][:TEXTS]
    as_notebook = generate_as_notebook(model.network, prompts, NEW_TOKENS)
    last_tokens = generate_as_notebook(model.network, prompts, NEW_TOKENS, first_tokens_as_context=False)
    end_id = model.tokenizer.token_to_id(END)
    specials = [[id_ in (PADDING_ID, UNKNOWN_ID) for id_ in text] for text in last_tokens]
    print(
        json.dumps(
            {
                "past_80_with_the_first_80": past_the_context(model.network, prompts, as_notebook),
                "past_80_with_the_last_80": past_the_context(model.network, prompts, last_tokens),
                "tokens_asked_for": NEW_TOKENS,
                "tokens_written": len(as_notebook[0]),
                "prompts": lost_words(model, texts),
                "specials_drawn": {
                    "tokens": sum(map(sum, specials)) / sum(map(len, specials)),
                    "texts": sum(map(any, specials)) / len(specials),
                },
                "texts_that_end": sum(end_id in text for text in last_tokens) / len(last_tokens),
                "padding_share_of_targets": float((encoded[:, 1:] == PADDING_ID).mean()),
                "held_out": {path: held_out_losses(minigpt_pl.load(path), texts) for path in (run, *others)},
                "held_out_packed": {path: packed_loss(minigpt_pl.load(path), texts) for path in others},
                "token_ms": {
                    "80_rows_of_logits": 1000 * token_seconds(model.network, prompts[0], everything=True),
                    "one_row_of_logits": 1000 * token_seconds(model.network, prompts[0], everything=False),
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
