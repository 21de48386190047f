"""What the files under `fixtures/formats` hold: the same four rows of pairs, six labels or five texts in every form."""

import pathlib

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "formats"
# Query, positive, negatives, language: with line ends in a cell, and texts that look like numbers.
ROWS = [
    ("who purrs", "the cat", ("the dog", "a mouse"), "en"),
    ("wer bellt", 'der Hund,\n"laut"', ("die Katze", "007"), "de"),
    ("où est-elle", "la maison", ("le chat\u2028noir", "true"), "fr"),
    ("007", "1.0", ("7", "1"), "en"),
]
LABELS = [("one", "007"), ("two", "7"), ("three", "true"), ("four", "1.0"), ("five", "2024-01-02"), ("six", "007")]
TEXTS = ["one", "", "two \u2028 parts", "cr\rhere", "007"]
NAMED_ONLY = ("array.json",)  # forms that a folder is not searched for


def paths(kind):
    """The files and folders of `pairs`, `labels` or `texts`."""
    return sorted(FOLDER.joinpath(kind).iterdir())


def pairs(path):
    """The rows that a form of pairs holds, in its order."""
    if path.name == "beir":  # no negatives, no languages
        return [(query, passage, (), "") for query, passage, _, _ in ROWS]
    if path.name == "late_columns.jsonl":  # the first row has neither
        return [(*ROWS[0][:2], (), ""), *ROWS[1:]]
    return sorted(ROWS, key=lambda row: row[3]) if path.name == "partitioned" else ROWS
