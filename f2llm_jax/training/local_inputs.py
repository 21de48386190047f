"""What a host reads in a run: made and downloaded once for all hosts, copied to the disk of each where that is asked for."""

import ml_collections
from etils import epath

from f2llm_jax.data import teacher_cache
from f2llm_jax.data.local_copy import local_copy
from f2llm_jax.data.records import COMPLETE
from f2llm_jax.errors import UserError
from f2llm_jax.training.hosts import Place
from f2llm_jax.weights import hf_fetch


def fetch(config: ml_collections.ConfigDict, workdir: epath.Path, place: Place) -> None:
    """Makes, downloads and copies what the run reads; before the startup check, at which the hosts wait for each other.

    The first of several hosts makes the embedded corpus and shares models of the Hub through the workdir; copies are each host's own.
    """
    if place.process_id == 0 and place.num_processes > 1:
        data_folder(config, workdir)
        for model in filter(None, (config.init, config.teacher)):
            hf_fetch.share(model, workdir)
    for folder, last in ((config.data.folder, COMPLETE), (config.teacher_cache, teacher_cache.COMPLETE)):
        if folder:
            local_copy(folder, config.data.copy_to, last=last, progress=True)


def data_folder(config: ml_collections.ConfigDict, workdir: epath.Path) -> epath.PathLike:
    """The prepared dataset: the given one, or for a local run the embedded corpus, made in the workdir if need be.

    Raises:
      UserError: neither is configured.
    """
    if config.data.folder:
        return config.data.folder
    if not config.data.embedded_stage:
        raise UserError(
            "config.data.folder is empty; make one with `python -m f2llm_jax.prepare`, or pass :runlocal for the embedded corpus"
        )
    from f2llm_jax.preparation import embedded  # Beam and Babel, which training on a prepared dataset does without

    return embedded.prepare(workdir / "data", config.data.embedded_stage, config.batch.max_length)
