"""LHSPG: LoRA half-space projected gradient, a torch optimiser at whose end chosen units are exactly zero."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.importance import Importance, score
from prunekit.importance.lora import lora_saliency
from prunekit.recovery.lora_units import GroupUnits, as_units, lora_pairs, units_of

Saliency = Callable[["LHSPG"], Mapping[str, Tensor]]


def update_saliency(optimizer: "LHSPG") -> Mapping[str, Tensor]:
    """The released proxies, of the weights as they stand and the update learned since the last merge."""
    return lora_saliency({group.name: group.statistics() for group in optimizer.units})


def importance_saliency(importance: Importance, calib: Tensor | None) -> Saliency:
    """Any importance as saliency, asked of the model as training has left it, update included.

    Args:
        importance: such as `Taylor()`.
        calib: integers (n_samples, seq_len); None where `importance` reads none.
    """
    return lambda optimizer: score(optimizer.model, optimizer.groups, importance, calib)


class LHSPG(torch.optim.AdamW):
    """Train A and B while units go: warm-up, then periods in which some shrink until the projection leaves zeros.

    A and B follow AdamW. At the end of the warm-up and of every period but the last, the least salient units still
    important become redundant; through the next period each step shrinks them, and takes their own part of B·A up
    into their weights. At a period's end they are exactly zero by the half-space projection (no top-k follows), and
    the update of all other units is merged into the weights, which is how what the redundant ones knew is transferred.
    Steps after the last period train on, with the zeros held.

    It works where an optimiser does: in a loop of one's own, in the Trainer, under accelerate. `state_dict` holds the
    weights that it changes as well, since checkpoints of adapters do not.

    Attributes:
        model: the adapted model.
        groups: those of it that may lose units.
        units: the same, tied to the model's tensors.
        n_steps: steps made.
        redundant: group name → sorted units that are zero or on their way.

    Source: LoRAShear (arXiv 2310.18356), Alg. 4 with Eq. 2. Differs: K is counted for each kind of unit, so that a head
        is not weighed against a channel; k = K/P (the paper's K/T_p is a slip); λ as in `GroupUnits.shrink`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Iterable[CoupledGroup],
        n_units: Mapping[str, int],
        *,
        warmup_steps: int,
        period_steps: int,
        n_periods: int = 5,
        saliency: Saliency = update_saliency,
        epsilon: float = 0.0,
        min_units: int = 1,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        """Look at an adapted model; nothing changes before the first step.

        Args:
            model: a peft model with one plain LoRA adapter.
            groups: those of `discover(model)`, the adapted model, that may lose units.
            n_units: kind → number of units that are zero at the end.
            warmup_steps: steps before the first units are chosen, 0 or more.
            period_steps: steps a period, at least 1.
            n_periods: periods, at least 1; they share the units out evenly.
            saliency: what is asked at the end of the warm-up and of each period: this optimiser → group name →
                (n_units,), higher means keep. `importance_saliency(Taylor(), calib)` asks any importance.
            epsilon: of the half-space, in [0, 1).
            min_units: units that every group keeps.
            lr: peak learning rate of A and B.
            betas: of AdamW.
            weight_decay: of A and B.

        Raises:
            PrunekitError: no LoRA, groups of another model, more units than there are, or a number that cannot be.
        """
        self.model, self.groups = model, tuple(groups)
        self.units = units_of(model, self.groups)
        self._pairs = lora_pairs(model)
        _check_numbers(warmup_steps=(warmup_steps, 0), period_steps=(period_steps, 1), n_periods=(n_periods, 1))
        if not 0 <= epsilon < 1:
            raise PrunekitError(f"epsilon={epsilon!r}; give a number in [0, 1), the paper's is 0")
        self.wanted = _check_wanted(self.units, n_units, min_units)
        self.warmup_steps, self.period_steps, self.n_periods = warmup_steps, period_steps, n_periods
        self.saliency, self.epsilon, self.min_units = saliency, epsilon, min_units
        self.n_steps = 0
        self._periods: list[dict[str, list[int]]] = []  # what each period took
        self._norms: list[Tensor] = []  # of each period, (steps + 1, units taken)
        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(trained, lr=lr, betas=betas, weight_decay=weight_decay)

    @property
    def pruning_steps(self) -> int:
        """Steps until the last unit is zero."""
        return self.warmup_steps + self.n_periods * self.period_steps

    @property
    def redundant(self) -> dict[str, list[int]]:
        """Group name → ascending units that are zero or on their way there."""
        return {g.name: sorted(u for period in self._periods for u in period.get(g.name, [])) for g in self.units}

    def history(self) -> pd.DataFrame:
        """One row a redundant unit and step: period (from 1), step (of the whole training), group, unit, norm (‖x‖)."""
        tables = []
        for number, (taken, norms) in enumerate(zip(self._periods, self._norms, strict=True)):
            start = self.warmup_steps + number * self.period_steps
            units = [(group, unit) for group, members in taken.items() for unit in members]
            frame = pd.DataFrame(units, columns=["group", "unit"])
            for step, row in enumerate(norms):
                tables.append(frame.assign(period=number + 1, step=start + step, norm=row.numpy()))
        columns = ["period", "step", "group", "unit", "norm"]
        return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of A and B, and one of the redundant units.

        Raises:
            PrunekitError: a gradient that is not finite; nothing has been changed since the step before then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        if self.n_steps == self.warmup_steps == 0:
            self._turn(0)
        super().step()
        self.n_steps += 1
        with torch.no_grad():
            self._shrink()
        return loss

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not bool(p.grad.isfinite().all()):
                    raise PrunekitError(
                        f"a gradient is not finite in step {self.n_steps + 1}: that step was not made, and the model "
                        f"is as step {self.n_steps} left it; lower the learning rate, now {group['lr']:g}"
                    )

    def _shrink(self) -> None:
        """The redundant units of this period one step on; at a boundary, merge and choose the next."""
        done = self.n_steps - self.warmup_steps
        self._hold()
        if 0 < done <= self.n_periods * self.period_steps:
            taken = self._periods[-1]
            remaining = self.period_steps - (done - 1) % self.period_steps
            norms = [g.shrink(as_units(taken[g.name]), remaining, self.epsilon) for g in self.units if g.name in taken]
            self._norms[-1][self.period_steps - remaining + 1] = torch.cat(norms)
        if self.n_steps in range(self.warmup_steps, self.pruning_steps + 1, self.period_steps):
            self._turn(done // self.period_steps)

    def _turn(self, period: int) -> None:
        """Between two periods: ask for saliency while the update is there to be seen, merge it, name the next units."""
        scores = self.saliency(self) if period < self.n_periods else None
        if period > 0:
            for pair in self._pairs.values():
                pair.merge()
        if scores is not None:
            self._take(scores, period)

    def _take(self, scores: Mapping[str, Tensor], period: int) -> None:
        """Make the least salient units redundant, as many as this period's share of each kind."""
        gone = self.redundant
        taken: dict[str, list[int]] = {}
        for kind, total in self.wanted.items():
            of_kind = [group for group in self.units if group.kind == kind]
            already = sum(len(gone[group.name]) for group in of_kind)
            due = round(total * (period + 1) / self.n_periods) - already
            taken |= _lowest(of_kind, scores, gone, due, self.min_units)
        self._periods.append(taken)
        start = [g.statistics(as_units(taken[g.name])).norm for g in self.units if g.name in taken]
        norms = torch.full((self.period_steps + 1, sum(map(len, start))), torch.nan)
        norms[0] = torch.cat(start) if start else norms[0]
        self._norms.append(norms)

    def _hold(self) -> None:
        """Units that are zero stay so: AdamW's momentum would move their A and B."""
        for taken in self._periods:
            for group in self.units:
                if group.name in taken:
                    group.silence_lora(as_units(taken[group.name]))

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, and under `"lhspg"` how far the units are, with the weights that are changed on the way."""
        weights = [owned.tensor.data for group in self.units for owned in group.weights]
        merged = [pair.weight.data for pair in self._pairs.values()]
        own = {"n_steps": self.n_steps, "periods": self._periods, "norms": self._norms, "weights": [*weights, *merged]}
        return {**super().state_dict(), "lhspg": own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, weights included.

        Raises:
            PrunekitError: the state of another optimiser, or of other groups.
        """
        own = state_dict.get("lhspg")
        here = self.state_dict()["lhspg"]["weights"]
        if own is None or [t.shape for t in own["weights"]] != [t.shape for t in here]:
            raise PrunekitError("this is no state of an LHSPG over these groups; give what its state_dict() returned")
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "lhspg"})
        for mine, saved in zip(here, own["weights"], strict=True):
            mine.copy_(saved)
        self.n_steps = int(own["n_steps"])
        self._periods = [{name: list(units) for name, units in taken.items()} for taken in own["periods"]]
        self._norms = [norms.cpu().clone() for norms in own["norms"]]


def _lowest(
    groups: list[GroupUnits], scores: Mapping[str, Tensor], gone: Mapping[str, list[int]], due: int, min_units: int
) -> dict[str, list[int]]:
    """The units of lowest score that are not gone, while every group keeps `min_units`."""
    left = {group.name: group.n_units - len(gone[group.name]) - min_units for group in groups}
    dead = {name: set(units) for name, units in gone.items()}
    ranked = sorted(
        (score, group.name, unit)
        for group in groups
        for unit, score in enumerate(_finite(group, scores).tolist())
        if unit not in dead[group.name]
    )
    taken: dict[str, list[int]] = {}
    for _, name, unit in ranked:
        if due > 0 and left[name] > 0:
            taken.setdefault(name, []).append(unit)
            left[name] -= 1
            due -= 1
    return {group.name: sorted(taken[group.name]) for group in groups if group.name in taken}


def _finite(group: GroupUnits, scores: Mapping[str, Tensor]) -> Tensor:
    found = scores.get(group.name)
    if found is None or found.shape != (group.n_units,) or not bool(found.isfinite().all()):
        given = "nothing" if found is None else f"{tuple(found.shape)}, not all finite or not one a unit"
        raise PrunekitError(f"saliency of {group.name!r} is {given}; give {group.n_units} finite numbers")
    return found


def _check_numbers(**numbers: tuple[Any, int]) -> None:
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise PrunekitError(f"{name}={value!r} is not allowed; give an integer of {least} or more")


def _check_wanted(units: tuple[GroupUnits, ...], n_units: Mapping[str, int], min_units: int) -> dict[str, int]:
    """Kind → units that are to go, after checking that there are as many."""
    _check_numbers(min_units=(min_units, 1))
    for kind, wanted in n_units.items():
        _check_numbers(**{f"n_units[{kind!r}]": (wanted, 0)})
        most = sum(max(0, group.n_units - min_units) for group in units if group.kind == kind)
        if wanted > most:
            raise PrunekitError(
                f"{wanted} units of kind {kind!r} are to go, but only {most} may: each group keeps {min_units}"
            )
    return dict(n_units)
