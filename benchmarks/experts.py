"""Half of the experts of a small mixture: by their router (REAP, frequency), by magnitude and by chance.

The mixture is made from the embedded world's model: each of eight experts takes a random quarter of a layer's FFN
channels, two are chosen for each token, and all is trained on the world's text. Then four experts of each layer go, by
scores from 16 windows of that text, and nothing is trained. Loss: on 16 windows that neither read; accuracy: the
world's tasks. Every seed is another mixture, another draw of windows and another chance. Rows are appended as they are
measured: what stands in the table is not run again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, append, done, machine
from transformers import MixtralConfig, MixtralForCausalLM

import prunekit as pk
from prunekit import world
from prunekit.account import loss_on

N_EXPERTS, A_TOKEN = 8, 2
WAYS = {
    "REAP": pk.REAP(),
    "router frequency": pk.RouterFrequency(),
    "L2": pk.Magnitude(p=2),
    "random": None,
}


def mixture(dense: Any, seed: int) -> MixtralForCausalLM:
    """The world's model with experts in place of FFNs."""
    generator, given = torch.Generator().manual_seed(seed), dense.config.to_dict()
    shared = {key: given[key] for key in given.keys() & MixtralConfig().to_dict().keys()} | {"model_type": "mixtral"}
    sizes = {"intermediate_size": dense.config.intermediate_size // 4, "num_local_experts": N_EXPERTS}
    torch.manual_seed(seed)
    model = MixtralForCausalLM(MixtralConfig(**{**shared, **sizes, "num_experts_per_tok": A_TOKEN}))
    model.load_state_dict(dense.state_dict(), strict=False)  # all but the FFNs
    with torch.no_grad():
        for layer, old in zip(model.model.layers, dense.model.layers, strict=True):
            for expert in range(N_EXPERTS):
                channels = torch.randperm(dense.config.intermediate_size, generator=generator)[
                    : sizes["intermediate_size"]
                ]
                gate, up = old.mlp.gate_proj.weight[channels], old.mlp.up_proj.weight[channels]
                layer.mlp.experts.gate_up_proj[expert] = torch.cat([gate, up])
                layer.mlp.experts.down_proj[expert] = 4 * old.mlp.down_proj.weight[:, channels]
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--limit", type=int, default=40, help="questions of each task")
    parser.add_argument("--out", type=Path, default=RESULTS / "experts_world.csv")
    args = parser.parse_args()
    told, there = machine(), done(args.out, "seed", "way", "steps")
    dense, tokenizer = pk.load("world")
    for seed in args.seeds:
        if all((str(seed), way, str(args.steps)) in there for way in ("uncut", *WAYS)):
            continue
        windows = {"seq_len": 128, "tokenizer": tokenizer}
        train = pk.calibration_set("world", n_samples=args.steps * 8, seed=seed, **windows)
        calib = pk.calibration_set("world", n_samples=16, seed=seed + 100, **windows)
        held = pk.calibration_set("world", n_samples=16, seed=seed + 200, held_out=True, **windows)
        began, method = time.perf_counter(), pk.FullTuning(max_steps=args.steps, learning_rate=1e-3, seed=seed)
        model = pk.recover(mixture(dense, seed), method, train, measure=False, inplace=True)
        groups, seconds = pk.discover(model), time.perf_counter() - began
        experts = groups.of_kind("expert")
        for way in ("uncut", *WAYS):
            small = model
            if way != "uncut":
                scores = pk.score(model, experts, WAYS[way] or pk.Random(seed=seed), calib)
                small = pk.prune(model, pk.plan(groups, scores, {"expert": 0.5}, of="units"), measure=False)
            tasks = pk.zero_shot(small, tokenizer, world.tasks(), limit=args.limit)
            row = {"seed": seed, "way": way, "steps": args.steps, "train_seconds": round(seconds, 1)}
            row |= {"loss": round(loss_on(small, held), 4), "accuracy": round(tasks.mean, 4)}
            append({**told, **row, "questions": len(tasks.questions)}, args.out)


if __name__ == "__main__":
    main()
