"""What needs an NVIDIA GPU: the numbers again there, and the step's speed beside the padded PyTorch recipe's on the same card.

    python tests/benchmarks/gpu.py [--sizes 0.6b,1.7b] [--rounds 3] [--torch PYTHON]

needs JAX for CUDA, Flax, Optax, Orbax, safetensors, tokenizers and pytest, and the pure-Python wheels of jaxtyping, wadler-lindig and
ml_collections: nothing of what prepares and reads datasets (Beam, TFDS, ArrayRecord, Grain). It needs a PyTorch that sees the card as
well: --torch names the Python that has it, with transformers, where the two cannot share an environment.

Numbers: the parity kit in fp32, and the cuDNN kernel against plain matrix products, values and gradients. Speed: step.py with each kernel
and torch_step.py in turn, bfloat16, all of step_lengths.json, ours in chunks of 8 rows of 512; medians of the rounds as a table. MFU
counts what the model needs for the real tokens, for all the same. Exit code 1 if a number is off or a command fails, and then nothing
more is measured.
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from f2llm_jax.model.flops import PEAK_FLOPS  # noqa: E402

ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
EXACT = ENVIRONMENT | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # a GPU would round fp32 factors to 10 bits
CHECKS = {
    "the parity kit in fp32": ("tests/parity.py", "tests/fixtures/parity"),
    "attention by cuDNN": ("-m", "pytest", "-q", "-m", "gpu", "tests/test_attention.py"),
}
OURS = ("--dtype", "bfloat16", "--remat", "full", "--row-tokens", "512", "--chunk-rows", "16")
THEIRS = ("--dtype", "bfloat16", "--checkpoint")


def card() -> str:
    """JAX's name of the GPU, from a process of its own: a card that is asked here would keep its memory."""
    code = "import jax; print(jax.devices()[0].device_kind)"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        sys.exit("JAX finds no NVIDIA GPU; on a machine that has one, install its plugin: pip install 'jax[cuda13]'")
    return done.stdout.strip()


def peer_is_on_the_card(python: str) -> None:
    code = "import sys, torch, transformers; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([python, "-c", code]).returncode:
        sys.exit(f"the PyTorch of {python} sees no GPU; name another Python that has torch with CUDA, and transformers: --torch PYTHON")


def measured(python: str, script: str, *flags: str) -> dict:
    command = [python, str(HERE / script), *flags]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"failed: {shlex.join(command)}\nif the card's memory is too small, take a smaller one of --sizes")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.6b,1.7b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch", default=sys.executable, help="the Python whose PyTorch sees the card")
    parser.add_argument("--torch-attention", default="sdpa", help="flash_attention_2 as published, where flash-attn is installed")
    flags = parser.parse_args()
    name = card()
    peer_is_on_the_card(flags.torch)
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
        }
        runs[f"padded PyTorch, {flags.torch_attention}"] = (
            flags.torch, "torch_step.py", "--size", size, "--attention", flags.torch_attention, *THEIRS
        )  # fmt: skip
        rounds = [{trainer: measured(*command) for trainer, command in runs.items()} for _ in range(flags.rounds)]
        needed = rounds[0]["f2llm_jax, xla"]  # FLOPs a token are the batches', whoever computes them
        for trainer in runs:
            speed = statistics.median(one[trainer]["useful_tokens_per_s"] for one in rounds)
            mfu = f"{speed * needed['flops_per_s'] / needed['useful_tokens_per_s'] / peak:.1%}" if peak else "-"
            print(f"| {size} | {trainer} | {speed:,.0f} | {rounds[0][trainer]['token_efficiency']:.2f} | {mfu} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
