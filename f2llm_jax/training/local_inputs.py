"""What a host reads in a run: made and downloaded once for all hosts, copied to the disk of each where that is asked for."""

import ml_collections
from etils import epath

from f2llm_jax.data import teacher_cache
from f2llm_jax.data.local_copy import local_copy
from f2llm_jax.data.records import COMPLETE, Dataset
from f2llm_jax.data.teacher_cache import TeacherCache, TeacherCaches
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
    if config.data.folder:
        local_copy(config.data.folder, config.data.copy_to, last=COMPLETE, progress=True)
    for folder in teacher_cache.cache_folders(config.teacher_cache):
        local_copy(folder, config.data.copy_to, last=teacher_cache.COMPLETE, progress=True)


def open_teachers(
    config: ml_collections.ConfigDict, dataset: Dataset, max_length: int, width: int | None
) -> TeacherCache | TeacherCaches | None:
    """The cached teacher or teachers of a run, None where there is none; see `TeacherCache` for the arguments and errors."""
    caches = [
        TeacherCache(local_copy(folder, config.data.copy_to, last=teacher_cache.COMPLETE), dataset, max_length, width)
        for folder in teacher_cache.cache_folders(config.teacher_cache)
    ]
    return TeacherCaches(caches) if len(caches) > 1 else caches[0] if caches else None


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
