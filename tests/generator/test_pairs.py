"""Which prompts a pair is drawn with."""

import numpy as np
import pytest

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
