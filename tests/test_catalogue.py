"""The shipped catalogue against the numbers of the paper, and what a malformed one says."""

import json

import pytest

from f2llm_jax.preparation import catalogue


def test_the_shipped_catalogue_has_the_published_sizes():
    composite = catalogue.load_catalogue("f2llm_v2")
    totals = composite.totals()
    assert {name: totals[name] for name in ("sources", "units", "files", "rows", "stage1_rows")} == {
        "sources": 157,
        "units": 395,
        "files": 500,
        "rows": 60_147_938,
        "stage1_rows": 26_693_280,
    }
    # Measured over the released files: 17,733,380. The catalogue knows rows a source, not a unit, so it gives bounds.
    assert totals["stage2_rows_at_least"] <= 17_733_380 <= totals["stage2_rows_at_most"]
    assert sum(source.stage1 for source in composite.sources) == 7


def test_the_part_that_is_ml_embed_has_its_sizes():
    """Data tables of arXiv 2605.15081: 121 sources; 27M rows in stage 1, and 8.3M in stage 2 with 100,000 a source at most."""
    part = catalogue.load_catalogue("ml_embed")
    totals = part.totals()
    assert (totals["sources"], totals["rows"], totals["stage1_rows"]) == (121, 50_513_802, 26_693_280)
    assert sum(min(source.rows, 100_000) for source in part.sources) == 8_317_566
    assert part.released


def test_the_batch_comes_from_a_file_and_the_cap_goes_to_the_unit():
    composite = catalogue.load_catalogue("f2llm_v2")
    units = {unit.name: unit for source in composite.sources for unit in source.units}
    assert {len(files) for unit in units.values() for files in unit.batch_groups().values()} == {1}
    assert [len(units[name].batch_groups()) for name in ("unpc", "paracrawl", "clirmatrix", "ocgi", "squad")] == [30, 52, 18, 2, 1]
    assert sum(len(unit.batch_groups()) for unit in units.values()) == 502  # of 500 files, mela.parquet for three
    mixed = sum(source.rows for source in composite.stage(1).sources if any(len(unit.files) > 1 for unit in source.units))
    assert mixed / 26_693_280 > 0.5  # rows that had other files in their batches when the unit was what decided


def test_a_unit_can_be_one_batch_group(tmp_path):
    content = {"sources": [GOOD | {"units": [{"unit": "a", "batch": "unit", "files": ["x.parquet", "y.parquet"]}]}]}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    (source,) = catalogue.load_catalogue(tmp_path / "mine.json").sources
    ((name, files),) = source.units[0].batch_groups().items()
    assert (name, [file.path for file in files]) == ("a", ["x.parquet", "y.parquet"])


def test_one_file_holds_three_sources():
    sources = {source.name: source for source in catalogue.load_catalogue("f2llm_v2").sources}
    ranges = [sources[name].units[0].files[0] for name in ("mela", "scala", "dala")]
    assert {part.path for part in ranges} == {"mela.parquet"}
    assert [part.start for part in ranges] == [0, *(part.stop for part in ranges[:-1])]
    assert [part.stop - part.start for part in ranges] == [sources[name].rows for name in ("mela", "scala", "dala")]
    assert sources["unpc"].symmetric and sources["stsbenchmark"].symmetric and not sources["squad"].symmetric


GOOD = {"source": "a", "task": "retrieval", "units": [{"unit": "a", "files": ["a.parquet"]}]}
MALFORMED = {
    "no sources": ({"sources": []}, "holds no sources"),
    "no name": ({"sources": [{"task": "retrieval"}]}, "sources[0] has no 'source'"),
    "kind": ({"sources": [GOOD | {"task": "guessing"}]}, "unknown task 'guessing'; choose one of retrieval"),
    "rows": ({"sources": [GOOD | {"rows": "many"}]}, "has rows 'many'"),
    "no units": ({"sources": [GOOD | {"units": []}]}, "source 'a' has no units"),
    "unit": ({"sources": [GOOD | {"units": [{"unit": "a/b", "files": ["a.parquet"]}]}]}, "malformed unit"),
    "file": ({"sources": [GOOD | {"units": [{"unit": "a", "files": [{"path": "a", "row_start": 5, "row_stop": 5}]}]}]}, "is not a file"),
    "twice": ({"sources": [GOOD, GOOD]}, "unit 'a' exists already"),
    "batch": ({"sources": [GOOD | {"units": [{"unit": "a", "batch": "all", "files": ["a.parquet"]}]}]}, "unknown batch 'all'"),
    "two groups": (
        {"sources": [GOOD | {"units": [{"unit": "b", "files": ["a.parquet", "b.parquet"]}, {"unit": "a", "files": ["e.parquet"]}]}]},
        "batches named 'a' exist already",
    ),
    "one stem": ({"sources": [GOOD | {"units": [{"unit": "b", "files": ["c/a.parquet", "d/a.parquet"]}]}]}, "two files of one name"),
    "part of nothing": ({"of": "f2llm_v3", "sources": ["squad"]}, "is not shipped; choose one of: f2llm_v2, ml_embed"),
    "part without sources": ({"of": "f2llm_v2", "sources": []}, "holds no sources"),
    "unknown part": ({"of": "f2llm_v2", "sources": ["squat"]}, "names 'squat', which is no source of f2llm_v2"),
    "overlap": ({"sources": [GOOD, GOOD | {"units": [{"unit": "b", "files": ["a.parquet"]}]}]}, "belong to unit 'a' as well"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_catalogue_says_what_to_do(case, tmp_path):
    content, expected = MALFORMED[case]
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(catalogue.CatalogueError) as caught:
        catalogue.load_catalogue(tmp_path / "mine.json")
    assert expected in str(caught.value) and "mine.json" in str(caught.value)


def test_an_unknown_catalogue_names_the_known_ones():
    with pytest.raises(catalogue.CatalogueError, match="one of: f2llm_v2, ml_embed"):
        catalogue.load_catalogue("nothing")
