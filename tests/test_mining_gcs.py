"""Mining from and to an object store."""

import json

import gcs
import pytest
from etils import epath
from small_mining import export_model, write_pairs

from f2llm_jax import mine
from f2llm_jax.storage.folders import MADE

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore::ResourceWarning")


@pytest.mark.slow
def test_a_bucket_gets_the_files_of_a_disk(tmp_path):
    export_model(tmp_path)
    write_pairs(tmp_path / "pairs.parquet")
    rules = ["--negatives", "5", "--max-score", "none", "--max-relative", "none"]
    with gcs.emulator() as bucket:
        remote = epath.Path(bucket)
        (remote / "in" / "pairs.parquet").write_bytes((tmp_path / "pairs.parquet").read_bytes())
        for folder in (tmp_path, remote):
            source = folder / "in" / "pairs.parquet" if folder is remote else folder / "pairs.parquet"
            flags = ["--model", str(tmp_path / "model"), "--queries", str(source), "--out", str(folder / "out")]
            assert mine.main([*flags, "--cache", str(folder / "cache"), *rules]) == 0
        written = sorted(path.name for path in (remote / "cache").glob("*/*"))
        assert mine.main([*flags, "--cache", str(remote / "cache"), *rules]) == 0  # it is there
        assert sorted(path.name for path in (remote / "cache").glob("*/*")) == written
        assert written == sorted(path.name for path in (tmp_path / "cache").glob("*/*"))
        for path in (tmp_path / "out").iterdir():
            if path.name != MADE:  # the marker of a folder in a bucket has no checksums
                assert (remote / "out" / path.name).read_bytes() == path.read_bytes(), path.name
        listed = [json.loads((folder / "out" / MADE).read_text())["files"] for folder in (tmp_path, remote)]
        assert len({tuple((name, entry["bytes"]) for name, entry in files.items()) for files in listed}) == 1
