"""The weights a run starts from, checked against its data before anything is loaded."""

import dataclasses
from collections.abc import Callable

import jax
from etils import epath
from flax import nnx

from f2llm_jax.data.records import Dataset
from f2llm_jax.data.teacher_cache import ANY_WIDTH
from f2llm_jax.errors import UserError
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.model.low_rank import factorised
from f2llm_jax.model.sizes import SIZES, DecoderConfig
from f2llm_jax.weights.digest import model_digest
from f2llm_jax.weights.models import LoadableModel, find_model
from f2llm_jax.weights.truncation import Truncation

TOY_VOCAB_MULTIPLE = 64  # toy sizes take the tokenizer's vocabulary, rounded up so that it splits over devices


class StartError(UserError):
    """Weights and data (or student and teacher) that do not belong together; the message names the remedy."""


@dataclasses.dataclass(frozen=True)
class StartingPoint:
    """A decoder's shape, where its weights come from in words, and how to get them."""

    config: DecoderConfig
    description: str
    load: Callable[[jax.sharding.Mesh | None], nnx.State]
    digest: Callable[[], str] = str  # of weights, shape and tokenizer; reads all weights


def student(
    init: str, size: str, seed: int, dataset: Dataset, table_rank: int = 0, *, shared: epath.PathLike | None = None
) -> StartingPoint:
    """The model to train: the weights at `init` (see `find_model`), or random ones of `size` if it is empty.

    Of an empty `size`, or "toy", weights of any shape are taken.

    With `table_rank` its embedding table is a product of two factors: those of `init` if it has them in this rank, else the
    nearest to its table.

    Raises:
      StartError: unknown size, weights of another size, or a tokenizer or vocabulary other than the data's.
    """
    plain = _plain_student(init, size, seed, dataset, shared)
    if not table_rank:
        return plain
    config = dataclasses.replace(plain.config, table_rank=table_rank)
    if init and (stored := find_model(init, Truncation(factored=True), shared)).config == config:
        return StartingPoint(config, f"from {stored.name}, table in its factors", stored.load)
    return StartingPoint(config, f"{plain.description}, table of rank {table_rank}", lambda mesh: factorised(plain.load(mesh), table_rank))


def _plain_student(init: str, size: str, seed: int, dataset: Dataset, shared: epath.PathLike | None) -> StartingPoint:
    if size not in SIZES and not (init and not size):
        raise StartError(
            f"unknown size {size!r}; there are: {', '.join(SIZES)}" if size else "config.size and config.init are both empty; set one"
        )
    if not init:
        config = SIZES[size]
        if size.startswith("toy"):
            config = dataclasses.replace(config, vocab_size=-(-dataset.vocab_size // TOY_VOCAB_MULTIPLE) * TOY_VOCAB_MULTIPLE)
        _check_vocabulary(config, f"size {size}", dataset)
        return StartingPoint(config, "from random weights", lambda mesh: init_decoder(config, seed, mesh))
    origin = find_model(init, shared=shared)
    _check_tokenizer(origin, dataset)
    if size not in ("", "toy") and not _is_size(origin.config, size):
        own = next((name for name in SIZES if _is_size(origin.config, name)), "")
        raise StartError(
            f"{init} is not of size {size}: it is {f'of size {own}' if own else 'of none of the published sizes'}; "
            f"pass --config.size={own}{'' if own else ' (empty), which takes any,'} and the hyper-parameters that you want for it"
        )
    return StartingPoint(origin.config, f"from {init}", origin.load)


def teacher(name: str, student_width: int | None, dataset: Dataset, *, shared: epath.PathLike | None = None) -> StartingPoint:
    """The frozen model to distil from.

    Args:
      name: of the model (see `find_model`).
      student_width: components that are compared one by one with the student's; None where any width will do.
      dataset: that the run trains on.
      shared: workdir through which hosts share a model of the Hub.

    Raises:
      StartError: it is narrower than the student, or does not read the same token ids.
    """
    origin = find_model(name, shared=shared)
    if student_width and origin.config.hidden_size < student_width:
        raise StartError(
            f"the teacher {name} has width {origin.config.hidden_size}, less than the student's {student_width}, and distillation cuts the "
            f"teacher to the student's width: take a teacher at least as wide, or {ANY_WIDTH}"
        )
    if _other_tokenizer(origin, dataset):
        raise StartError(
            f"the teacher {name} has another tokenizer than the student and the data in {dataset.folder}, and a teacher reads the same "
            "token ids; distil from a model of the student's family, or let this one read the texts: "
            f"cache_teacher --model {name} --retokenize --data {dataset.folder}, and config.teacher_cache instead of config.teacher"
        )
    _check_vocabulary(origin.config, name, dataset)
    return StartingPoint(origin.config, f"from {name}", origin.load, lambda: model_digest(origin))


def _is_size(config: DecoderConfig, size: str) -> bool:
    return dataclasses.replace(SIZES[size], vocab_size=config.vocab_size) == config


def _check_tokenizer(origin: LoadableModel, dataset: Dataset) -> None:
    _check_vocabulary(origin.config, origin.name, dataset)
    if (tokenizer := origin.tokenizer) and _other_tokenizer(origin, dataset):
        raise StartError(
            f"{origin.name} has another tokenizer than the data in {dataset.folder} was prepared with "
            f"(end token {tokenizer.end_id} and {dataset.eos_id}); run prepare again with --tokenizer {origin.name}"
        )


def _other_tokenizer(origin: LoadableModel, dataset: Dataset) -> bool:
    return origin.tokenizer is not None and origin.tokenizer.fingerprint != dataset.tokenizer_fingerprint


def _check_vocabulary(config: DecoderConfig, name: str, dataset: Dataset) -> None:
    if dataset.vocab_size > config.vocab_size:
        raise StartError(
            f"{name} has {config.vocab_size} embedding rows, but the data was prepared with a tokenizer of {dataset.vocab_size} ids; "
            "run prepare again with the model's own tokenizer"
        )
