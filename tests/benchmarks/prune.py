"""A random 0.6B pruned to the three published sizes: exact counts, readers that load them, time and peak memory.

    python tests/benchmarks/prune.py --scratch /some/disk

Each pruning is the user's own command in a process of its own; memory as in `release.py`. The tokenizer and the calibration data
are tiny. Needs about 4 GB of disk; the folder is removed at the end.
"""

import argparse
import json
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import sentence_transformers
import small_data
import transformers
from release import measured, write_random_folder

PUBLISHED = {"330m": 334_349_184, "160m": 159_185_024, "80m": 80_084_288}  # mteb's `codefuse_models.py`
ROWS = 32


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=pathlib.Path, required=True, help="folder to make and to remove")
    flags = parser.parse_args()
    flags.scratch.mkdir(parents=True)
    try:
        model, data = flags.scratch / "0.6b", small_data.write(flags.scratch / "small").folder
        write_random_folder(model, "0.6b", flags.scratch)
        for size, parameters in PUBLISHED.items():
            out = flags.scratch / size
            arguments = ("--model", model, "--target", size, "--data", data, "--calibration-rows", ROWS, "--out", out)
            seconds, anonymous, resident = measured("f2llm_jax.prune", *arguments, "--dtype", "bfloat16")
            loaded = transformers.AutoModel.from_pretrained(out / "model")
            width = sentence_transformers.SentenceTransformer(str(out / "model"), device="cpu").encode(["a text"]).shape[1]
            line = {"size": size, "parameters": loaded.num_parameters(), "published": parameters, "width": width}
            line |= {"seconds": round(seconds, 1), "anonymous GiB": round(anonymous, 2), "resident GiB": round(resident, 2)}
            print(json.dumps(line), flush=True)
            assert line["parameters"] == parameters
            shutil.rmtree(out)
    finally:
        shutil.rmtree(flags.scratch)


if __name__ == "__main__":
    main()
