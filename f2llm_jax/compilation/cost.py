"""Floating-point operations and memory traffic of a traced step, loops counted as often as they run.

The compiler's own `cost_analysis()` counts the body of a loop once and a fused attention kernel not at all. Here matrix products
are counted where JAX traces them, before fusion, which changes no product.

The names of primitives and of their parameters are known from JAX 0.10 to 0.12.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from f2llm_jax.jax_version import warn_if_newer


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of all devices together.

    Attributes:
      flops: of matrix products; a multiply-add is two.
      bytes: that matrix products read and write, each operand once.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)


def traced_cost(jaxpr: core.Jaxpr) -> Cost:
    """The cost of a jaxpr whose loops have static lengths.

    Raises:
      ValueError: a loop runs nobody knows how often.
    """
    return sum((_equation(equation) for equation in jaxpr.eqns), Cost())


def _equation(equation: core.JaxprEqn) -> Cost:
    name, inner = equation.primitive.name, _inner(equation)
    if name == "dot_general":
        return _product(equation)
    if name == "while" and any(traced_cost(one).flops for one in inner):
        raise ValueError("a loop with matrix products has no static length; trace the step with a number of chunks that is a Python int")
    if name == "pallas_call":
        return _kernel(equation)
    if name == "cond":
        return max((traced_cost(one) for one in inner), key=lambda cost: cost.flops)
    times = equation.params.get("length", 1) if name == "scan" else 1
    if name == "shard_map":  # its body is one device's
        times = math.prod(equation.params["mesh"].shape[axis] for axis in equation.params["newly_manual_axes"])
    return sum((traced_cost(one) for one in inner), Cost()) * times


def _inner(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    values = [v for value in equation.params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
    return [
        value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
        for value in values
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr)
    ]


def _product(equation: Any) -> Cost:
    (contracted, _), _ = equation.params["dimension_numbers"]
    if not contracted:  # a scaling, written as a product
        return Cost()
    left, right = (variable.aval for variable in equation.invars)
    out = equation.outvars[0].aval
    over = math.prod(left.shape[axis] for axis in contracted)
    return Cost(2.0 * math.prod(out.shape) * over, float(sum(x.size * x.dtype.itemsize for x in (left, right, out))))


def _kernel(equation: Any) -> Cost:
    """A splash attention kernel: its body at each point of its grid whose block of queries and keys is not all above the diagonal."""
    (body,) = _inner(equation)
    queries, keys = equation.invars[0].aval.shape[-2:]  # blocks of each, from the kernel's list of the blocks that there are
    needed = sum(-(-(i + 1) * keys // queries) for i in range(queries)) / (queries * keys)
    moved = sum(v.aval.size * v.aval.dtype.itemsize for v in (*equation.invars, *equation.outvars))
    return Cost(traced_cost(body).flops * math.prod(equation.params["grid_mapping"].grid) * needed, float(moved))


def trace(step, *arguments) -> Cost:
    """`traced_cost` of `step(*arguments)`; arguments are arrays or their shapes."""
    warn_if_newer(__name__, "operations may be missed or miscounted")
    traced = jax.make_jaxpr(step)(*arguments).jaxpr
    # Rematerialisation traces what it keeps once more, for the compiler to drop.
    return traced_cost(partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))[0])
