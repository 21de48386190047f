"""A smaller model out of a larger one: narrower in its stream and its MLPs, with fewer layers (paper, section 3.3).

The paper names the idea (activation norms on calibration data; the first n layers) and neither the norm, the activations nor
the order; no code of it was published. What is done here instead is documented where it is decided: `calibration`, `choice`, `cut`.
"""
