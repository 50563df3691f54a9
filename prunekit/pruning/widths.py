"""Solves for new values of integers that modules store, from the remaining channels."""

from torch import Tensor

from prunekit.discovery.integer_positions import SHAPE, Equation
from prunekit.discovery.labelling import Trace
from prunekit.discovery.stored_integers import Attribute, Key
from prunekit.errors import PrunekitError


def solve(before: Trace, dead: Tensor) -> dict[Key, int]:
    """Values that make every use of a stored integer equal to the remaining size there.

    Args:
        before: trace of the uncut model.
        dead: bool (n_nodes,), what goes.

    Returns:
        New values of the attributes that change.

    Raises:
        PrunekitError: one attribute would need two values, or the equations leave it open.
    """
    read = {a.key for e in before.equations for a in e.expression.attributes() if a.key[1] == SHAPE}
    known = {key: before.sizes[key].survivors(dead) for key in read}
    measured = [(equation, equation.span.survivors(dead)) for equation in before.equations]
    waiting = [(equation, target) for equation, target in measured if target]  # where nothing is left, nothing is sized
    while waiting:
        ready = [(e, target) for e, target in waiting if len(_open(e, known)) <= 1]
        if not ready:
            break
        for equation, target in ready:
            _settle(equation, target, known)
        done = {id(e) for e, _ in ready}
        waiting = [(e, target) for e, target in waiting if id(e) not in done]
    for equation, target in waiting:
        _settle_together(equation, target, known)
    old = {a.key: a.value for equation in before.equations for a in equation.expression.attributes()}
    return {key: value for key, value in known.items() if key[1] != SHAPE and value != old[key]}


def _open(equation: Equation, known: dict[Key, int]) -> list[Attribute]:
    return [a for a in equation.expression.attributes() if a.key not in known]


def _settle(equation: Equation, target: int, known: dict[Key, int]) -> None:
    unsettled = _open(equation, known)
    if equation.expression.evaluate(known) == target:
        known.update({a.key: a.value for a in unsettled})
        return
    if not unsettled:
        raise _conflict(equation, target, known)
    attribute = unsettled[0]
    evaluate = equation.expression.evaluate
    fits = [v for v in range(attribute.value, 0, -1) if evaluate({**known, attribute.key: v}) == target]
    if not fits:
        raise _conflict(equation, target, known)
    known[attribute.key] = fits[0] if len(fits) == 1 else _proportional(attribute, equation, target, fits)


def _proportional(attribute: Attribute, equation: Equation, target: int, fits: list[int]) -> int:
    """Where rounding division leaves several values, the one in proportion to the width."""
    value, rest = divmod(attribute.value * target, max(equation.expression.evaluate({}), 1))
    return value if not rest and value in fits else fits[0]


def _settle_together(equation: Equation, target: int, known: dict[Key, int]) -> None:
    """Several unknown attributes: keep their values if these fit, else raise an error."""
    if equation.expression.evaluate(known) == target:
        known.update({a.key: a.value for a in _open(equation, known)})
        return
    names = ", ".join(".".join(filter(None, a.key)) for a in _open(equation, known))
    raise PrunekitError(
        f"{equation.where or 'the model'} computes a width from {names}; it is unknown which must change to give "
        f"{target}, "
        "so nothing was cut; keep all units there"
    )


def _conflict(equation: Equation, target: int, known: dict[Key, int]) -> PrunekitError:
    names = ", ".join(".".join(filter(None, a.key)) for a in equation.expression.attributes() if a.key[1] != SHAPE)
    return PrunekitError(
        f"{equation.where or 'the model'} would need {names} to give a width of {target}, but it is also used where "
        f"it must give {equation.expression.evaluate(known)}; cut the same number of units in both places, or neither"
    )
