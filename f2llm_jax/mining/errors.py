"""What goes wrong in mining."""

from f2llm_jax.errors import UserError


class MiningError(UserError):
    """Inputs, options or vectors that cannot be mined with; the message names file, row or text, and the remedy."""
