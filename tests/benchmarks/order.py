"""The published order of an epoch beside a uniform one, at the full size of stage 2: figures, and the picture of docs/recipe.md.

python tests/benchmarks/order.py [--picture docs/order.png]
"""

import argparse
import json
import pathlib
import sys
import time
import tracemalloc

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from published_rules import published_order

from f2llm_jax.data.order import EpochOrder, Sampling
from f2llm_jax.preparation.catalogue import CAP, load_catalogue

BATCH, TRAINED, SMALL, PARTS, EPOCHS = 512, 0.99, 20, 50, 10


def composite(stage: int) -> dict[str, int]:
    """Batches of each file; the rows of a source, known as a sum, are spread evenly over its files."""
    found = {}
    for source in load_catalogue("f2llm_v2").stage(stage).sources:
        for unit in source.units:
            rows = source.rows * len(unit.files) / len(source.files)
            for name, files in unit.batch_groups().items():
                kept = min(rows, CAP if stage == 2 else rows) * len(files) / len(unit.files)
                found[name] = max(1, -(-int(TRAINED * kept) // BATCH))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", default="docs/order.png")
    flags = parser.parse_args()
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots()
    for stage in (1, 2):
        batches = composite(stage)
        small = np.array([count <= SMALL for count in batches.values()])
        total, numbers = sum(batches.values()), {name: number for number, name in enumerate(batches)}
        print(json.dumps({"stage": stage, "files": len(batches), "steps": total, "small": small @ list(batches.values()) / total}))
        rules = {
            order: EpochOrder(batches, {name: name for name in batches}, 0, Sampling(order=order)) for order in ("uniform", "published")
        }
        draws = {name: lambda epoch, rule=rule: rule.order(epoch)[0] for name, rule in rules.items()}
        draws["published loop"] = lambda epoch, batches=batches, numbers=numbers: np.array(
            [numbers[n] for n in published_order(batches, epoch)]
        )
        for name, draw in draws.items():
            orders = [draw(epoch) for epoch in range(EPOCHS)]
            begun = time.perf_counter()
            draw(0)
            seconds = time.perf_counter() - begun
            tracemalloc.start()
            draw(0)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            shares = np.mean([[small[part].mean() for part in np.array_split(order, PARTS)] for order in orders], axis=0)
            last = np.mean([len(set(order[-300:].tolist())) for order in orders])
            print(
                json.dumps(
                    {"order": name, "small_in_last_2%": shares[-1], "files_in_last_300": last, "ms": 1e3 * seconds, "MiB": peak / 2**20}
                )
            )
            if stage == 2:
                style = {"uniform": "-", "published": "-", "published loop": ":"}[name]
                axes.plot(100 * (np.arange(PARTS) + 0.5) / PARTS, 100 * shares, style, label=name, color="black" if ":" in style else None)
    axes.set(xlabel="% of the epoch", ylabel="% of steps", ylim=(0, None), title=f"Steps on files of at most {SMALL} batches, stage 2")
    axes.legend()
    figure.savefig(flags.picture, dpi=100)


if __name__ == "__main__":
    main()
