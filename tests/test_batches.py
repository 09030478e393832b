"""Sequences of a text, and the order of their batches."""

import numpy as np
import pytest
import torch

from minigpt_pl.data.batches import BatchLoader, Sequences
from minigpt_pl.data.corpus import Ids

END = 99
DOCUMENTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34, 35, 36], [40, 41]]
TOKENS = [id_ for document in DOCUMENTS for id_ in [*document, END]]
IDS = Ids(np.array(TOKENS, dtype=np.uint16), np.cumsum([0] + [len(d) + 1 for d in DOCUMENTS]))


def sequences(cut="truncate", end_token=True, count_padding=False, length=4):
    return Sequences(IDS, length, cut, end_token, count_padding)


def all_rows(made: Sequences) -> list[list[int]]:
    return made[torch.arange(len(made))].tolist()


def test_truncate_takes_the_start_of_each_document():
    assert all_rows(sequences()) == [
        [10, 11, 12, 99, 0], [20, 99, 0, 0, 0], [30, 31, 32, 33, 34], [40, 41, 99, 0, 0],
    ]  # fmt: skip
    assert sequences().target_counts.tolist() == [3, 1, 4, 2]


def test_the_notebooks_sequences_have_no_end_and_count_padding():
    made = sequences(end_token=False, count_padding=True)
    assert all_rows(made) == [[10, 11, 12, 0, 0], [20, 0, 0, 0, 0], [30, 31, 32, 33, 34], [40, 41, 0, 0, 0]]
    assert made.target_counts.tolist() == [4, 4, 4, 4]


def test_a_document_of_one_word_without_end_has_no_target():
    assert len(sequences(end_token=False)) == 3


def test_pack_loses_no_token():
    made = sequences(cut="pack")
    targets = [t for row, n in zip(all_rows(made), made.target_counts, strict=True) for t in row[1 : n + 1]]
    assert targets == TOKENS[1:], "each token but the first is a target once"
    assert all_rows(made)[0] == [10, 11, 12, 99, 20]
    assert len(sequences(cut="pack", count_padding=True)) == len(made) == 4, "a sequence without a target"


def test_ids_above_the_signed_range():
    for dtype in (np.uint16, np.uint32):
        largest = np.iinfo(dtype).max
        made = Sequences(Ids(np.array([5, largest, 7], dtype=dtype), np.array([0, 3])), 2, "truncate", True, False)
        assert all_rows(made) == [[5, largest, 7]]


def loader(**changes) -> BatchLoader:
    options = {"batch_size": 3, "seed": 5} | changes
    ids = Ids(np.arange(1, 101, dtype=np.uint16), np.arange(0, 101, 5))
    return BatchLoader(Sequences(ids, 4, "truncate", True, False), **options)


def rows(batches) -> list[tuple[int, ...]]:
    return [tuple(batch.inputs[:, 0].tolist()) for batch in batches]


def test_targets_are_the_inputs_one_position_later():
    batch = next(iter(loader()))
    assert batch.inputs.shape == batch.targets.shape == (3, 4)
    assert (batch.targets == batch.inputs + 1).all()


def test_an_epoch_has_every_sequence_once():
    batches = rows(loader())
    assert len(batches) == len(loader()) == 7 and len(batches[-1]) == 2
    assert sorted(sum(batches, ())) == list(range(1, 101, 5))


def test_order_is_a_function_of_seed_and_epoch():
    first = loader()
    epochs = [rows(first) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    again = loader()
    again.restore({"epoch": 2, "batches_done": 0})
    assert rows(again) == epochs[2]
    assert rows(loader(seed=6)) not in epochs
    assert (
        rows(loader(seed=None))
        == rows(loader(seed=None))
        == [tuple(range(a, min(a + 15, 100), 5)) for a in range(1, 100, 15)]
    )


@pytest.mark.parametrize("done", [0, 1, 4, 6])
def test_resume_inside_an_epoch_is_exact(done):
    whole = loader()
    expected = [rows(whole), rows(whole)]
    interrupted = loader()
    iterator = iter(interrupted)
    for _ in range(done):
        next(iterator)
    resumed = loader()
    resumed.restore(interrupted.state())
    assert rows(resumed) == expected[0][done:]
    assert rows(resumed) == expected[1]


def test_state_after_the_last_batch_is_the_next_epoch():
    # Lightning takes len(loader) batches and never reaches the end of the loop.
    made = loader()
    iterator = iter(made)
    for _ in range(len(made)):
        next(iterator)
    assert made.state() == {"epoch": 1, "batches_done": 0}


def test_after_a_pass_that_was_left_early_the_next_epoch_starts():
    made, whole = loader(), loader()
    next(iter(made))
    rows(whole)
    assert rows(made) == rows(whole)


@pytest.mark.parametrize(("world_size", "batches"), [(2, 7), (3, 6)])  # the last batch has 2 sequences
def test_processes_divide_each_batch(world_size, batches):
    shares = [rows(loader(rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len(shares[0]) == batches
    for parts, whole in zip(zip(*shares, strict=True), rows(loader()), strict=False):
        assert sorted(sum(parts, ())) == sorted(whole)
        assert all(parts)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("batch_size", [6, 19, 30])
def test_processes_validate_every_sequence_once(world_size, batch_size):
    """Even if the last batch has fewer sequences than there are processes."""
    options = {"seed": None, "batch_size": batch_size, "world_size": world_size}
    shares = [rows(loader(rank=rank, **options)) for rank in range(world_size)]
    assert len(set(map(len, shares))) == 1
    assert sorted(sum(sum(shares, []), ())) == list(range(1, 101, 5))


def test_targets_of_a_step_are_counted_over_batches_and_processes():
    options = {"batch_size": 2, "seed": 0, "accumulate": 2, "world_size": 2}
    shares = [list(BatchLoader(sequences(), rank=rank, **options)) for rank in range(2)]
    counted = sum(int((b.targets != 0).sum()) for share in shares for b in share)
    assert counted == 10
    assert [b.step_targets for share in shares for b in share] == [10] * 4
    assert [sum(b.num_targets for b in share) for share in shares] == [10, 10]


def test_limits():
    assert len(rows(loader(max_batches=2))) == 2 and len(rows(loader(max_batches=99))) == 7
    few = loader(max_sequences=6)
    drawn = sorted(sum(rows(few), ()))
    assert len(drawn) == 6 and drawn == sorted(sum(rows(few), ()))
    assert drawn != sorted(sum(rows(loader(max_sequences=6, seed=6)), ()))
