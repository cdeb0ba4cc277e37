"""Which prompts a pair is drawn with."""

import numpy as np
import pytest

from dnd_jax.base.sequences import Sequences
from dnd_jax.config.load import load_file
from dnd_jax.config.validate import freeze
from dnd_jax.core.errors import InputError
from dnd_jax.generator.pairs import PairedDataset, Pairs

N = 8
DATASET = PairedDataset("one", {"condition": np.zeros((40, 2, 3))}, np.zeros((5, 4, 2, 2)))


def different(few_prompts: float, steps: int = 40) -> list[int]:
    """How many different prompts each pair of so many steps has."""
    pairs = Pairs([DATASET, DATASET], 16, N, 0, few_prompts=few_prompts)
    return [len(set(prompts)) for step in range(steps) for *_, prompts in pairs.draw(step)]


def test_all_prompts_of_a_pair_are_different_ones():
    assert set(different(0.0)) == {N}


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_pairs_has_fewer(share):
    counts = different(share)
    fewer = np.mean([count < N for count in counts])
    assert fewer == pytest.approx(share, abs=0.06)
    assert set(counts) == set(range(2, N if share == 1 else N + 1))


def test_the_paper_s_draws_do_not_depend_on_it():
    with_it, without = (Pairs([DATASET], 16, N, 0, few_prompts=share) for share in (0.5, 0.0))
    again = Pairs([DATASET], 16, N, 0)
    for ours, theirs in zip(without.draw(3), again.draw(3), strict=True):
        np.testing.assert_array_equal(ours[2], theirs[2])
    assert any(len(set(prompts)) < N for *_, prompts in with_it.draw(3))
    assert with_it.draw(3) is with_it.draw(3)


@pytest.mark.parametrize(
    "share, prompts, why",
    [(-0.1, N, "must lie in 0 to 1"), (1.5, N, "must lie in 0 to 1"), (0.5, 2, "must be 0 with")],
)
def test_impossible_shares_are_refused(share, prompts, why):
    raw = load_file("tests/tiny.py")
    raw.train.few_prompts, raw.condition.num_prompts = share, prompts
    with pytest.raises(InputError, match=f"train.few_prompts = {share} {why}"):
        freeze(raw)


def asked(rows: int, of: np.ndarray | None = None) -> PairedDataset:
    """A dataset of `rows` questions, each a token of its own, of 40 prompts."""
    ids = np.tile(np.arange(rows, dtype=np.int32)[:, None], (1, 6))
    at = np.full(rows, 4, np.int32)
    return PairedDataset("one", DATASET.prompts, questions=Sequences(ids, at, at + 2, of=of))


def asking(dataset: PairedDataset, rows: int, batch: int = 16, **more) -> Pairs:
    """Pairs that are asked so many questions each."""
    more = {"taught_at": lambda step: ("answers",)} | more
    return Pairs([dataset], batch, N, 0, rows=rows, **more)


@pytest.mark.parametrize("few_prompts", [0.0, 1.0])
def test_what_is_asked_is_none_of_the_prompts(few_prompts):
    pairs = asking(asked(40), 5, few_prompts=few_prompts)
    for step in range(20):
        rows = pairs.rows_at(step)["rows"]
        assert rows["token"].shape[:2] == (16, 5) and (rows["labels"] >= 0).sum() == 16 * 5 * 2
        for (*_, prompts), numbers in zip(pairs.draw(step), questions(rows), strict=True):
            assert len(set(numbers)) == 5 and not set(numbers) & set(prompts.tolist())
    assert not np.array_equal(rows["ids"], pairs.rows_at(0)["rows"]["ids"])


def questions(rows: dict[str, np.ndarray]) -> list[list[int]]:
    """The numbers of the questions that each pair is asked: their first tokens."""
    pairs = zip(rows["ids"], rows["token"], strict=True)
    return [ids[token[:, 0]].tolist() for ids, token in pairs]


def test_rows_have_one_of_few_lengths():
    """Each is another program: five questions of 17 to 24 tokens have six, with little padding."""
    lengths = []
    for tokens in range(17, 25):
        ids = np.tile(np.arange(40, dtype=np.int32)[:, None], (1, tokens))
        at = np.full(40, tokens - 2, np.int32)
        dataset = PairedDataset("one", DATASET.prompts, questions=Sequences(ids, at, at + 2))
        rows = asking(dataset, 5).rows_at(0)["rows"]
        lengths.append(tuple(rows[key].shape[1:] for key in ("ids", "token", "labels")))
        assert 5 * (tokens - 1) <= rows["ids"].shape[1] < 5 * (tokens - 1) + 8
    assert len(set(lengths)) == 6
    assert {token for _, token, _ in lengths} == {(5, 16), (5, 24)}


def test_steps_on_weights_ask_nothing():
    pairs = asking(asked(40), 5, taught_at=lambda step: ("weights", "answers")[step : step + 1])
    assert not pairs.rows_at(0) and pairs.rows_at(1).keys() == {"rows"}


@pytest.mark.parametrize("of_loras", [{}, {"distill": "teacher"}], ids=["shown", "checkpoints"])
def test_the_same_questions_are_shown_behind_answered_examples(of_loras):
    """Behind 10 tokens of others each, unless a checkpoint is the teacher."""
    plain = asked(40)
    ids = np.pad(plain.questions.ids + 100, ((0, 0), (10, 0)))
    shown = Sequences(ids, plain.questions.start + 10, plain.questions.end + 10)
    dataset = PairedDataset("one", plain.prompts, questions=plain.questions, shown=shown)
    pairs = asking(dataset, 5, taught_at=lambda step: ("distill",), of_loras=of_loras)
    found = pairs.rows_at(3)
    np.testing.assert_array_equal(found["rows"]["ids"], asking(plain, 5).rows_at(3)["rows"]["ids"])
    assert ("shown" in found) == (not of_loras)
    if not of_loras:
        wanted = found["rows"]["labels"]
        wanted = np.where(wanted < 0, wanted, wanted + 100)
        np.testing.assert_array_equal(found["shown"]["labels"], wanted)
        assert found["shown"]["prefix"].shape == (16, 10)


def test_examples_that_were_left_out_keep_the_others_numbers():
    """Rows 0 to 9 are examples 30 to 39."""
    pairs = asking(asked(10, np.arange(30, 40)), 3)
    of_each = questions(pairs.rows_at(0)["rows"])
    for (*_, prompts), numbers in zip(pairs.draw(0), of_each, strict=True):
        assert not {number + 30 for number in numbers} & set(prompts.tolist())


def test_few_other_questions_are_asked_twice_and_without_any_its_own():
    of = np.arange(2)
    assert asking(asked(2, of), 5).rows_at(0)["rows"]["token"].shape[1] == 5
    small = PairedDataset("one", {"condition": np.zeros((N, 2, 3))}, questions=asked(N).questions)
    assert asking(small, 3, batch=4).rows_at(0)["rows"]["token"].shape[:2] == (4, 3)


def test_pairs_of_weights_are_the_same_where_questions_come_with_them():
    with_rows = PairedDataset("one", DATASET.prompts, DATASET.targets, asked(40).questions)
    ours, theirs = Pairs([with_rows], 16, N, 0, rows=5), Pairs([DATASET], 16, N, 0)
    for a, b in zip(ours.draw(7), theirs.draw(7), strict=True):
        assert a[:2] == b[:2]
        np.testing.assert_array_equal(a[2], b[2])


def test_a_batch_is_gathered_as_it_was_drawn_in_new_memory_or_again_in_the_same():
    rng = np.random.default_rng(1)
    datasets = [
        PairedDataset(
            name,
            {"condition": rng.normal(size=(40, 2, 3)).astype(np.float32)},
            rng.normal(size=(5, 4, 2, 2)).astype(np.float32),
        )
        for name in "ab"
    ]
    pairs, memory = Pairs(datasets, 16, N, 0), set()
    for step in range(3):
        drawn = pairs.draw(step)
        conditions = [datasets[d].prompts["condition"][np.sort(p)] for d, _, p in drawn]
        targets = [datasets[d].targets[checkpoint] for d, checkpoint, _ in drawn]
        new, same = pairs.batch_at(step), pairs.batch_at(step, memory=0)
        part = pairs.batch_at(step, 4, 8, memory=0)
        for batch, at in ((new, slice(None)), (same, slice(None)), (part, slice(4, 8))):
            np.testing.assert_array_equal(batch["condition"], conditions[at])
            np.testing.assert_array_equal(batch["target"], targets[at])
        memory.add(id(same["condition"]))
        other = pairs.batch_at(step, memory=1)
        for batch in (new, other):
            assert not np.shares_memory(batch["condition"], same["condition"])
    assert len(memory) == 1
