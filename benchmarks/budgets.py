"""Twenty budgets of five kinds on the embedded world's model: solved, beside global ranking cut until each is met.

Damages of each group are measured once, on 8 windows of the world's text; each budget is then one mixed-integer
program, whose seconds are given. Global ranking (by curvature, as the default does) is cut by parameters in steps of
half a percent until the budget is met. Both use the same scores and are not re-fitted. Loss: on 16 windows that
nothing has read. `in steps` measures damages anew in two rounds, for budgets on parameters. Rows are appended as they
are measured: what stands in the table is not run again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, append, done, machine

import prunekit as pk
from prunekit.account import loss_on
from prunekit.search import (
    cache_table,
    latency_table,
    mac_table,
    measure_damages,
    parameter_table,
    solve_budgets,
    solve_in_steps,
    weight_table,
)

LIMITS = (0.85, 0.7, 0.55, 0.45)  # of what the dense model costs
LATENCIES = (0.95, 0.9, 0.85, 0.8)


class Bench:
    def __init__(self) -> None:
        self.model, self.tokenizer = pk.load("world")
        self.groups = pk.discover(self.model)
        windows = {"seq_len": 128, "tokenizer": self.tokenizer}
        self.calib = pk.calibration_set("world", n_samples=32, seed=0, **windows)
        self.held = pk.calibration_set("world", n_samples=16, seed=5, held_out=True, **windows)
        units = self.groups.of_kind("kv_head", "ffn_channel")
        self.scores = pk.score(self.model, units, pk.Curvature(), self.calib)

    def ranked(self, budget: Any) -> Any:
        """Global ranking, cut until a budget is met; None where that cannot be."""
        for percent in range(1, 190):
            try:
                plan = pk.plan(self.groups, self.scores, percent / 200)
            except pk.PrunekitError:
                continue
            if budget.table.of({name: len(plan.removed(name)) for name in plan.keep}) <= budget.high:
                return plan
        return None

    def loss(self, plan: Any) -> float:
        return round(loss_on(pk.prune(self.model, plan, measure=False), self.held), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "budgets_world.csv")
    args = parser.parse_args()
    told, bench, there = machine(), Bench(), done(args.out, "budget", "share")
    model, groups = bench.model, bench.groups
    tables = [parameter_table(groups), mac_table(model, groups), weight_table(model, groups)]
    tables += [cache_table(model, groups, context=128), latency_table(model, groups, seq_len=64)]
    began = time.perf_counter()
    damages = measure_damages(model, groups, bench.scores, bench.calib[:8])
    measuring = round(time.perf_counter() - began, 1)
    for table in tables:
        for share in LATENCIES if table.name.endswith("ms") else LIMITS:
            if (table.name, str(share)) in there:
                continue
            budget, began = table.at_most(share * table.total), time.perf_counter()
            row = {"budget": table.name, "share": share, "dense_loss": round(loss_on(model, bench.held), 4)}
            try:
                plan = solve_budgets(groups, bench.scores, [budget], damages=damages)
            except pk.PrunekitError:
                append({**told, **row, "measuring": measuring, "seconds": None, "expected_rise": None, "met": False,
                        "solved": None, "ranked": None, "in_steps": None}, args.out)  # fmt: skip
                continue
            row |= {"measuring": measuring, "seconds": round(time.perf_counter() - began, 2)}
            row |= {"expected_rise": round(plan.notes["expected_rise"], 4)}
            row |= {"met": plan.notes["costs"][table.name] <= budget.high, "solved": bench.loss(plan)}
            ranked = bench.ranked(budget)
            row |= {"ranked": None if ranked is None else bench.loss(ranked), "in_steps": None}
            if table.name == "parameters":
                steps = solve_in_steps(model, groups, bench.scores, [budget], bench.calib[:8], n_steps=2)
                row["in_steps"] = bench.loss(steps)
            append({**told, **row}, args.out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
