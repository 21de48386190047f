"""No setting of a Hugging Face folder that changes a vector is ignored: the table of `settings_table.py`, against sentence-transformers."""

import pytest
from settings_table import CASES, base, edited, ours, read, theirs, worst_cosine

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
SAME = 0.99999


def test_the_unchanged_folder_gives_the_same_vectors_and_the_prompt_matters():
    vectors = ours(base())
    assert worst_cosine(vectors, theirs(base())) >= SAME
    half = len(vectors) // 2
    assert (vectors[:half] * vectors[half:]).sum(1).max() < 0.999


@pytest.mark.parametrize("case", CASES, ids=[f"{one.file}: {one.setting}"[:60] for one in CASES])
def test_a_setting_is_computed_harmless_or_refused_by_name(case, tmp_path):
    folder = edited(case, tmp_path / "model")
    vectors, refusal = read(folder)
    assert bool(refusal) == (case.verdict == "refused"), refusal
    if refusal:
        assert case.names in refusal
    else:
        assert worst_cosine(vectors, theirs(folder)) >= SAME
