"""Sequences of a text, and the order of their batches."""

import numpy as np
import pytest
import torch

from minigpt_pl.data import batches as batches_module
from minigpt_pl.data.batches import BatchLoader, Sequences
from minigpt_pl.data.corpus import Ids, Shard, ShardSize

END = 99
DOCUMENTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34, 35, 36], [40, 41]]
TOKENS = [id_ for document in DOCUMENTS for id_ in [*document, END]]


def make_ids(*shards: tuple[np.ndarray, np.ndarray]) -> Ids:
    """A split with these shards: (tokens, offsets)."""
    sizes = [ShardSize(len(t), len(o) - 1, int((np.diff(o) == 2).sum())) for t, o in shards]
    return Ids(sizes, lambda number: Shard(*shards[number]))


IDS = make_ids((np.array(TOKENS, dtype=np.uint16), np.cumsum([0] + [len(d) + 1 for d in DOCUMENTS])))


def sequences(cut="truncate", end_token=True, count_padding=False, length=4):
    return Sequences(IDS, length, cut, end_token, count_padding)


def all_rows(made: Sequences) -> list[list[int]]:
    return made[np.arange(len(made))].tolist()


def target_counts(made: Sequences) -> list[int]:
    return [made.count_targets(np.array([row])) for row in range(len(made))]


def test_truncate_takes_the_start_of_each_document():
    assert all_rows(sequences()) == [
        [10, 11, 12, 99, 0], [20, 99, 0, 0, 0], [30, 31, 32, 33, 34], [40, 41, 99, 0, 0],
    ]  # fmt: skip
    assert target_counts(sequences()) == [3, 1, 4, 2]


def test_the_notebooks_sequences_have_no_end_and_count_padding():
    made = sequences(end_token=False, count_padding=True)
    assert all_rows(made) == [[10, 11, 12, 0, 0], [20, 0, 0, 0, 0], [30, 31, 32, 33, 34], [40, 41, 0, 0, 0]]
    assert target_counts(made) == [4, 4, 4, 4]


def test_a_document_of_one_word_without_end_has_no_target():
    assert len(sequences(end_token=False)) == 3


def test_pack_loses_no_token():
    made = sequences(cut="pack")
    targets = [t for row, n in zip(all_rows(made), target_counts(made), strict=True) for t in row[1 : n + 1]]
    assert targets == TOKENS[1:], "each token but the first is a target once"
    assert all_rows(made)[0] == [10, 11, 12, 99, 20]
    assert len(sequences(cut="pack", count_padding=True)) == len(made) == 4, "a sequence without a target"


def test_ids_above_the_signed_range():
    for dtype in (np.uint16, np.uint32):
        largest = np.iinfo(dtype).max
        ids = make_ids((np.array([5, largest, 7], dtype=dtype), np.array([0, 3])))
        made = Sequences(ids, 2, "truncate", True, False)
        assert all_rows(made) == [[5, largest, 7]]


def loader(**changes) -> BatchLoader:
    options = {"batch_size": 3, "seed": 5} | changes
    ids = make_ids((np.arange(1, 101, dtype=np.uint16), np.arange(0, 101, 5)))
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


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_divide_each_batch(world_size):
    """Also the last one, which has 2 sequences."""
    shares = [rows(loader(rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len(shares[0]) == 7
    for parts, whole in zip(zip(*shares, strict=True), rows(loader()), strict=True):
        assert all(part == whole[rank::world_size] for rank, part in enumerate(parts))


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


def whole_order(made: BatchLoader) -> list[int]:
    return sum(map(list, rows(made)), [])


def test_a_small_text_keeps_the_order_of_older_versions():
    first_tokens = np.arange(1, 101, 5)
    for options, numbers in (
        ({}, np.arange(20)),
        ({"max_sequences": 6}, np.sort(np.random.default_rng(5).permutation(20)[:6])),
    ):
        made = loader(**options)
        for epoch in range(2):
            expected = np.random.default_rng([5, epoch]).permutation(numbers)
            assert whole_order(made) == first_tokens[expected].tolist()


class TestLargeText:
    """Five shards of 4 to 8 sequences, and windows of about 10."""

    @pytest.fixture(autouse=True)
    def small_windows(self, monkeypatch):
        monkeypatch.setattr(batches_module, "WINDOW", 10)

    def loader(self, cut="truncate", **options) -> BatchLoader:
        shards, token = [], 1
        for documents in (4, 5, 6, 7, 8):
            tokens = np.arange(token, token + 5 * documents, dtype=np.uint16)
            shards.append((tokens, np.arange(0, 5 * documents + 1, 5)))
            token += 5 * documents
        return BatchLoader(Sequences(make_ids(*shards), 4, cut, True, False), **{"batch_size": 4, "seed": 5} | options)

    def test_an_epoch_has_every_sequence_once_in_another_order(self):
        made = self.loader()
        epochs = [whole_order(made) for _ in range(3)]
        assert epochs[0] != epochs[1] != epochs[2]
        assert all(sorted(epoch) == list(range(1, 151, 5)) for epoch in epochs)
        assert whole_order(self.loader(seed=None)) == list(range(1, 151, 5))

    def test_a_window_has_few_shards(self, monkeypatch):
        sizes = []
        window = batches_module.Order._window
        monkeypatch.setattr(batches_module.Order, "_window", lambda *a: sizes.append(len(rows := window(*a))) or rows)
        order = whole_order(self.loader())
        assert len(sizes) > 2 and max(sizes) <= 10 + 8 and sum(sizes) == 30, "a window is permuted once"
        shards = [np.searchsorted([0, 20, 45, 75, 110], token, side="right") for token in order]
        assert len(set(shards[: sizes[0]])) < 5 and sorted(set(shards)) != list(dict.fromkeys(shards))

    @pytest.mark.parametrize("accumulate", [1, 3])
    @pytest.mark.parametrize("done", range(8))
    def test_resume_is_exact_with_any_number_of_processes(self, done, accumulate):
        whole = list(self.loader(accumulate=accumulate))
        parts = [self.loader(accumulate=accumulate, rank=rank, world_size=2) for rank in range(2)]
        for part in parts:
            part.restore({"epoch": 0, "batches_done": done})
        for number, pair in enumerate(zip(*parts, strict=True), done):
            assert sorted(sum(rows(pair), ())) == sorted(rows(whole[number : number + 1])[0])
            for batch in pair:
                assert (batch.num_targets, batch.step_targets) == (
                    whole[number].num_targets,
                    whole[number].step_targets,
                )
        assert number == 7

    def test_a_drawn_part_is_spread_over_the_shards(self):
        made = self.loader(max_sequences=12)
        first, second = whole_order(made), whole_order(made)
        assert len(first) == 12 and sorted(first) == sorted(second) and first != second
        assert set(np.searchsorted([0, 20, 45, 75, 110], first, side="right")) == {1, 2, 3, 4, 5}
        assert made.count_targets() == 12 * 4 and self.loader().count_targets() == 30 * 4

    def test_pack_loses_only_the_first_token_of_a_shard(self):
        made = self.loader(cut="pack").sequences
        counts = target_counts(made)
        targets = [t for row, n in zip(all_rows(made), counts, strict=True) for t in row[1 : n + 1]]
        assert sorted({*range(1, 151)} - {*targets}) == [1, 21, 46, 76, 111] and len(set(targets)) == len(targets)

    def test_tokens_on_a_device(self):
        for cut in ("truncate", "pack"):
            made = self.loader(cut=cut).sequences
            assert all_rows(made.to(torch.device("cpu"))) == all_rows(made)

    def test_documents_of_one_word_are_left_out_of_each_shard(self):
        shard = np.array([7, 99, 8, 9, 99, 5, 99], dtype=np.uint16), np.array([0, 2, 5, 7])
        made = Sequences(make_ids(shard, shard), 2, "truncate", False, False)
        assert all_rows(made) == [[8, 9, 0]] * 2
