"""A pruned model on disk: a workdir that training starts from, the same as a release, and how it was pruned.

OUT/checkpoints/0, OUT/tokenizer/   the workdir
OUT/model/                          the release
OUT/pruning.json                    from what, to what, by which method, on how many texts
OUT/pruning.npz                     what stays (layers, hidden, ffn) and every score
OUT/pruning.png                     the importance spectrum
"""

import dataclasses
import io

import numpy as np
from etils import epath

from f2llm_jax.pruning.picture import spectrum
from f2llm_jax.pruning.prune import Pruned
from f2llm_jax.release import hf_folder, workdir
from f2llm_jax.storage.files import workdir_path, write_json
from f2llm_jax.storage.folders import check_new_folder, new_folder

RECORD_FILE = "pruning.json"
MODEL_FOLDER = "model"


def check_out(out: epath.PathLike, overwrite: bool) -> None:
    """Raises UserError if `write_pruned` would refuse to write to `out`."""
    check_new_folder(out, overwrite)


def write_pruned(pruned: Pruned, out: epath.PathLike, form: hf_folder.ReleaseForm, *, overwrite: bool) -> None:
    """Writes all of the above; `out` is complete or absent.

    Raises:
      UserError: as `hf_folder.export`.
    """
    with new_folder(workdir_path(out), RECORD_FILE, overwrite) as folder:
        workdir.fill(folder, pruned.model)
        hf_folder.export(pruned.model, folder / MODEL_FOLDER, form)
        arrays = {field.name: getattr(pruned.choice, field.name) for field in dataclasses.fields(pruned.choice)}
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        (folder / "pruning.npz").write_bytes(packed.getvalue())
        (folder / "pruning.png").write_bytes(spectrum(pruned))
        write_json(folder / RECORD_FILE, pruned.record())
