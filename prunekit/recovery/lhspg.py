"""LHSPG (LoRA half-space projected gradient): a torch optimiser that shrinks chosen units to exactly zero."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from prunekit.checks import Count, Network, NotNegative, Share, Whole, checked
from prunekit.compat import adamw_step
from prunekit.discovery.groups import CoupledGroup, Groups
from prunekit.errors import PrunekitError, reason
from prunekit.importance import Importance, score
from prunekit.pruning import PruningPlan
from prunekit.pruning.planning import plan_without
from prunekit.recovery.lora import lora_pairs
from prunekit.recovery.lora_units import as_units, check_wanted, lora_saliency, lowest_units, units_of

PREFIX = "base_model.model."  # of every name inside a peft model
Saliency = Callable[["LHSPG"], Mapping[str, Tensor]]


def update_saliency(optimizer: "LHSPG") -> Mapping[str, Tensor]:
    """Saliency of the released code, from the present weights and the update since the last merge."""
    return lora_saliency({group.name: group.statistics() for group in optimizer.units})


def importance_saliency(importance: Importance, calib: Tensor | None) -> Saliency:
    """Any importance as saliency, computed during training on the weights with their low-rank update.

    Args:
        importance: such as `Taylor()`.
        calib: integers (n_samples, seq_len); None where `importance` reads none.
    """
    return lambda optimizer: score(optimizer.model, optimizer.groups, importance, calib)


class LHSPG(torch.optim.AdamW):
    """Trains A and B while units shrink to zero: a warm-up, then periods with a projection.

    A and B follow AdamW. At the end of the warm-up and of every period but the last, the least salient units still
    important become redundant; through the next period each step shrinks them, and takes their own part of B·A up
    into their weights. At a period's end they are exactly zero by the half-space projection (no top-k follows), and
    the update of all other units is merged into the weights, which transfers knowledge from the redundant units.
    Steps after the last period train on, with the zeros held.

    It works where an optimiser does: in a loop of your own, in the Trainer, under accelerate. `state_dict` holds the
    weights that it changes as well, since checkpoints of adapters do not.

    Example::

        adapted = recovery.lora.attach(model, LoRA(r=8))  # or peft's get_peft_model
        groups = discover(adapted).of_kind("kv_head", "ffn_channel")
        optimizer = LHSPG(adapted, groups, {"ffn_channel": 100}, warmup_steps=20, period_steps=20)
        for batch in batches[: optimizer.pruning_steps]:
            optimizer.zero_grad()
            adapted(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        zeroed = adapted.merge_and_unload()
        small = prune(zeroed, optimizer.plan(discover(zeroed)))

    Attributes:
        model: the adapted model.
        groups: those of it that may lose units.
        units: the same, tied to the model's tensors.
        n_steps: steps made.
        redundant: group name → sorted units that are zero or on their way.

    Source: LoRAShear (arXiv 2310.18356), Alg. 4 with Eq. 2. Differs: K is counted for each kind of unit, so that a head
        is not weighed against a channel; k = K/P (the paper's K/T_p is a slip); λ as in `GroupUnits.shrink`.
    """

    @checked
    def __init__(
        self,
        model: Network,
        groups: Iterable[CoupledGroup],
        n_units: Mapping[str, Whole],
        *,
        warmup_steps: Whole,
        period_steps: Count,
        n_periods: Count = 5,
        saliency: Saliency = update_saliency,
        epsilon: Share = 0.0,
        min_units: Count = 1,
        lr: NotNegative = 1e-3,
        betas: tuple[Share, Share] = (0.9, 0.999),
        weight_decay: NotNegative = 0.0,
    ) -> None:
        """Takes an adapted model; nothing changes before the first step.

        Args:
            model: a peft model with one plain LoRA adapter.
            groups: those of `discover(model)`, the adapted model, that may lose units.
            n_units: kind → number of units that are zero at the end.
            warmup_steps: steps before the first units are chosen, 0 or more.
            period_steps: steps a period, at least 1.
            n_periods: periods, at least 1; they share the units out evenly.
            saliency: called at the end of the warm-up and of each period: this optimiser → group name →
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
        self.wanted = check_wanted(self.units, n_units, min_units)
        self.warmup_steps, self.period_steps, self.n_periods = warmup_steps, period_steps, n_periods
        self.saliency, self.epsilon, self.min_units = saliency, epsilon, min_units
        self.n_steps = 0
        self._n_turns = 0  # boundaries passed: the warm-up's end, and each period's
        self._periods: list[dict[str, list[int]]] = []  # what each period took
        self._norms: list[Tensor] = []  # of each period, (steps + 1, units taken)
        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(trained, lr=lr, betas=betas, weight_decay=weight_decay)

    @property
    def pruning_steps(self) -> int:
        """Steps until the last unit is zero."""
        return self.warmup_steps + self.n_periods * self.period_steps

    @property
    def finished(self) -> bool:
        """Whether all requested units are zero."""
        return self._n_turns > self.n_periods

    @property
    def redundant(self) -> dict[str, list[int]]:
        """Group name → redundant units (zero or shrinking), ascending."""
        return {g.name: sorted(u for period in self._periods for u in period.get(g.name, [])) for g in self.units}

    def plan(self, groups: Groups, notes: Mapping[str, Any] | None = None) -> PruningPlan:
        """The plan that removes the redundant units.

        Args:
            groups: of the model without adapters, as `discover` finds them after the merge.
            notes: notes on how the plan was made.

        Raises:
            PrunekitError: not all units are zero yet, or groups of another model.
        """
        if not self.finished:
            raise PrunekitError(f"step {self.n_steps} of {self.pruning_steps}: not all units are zero yet; train on")
        gone = {name.removeprefix(PREFIX): units for name, units in self.redundant.items()}
        return plan_without(groups, gone, {"importance": "LHSPG", **(notes or {})})

    def history(self) -> pd.DataFrame:
        """One row per redundant unit and step: period (from 1), step (of all training), group, unit, norm (‖x‖)."""
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
            PrunekitError: no gradient, or one that is not finite; nothing has been changed since the step before then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        with torch.no_grad():
            self._turn_if_due()  # without a warm-up; or where the one that was due has been interrupted
            adamw_step(self)
            self.n_steps += 1
            self._shrink()
            self._turn_if_due()
        return loss

    def _check_gradients(self) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            raise PrunekitError("there is no gradient, so that units would go and nothing learn: call backward() first")
        if not bool(torch.stack([g.norm() for g in gradients]).isfinite().all()):
            raise PrunekitError(
                f"a gradient is not finite in step {self.n_steps + 1}: that step was not made, and the model is as "
                f"step {self.n_steps} left it; lower the learning rate, now {self.param_groups[0]['lr']:g}"
            )

    def _shrink(self) -> None:
        """Advance this period's redundant units by one step, and keep earlier ones at zero."""
        done = self.n_steps - self.warmup_steps
        for taken in self._periods:  # AdamW's momentum would move their A and B
            for group in (group for group in self.units if group.name in taken):
                group.zero_lora(as_units(taken[group.name]))
        if 0 < done <= self.n_periods * self.period_steps:
            taken = self._periods[-1]
            remaining = self.period_steps - (done - 1) % self.period_steps
            norms = [g.shrink(as_units(taken[g.name]), remaining, self.epsilon) for g in self.units if g.name in taken]
            self._norms[-1][self.period_steps - remaining + 1] = torch.cat([*norms, torch.zeros(0)])

    def _turn_if_due(self) -> None:
        """At a period's boundary: compute saliency, merge the update, choose the next units.

        Nothing has changed where saliency is refused or interrupted, and the next step asks again.
        """
        due = self.warmup_steps + self._n_turns * self.period_steps
        if self.n_steps < due or self.finished:
            return
        taken = self._chosen(self._n_turns) if self._n_turns < self.n_periods else None
        if self._n_turns > 0:
            for pair in self._pairs.values():
                pair.merge()
        self._n_turns += 1
        if taken is not None:
            start = [g.statistics(as_units(taken[g.name])).norm for g in self.units if g.name in taken]
            norms = torch.full((self.period_steps + 1, sum(map(len, start))), torch.nan)
            norms[0] = torch.cat([*start, torch.zeros(0)])
            self._periods.append(taken)
            self._norms.append(norms)

    def _chosen(self, period: int) -> dict[str, list[int]]:
        """The least salient units, as many as this period's share of each kind."""
        gone, kinds = self.redundant, {group.name: group.kind for group in self.units}
        due = {kind: round(total * (period + 1) / self.n_periods) for kind, total in self.wanted.items()}
        for name, units in gone.items():
            due[kinds[name]] = due.get(kinds[name], 0) - len(units)
        return lowest_units(self.units, self.saliency(self), gone, due, self.min_units)

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, and under `"lhspg"` the progress of the units and the changed weights."""
        own = {"n_steps": self.n_steps, "n_turns": self._n_turns, "periods": self._periods, "norms": self._norms}
        return {**super().state_dict(), "lhspg": {**own, "run": self._run(), "weights": self._weights()}}

    def _run(self) -> dict[str, Any]:
        """Identity that a resumed state must match."""
        schedule = {name: getattr(self, name) for name in ("warmup_steps", "period_steps", "n_periods", "min_units")}
        return {**schedule, "wanted": self.wanted, "groups": {group.name: group.n_units for group in self.units}}

    def _weights(self) -> list[Tensor]:
        """All tensors changed besides A and B, each once."""
        owned = [owned.tensor for group in self.units for owned in group.weights]
        return [tensor.data for tensor in dict.fromkeys([*owned, *(pair.weight for pair in self._pairs.values())])]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a `state_dict`, weights included.

        Raises:
            PrunekitError: the state of another optimiser, schedule, model or other groups; nothing is changed then.
        """
        own, here = state_dict.get("lhspg"), self._weights()
        if own is None or own["run"] != self._run() or [t.shape for t in own["weights"]] != [t.shape for t in here]:
            raise PrunekitError(
                "this is not a state of an LHSPG with these groups and this schedule; give what its state_dict() "
                "returned"
            )
        try:
            super().load_state_dict({name: value for name, value in state_dict.items() if name != "lhspg"})
        except ValueError as error:
            raise PrunekitError(
                f"the state is of other LoRA parameters ({reason(error)}); attach LoRA as before"
            ) from error
        for mine, saved in zip(here, own["weights"], strict=True):
            mine.copy_(saved)
        self.n_steps, self._n_turns = int(own["n_steps"]), int(own["n_turns"])
        self._periods = [{name: list(units) for name, units in taken.items()} for taken in own["periods"]]
        self._norms = [norms.cpu().clone() for norms in own["norms"]]
