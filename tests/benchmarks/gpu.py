"""What needs an NVIDIA GPU: the numbers again there, and the step's speed beside the padded PyTorch recipe's on the same card.

    python tests/benchmarks/gpu.py [--sizes 0.6b,1.7b] [--rounds 3] [--torch PYTHON]

needs `pip install 'f2llm_jax[test]' 'jax[cuda13]'` and a PyTorch that sees the card: --torch names the Python that has it, where the two
cannot share an environment. Numbers: the parity kit in fp32, and the cuDNN kernel against plain matrix products, values and gradients.
Speed: step.py with each kernel and torch_step.py in turn, bfloat16, all of step_lengths.json; medians of the rounds as a table. MFU
counts what the model needs for the real tokens, for all the same. Exit code 1 if a number is off, and then no speed is measured.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from f2llm_jax.model.flops import PEAK_FLOPS  # noqa: E402

ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cuda"}
EXACT = ENVIRONMENT | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # a GPU would round fp32 factors to 10 bits
CHECKS = {
    "the parity kit in fp32": ("tests/parity.py", "tests/fixtures/parity"),
    "attention by cuDNN": ("-m", "pytest", "-q", "-m", "gpu", "tests/test_attention.py"),
}
OURS = ("--dtype", "bfloat16", "--remat", "dots", "--row-tokens", "1024", "--microbatch-rows", "16")


def card() -> str:
    """JAX's name of the GPU, from a process of its own: a card that is asked here would keep its memory."""
    code = "import jax; print(jax.devices()[0].device_kind)"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        sys.exit("JAX finds no NVIDIA GPU; on a machine that has one, install its plugin: pip install 'jax[cuda13]'")
    return done.stdout.strip()


def measured(python: str, script: str, *flags: str) -> dict:
    done = subprocess.run([python, HERE / script, *flags], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.6b,1.7b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch", default=sys.executable, help="the Python whose PyTorch sees the card")
    flags = parser.parse_args()
    name = card()
    for what, command in CHECKS.items():
        if subprocess.run([sys.executable, *command], cwd=ROOT, env=EXACT).returncode:
            print(f"on {name} {what} is off", file=sys.stderr)
            return 1
    peak = PEAK_FLOPS.get(name)
    print(f"{name}\n\n| size | trainer | useful tokens/s | token efficiency | MFU |\n|---|---|---|---|---|")
    for size in flags.sizes.split(","):
        runs = {
            "f2llm_jax, cudnn": (sys.executable, "step.py", "--size", size, "--attention", "cudnn", *OURS),
            "f2llm_jax, xla": (sys.executable, "step.py", "--size", size, "--attention", "xla", *OURS),
            "padded PyTorch": (flags.torch, "torch_step.py", "--size", size, "--dtype", "bfloat16", "--checkpoint"),
        }
        rounds = [{trainer: measured(*command) for trainer, command in runs.items()} for _ in range(flags.rounds)]
        needed = rounds[0]["f2llm_jax, xla"]  # FLOPs a token are the batches', whoever computes them
        for trainer in runs:
            speed = statistics.median(one[trainer]["useful_tokens_per_s"] for one in rounds)
            mfu = f"{speed * needed['flops_per_s'] / needed['useful_tokens_per_s'] / peak:.1%}" if peak else "-"
            print(f"| {size} | {trainer} | {speed:,.0f} | {rounds[0][trainer]['token_efficiency']:.2f} | {mfu} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
