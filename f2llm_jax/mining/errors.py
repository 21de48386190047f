"""What goes wrong in mining."""


class MiningError(ValueError):
    """Inputs, options or vectors that cannot be mined with; the message names file, row or text, and the remedy."""
