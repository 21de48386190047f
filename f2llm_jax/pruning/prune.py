"""The whole job but its writing: target, texts, measurement, choice, cut."""

import dataclasses

import jax

from f2llm_jax.cli.progress import ProgressCallback, silent
from f2llm_jax.data.records import Dataset
from f2llm_jax.errors import UserError
from f2llm_jax.model.decoder import count_parameters
from f2llm_jax.pruning.calibration import Activations, draw_texts, measure
from f2llm_jax.pruning.choice import KeptParts, Method, choose_kept
from f2llm_jax.pruning.cut import cut
from f2llm_jax.pruning.target import parse_target
from f2llm_jax.weights.models import ModelSource


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A pruned model and how it came to be.

    Attributes:
      source: the larger model.
      model: the smaller one; its weights are read when it is written.
      method: how was chosen.
      choice: what stays.
      activations: what the choice was made by.
      rows: of calibration.
    """

    source: ModelSource
    model: ModelSource
    method: Method
    choice: KeptParts
    activations: Activations
    rows: int

    def record(self) -> dict[str, object]:
        """For people, as JSON."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers")
        return {
            "model": self.source.short_name,
            **{name: [getattr(self.source.config, name), getattr(self.model.config, name)] for name in names},
            "parameters": [count_parameters(self.source.config), count_parameters(self.model.config)],
            **dataclasses.asdict(self.method),
            "calibration_rows": self.rows,
            "calibration_tokens": self.activations.tokens,
            "layers": self.choice.layers.tolist(),
        }


def prune(
    source: ModelSource,
    target: str,
    dataset: Dataset,
    rows: int,
    method: Method,
    *,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    report: ProgressCallback = silent,
) -> Pruned:
    """Prunes a model to `target` (see `parse_target`) by what it does on `rows` training rows of `dataset`.

    Raises:
      UserError: the target cannot be, the rows are too few or too many, or the data has another tokenizer.
      UserError: the model has no tokenizer or one that does not fit it.
    """
    config = parse_target(target, source.config)
    if source.matching_tokenizer().fingerprint != dataset.tokenizer_fingerprint:
        raise UserError(f"{dataset.folder} was prepared with another tokenizer than {source.name}'s; prepare it with that one")
    texts = draw_texts(dataset, rows, seed, source.text_limit)
    activations = measure(source, texts, mesh, report)
    choice = choose_kept(activations, config, method)
    return Pruned(source, cut(source, config, choice), method, choice, activations, rows)
