"""A model as a workdir: its weights in one checkpoint of step 0 and its tokenizer, in the layout that training leaves."""

import dataclasses

from etils import epath
from orbax.checkpoint import v1 as ocp

from f2llm_jax.model.origin import ModelOrigin
from f2llm_jax.model.stored import absolute, flatten
from f2llm_jax.release.folder import complete_or_absent


def write_workdir(origin: ModelOrigin, out: epath.PathLike, *, overwrite: bool) -> None:
    """Writes `OUT/checkpoints/0` and `OUT/tokenizer`. There is no optimizer state: a run starts from it, none resumes it.

    Args:
      origin: the model.
      out: folder to make; complete or absent.
      overwrite: replace an older workdir at `out`, checkpoints and all.

    Raises:
      ReleaseError: `out` may not be written.
      TokenizerError: the model has no tokenizer or one that does not fit it.
    """
    tokenizer = origin.matching_tokenizer()
    metadata = {
        "decoder": dataclasses.asdict(origin.config),
        "matryoshka_dims": origin.matryoshka_dims,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "max_length": origin.max_length,
    }
    with complete_or_absent(out, "checkpoints", overwrite) as folder:
        tokenizer.save(folder / "tokenizer")
        with ocp.training.Checkpointer(absolute(folder / "checkpoints")) as checkpoints:
            checkpoints.save_checkpointables(0, {"params": flatten(origin.load(None))}, custom_metadata=metadata)
