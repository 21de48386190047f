"""Texts as callers of the Python API give them."""

from collections.abc import Iterable, Mapping

from f2llm_jax.errors import UserError


def given_texts(texts: str | Iterable[str]) -> list[str]:
    """One text or several as a list.

    Raises:
      UserError: `texts` is something whose items are not the texts, such as a dict or a table, or an item is no text.
    """
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, bytes | Mapping | set | frozenset) or not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) != 1:
        raise UserError(f"texts is a {type(texts).__name__}; give one text (str) or a list of them, of a table one of its columns")
    several = list(texts)
    for number, text in enumerate(several):
        if not isinstance(text, str):
            raise UserError(f"texts[{number}] is {text!r} ({type(text).__name__}), not a str; leave it out or convert it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"texts[{number}] is no Unicode text ({error.reason}): {text[:80]!r}; leave it out or repair it") from error
    return several
