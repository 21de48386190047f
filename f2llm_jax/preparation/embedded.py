"""The embedded corpus as a prepared dataset: real multilingual text that needs no download."""

from etils import epath

from f2llm_jax.preparation import demo_corpus, writing
from f2llm_jax.preparation.selection import Recipe
from f2llm_jax.preparation.sources import find_sources


def prepare(folder: epath.Path, stage: int, max_length: int) -> epath.Path:
    """Builds the corpus and prepares it for `stage` under the local `folder`, or finds both there; returns the dataset's folder."""
    corpus = folder / "corpus"
    if not corpus.exists():
        demo_corpus.build(corpus)
    out = folder / f"stage{stage}"
    recipe = Recipe(stage=stage, max_length=max_length, seed=0, cap=0, instruct_documents=0.0, policy="default")
    writing.prepare(find_sources(corpus / "raw", stage=stage), corpus / "tokenizer", out, recipe)
    return out
