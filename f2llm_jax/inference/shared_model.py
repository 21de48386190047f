"""A model for all hosts of a command: what lies on the Hub is downloaded once and not by each."""

import jax
from etils import epath

from f2llm_jax.inference.devices import all_here, is_first
from f2llm_jax.weights import hf_fetch
from f2llm_jax.weights.models import LoadableModel, find_model


def find_shared(name: str, common: epath.PathLike) -> LoadableModel:
    """The model that `name` means, on every host.

    Args:
      name: as `find_model` takes it.
      common: a folder that all hosts see; a Hub model goes to `downloads/` in it where there are several.

    Raises:
      UserError: as `find_model`.
    """
    if jax.process_count() == 1:
        return find_model(name)
    try:
        if is_first():
            hf_fetch.share(name, common)
    finally:  # the others find what is missing themselves, and say so
        all_here("model downloaded")
    return find_model(name, shared=common)
