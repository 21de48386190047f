"""`prepare` against tokenising one text at a time, on the same rows with the same number of processes, one after the other.

    python tests/benchmarks/prepare.py --raw DIR --tokenizer DIR --scratch DIR [--processes 2] [--rounds 3]
    python tests/benchmarks/prepare.py --memory --tokenizer DIR --scratch DIR

Two peers, both a call of the tokenizer a string and a parquet file a source at the end: `each` tokenises every string of every
row, `published` the distinct documents of a source (F2LLM `tokenize_data_qwen.py`). Texts are those of the rows: query,
positive and negatives, repeats included. Peers read the same files and start from a bare interpreter, as `prepare` does.
`--memory` measures the peak memory of `prepare`, all its processes, on made rows at several sizes.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from multiprocessing import Pool

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

MAX_LENGTH = 1024
SIZES = (50_000, 200_000)  # 500,000 and 2,000,000 texts: one and four full buckets of records, the largest thing held
NEGATIVES = 8
SAMPLE_SECONDS = 0.2


def start_peer(folder: str) -> None:
    global tokenizer
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)


def tokenise(texts: list[str]) -> list[np.ndarray]:
    ends = [tokenizer.eos_token_id]
    return [
        np.array(tokenizer(text, max_length=MAX_LENGTH - 1, truncation=True, add_special_tokens=False).input_ids + ends) for text in texts
    ]


def run_peer(raw: str, folder: str, out: str, processes: int, every: bool) -> None:
    """The published script with its pool kept open (it makes one a call); tokenises `every` string or distinct documents."""
    pathlib.Path(out).mkdir(parents=True)
    with Pool(processes, start_peer, (folder,)) as pool:

        def encode(texts: list[str]) -> list[np.ndarray]:
            return [ids for part in pool.map(tokenise, [texts[i::processes] for i in range(processes)]) for ids in part]

        for file in sorted(pathlib.Path(raw).glob("*.parquet")):
            frame = pd.read_parquet(file)
            columns = [name for name in frame if name == "passage" or name.startswith("negative")]
            done = {"query": encode(frame["query"].tolist())}
            if every:
                done |= {name: encode(frame[name].tolist()) for name in columns}
            else:
                texts = list({text for name in columns for text in frame[name]})
                ordered = [text for i in range(processes) for text in texts[i::processes]]
                ids = dict(zip(ordered, encode(texts), strict=True))
                done |= {name: [ids[text] for text in frame[name]] for name in columns}
            pd.DataFrame({f"{name}_input_ids": value for name, value in done.items()}).to_parquet(f"{out}/{file.name}", index=False)


def measure(command: list[str], sample: bool = False) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and, if asked to `sample`, peak anonymous bytes of a command, its children included."""
    before = psutil.Process().cpu_times()
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = [0]
    if sample:
        threading.Thread(target=watch, args=(process, peak), daemon=True).start()
    error = process.stderr.read()
    if process.wait():
        sys.exit(error)
    after = psutil.Process().cpu_times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - begun, cpu, peak[0]


def watch(process: subprocess.Popen, peak: list[int]) -> None:
    """Keeps the largest sum of the processes' anonymous memory; pages of mapped files are the kernel's to drop."""
    while process.poll() is None:
        total = 0
        try:
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                rollup = pathlib.Path(f"/proc/{one.pid}/smaps_rollup").read_text()
                total += 1024 * int(rollup.split("Anonymous:")[1].split()[0])
        except (psutil.Error, OSError, IndexError):
            continue
        peak[0] = max(peak[0], total)
        time.sleep(SAMPLE_SECONDS)


def ours(raw: str, tokenizer: str, out: pathlib.Path, processes: int) -> list[str]:
    command = [sys.executable, "-m", "f2llm_jax.prepare", "--raw", raw, "--tokenizer", tokenizer, "--out", str(out)]
    return [*command, "--workers", str(processes), "--max-length", str(MAX_LENGTH)]


def compare(raw: str, tokenizer: str, scratch: pathlib.Path, processes: int, rounds: int) -> None:
    files = [pq.read_schema(file).names for file in pathlib.Path(raw).glob("*.parquet")]
    rows = [pq.read_metadata(file).num_rows for file in pathlib.Path(raw).glob("*.parquet")]
    texts = sum(count * sum(name != "lang" for name in names) for names, count in zip(files, rows, strict=True))
    peers = {
        name: [sys.executable, __file__, "--peer", name, "--raw", raw, "--tokenizer", tokenizer, "--processes", str(processes)]
        for name in ("published", "each")
    }
    for number in range(rounds):
        out = scratch / "prepared"
        found = {"prepare": measure(ours(raw, tokenizer, out, processes))}
        shutil.rmtree(out)
        for name, command in peers.items():
            found[name] = measure([*command, "--scratch", str(scratch / name)])
            shutil.rmtree(scratch / name)
            result = {"round": number, "texts": texts, "processes": processes, "peer": name}
            for who in ("prepare", name):
                wall, cpu, _ = found[who]
                result |= {f"{who}_texts_per_s": round(texts / wall), f"{who}_cpu_s": round(cpu, 1)}
            result["times_as_fast"] = round(found[name][0] / found["prepare"][0], 2)
            result["times_less_cpu"] = round(found[name][1] / found["prepare"][1], 2)
            print(json.dumps(result), flush=True)


def memory(tokenizer: str, scratch: pathlib.Path) -> None:
    """Rows of distinct random words: no document twice, so nothing is saved by storing documents once."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(chr(97 + letter) for letter in rng.integers(0, 26, length)) for length in rng.integers(2, 9, 5_000)])
    for size in SIZES:
        raw = scratch / f"rows_{size}"
        raw.mkdir(parents=True)
        names = ["query", "passage", *(f"negative_{i}" for i in range(1, NEGATIVES + 1))]
        schema = pa.schema([(name, pa.string()) for name in names])
        with pq.ParquetWriter(raw / "made.parquet", schema) as writer:
            for _ in range(size // 10_000):
                columns = [[" ".join(row) for row in words[rng.integers(0, len(words), (10_000, 20))]] for _ in names]
                writer.write_table(pa.table(columns, schema=schema))
        wall, cpu, peak = measure([*ours(str(raw), tokenizer, scratch / "prepared", 1), "--cap", "0"], sample=True)
        texts = size * len(names)
        print(
            json.dumps({"rows": size, "peak_mib": round(peak / 2**20), "texts_per_s": round(texts / wall), "cpu_s": round(cpu, 1)}),
            flush=True,
        )
        shutil.rmtree(scratch / "prepared")
        shutil.rmtree(raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", help="folder of F2LLM parquet files")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--scratch", required=True, type=pathlib.Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peer", choices=("published", "each"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.peer:
        run_peer(flags.raw, flags.tokenizer, str(flags.scratch), flags.processes, flags.peer == "each")
    elif flags.memory:
        memory(flags.tokenizer, flags.scratch)
    else:
        compare(flags.raw, flags.tokenizer, flags.scratch, flags.processes, flags.rounds)


if __name__ == "__main__":
    main()
