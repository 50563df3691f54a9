"""What training wins back on a real model, beside the uncut model trained in the same way on the same text.

    python benchmarks/recovery_real.py --ways "LoRA(r=32, learning_rate=1e-3)" --tokens 200000 --tasks

Raw text alone lowers an instruct model's perplexity, so a recovered model is compared with the uncut one after the
same training. `Distillation(text_share=0.5) LoRA(r=8)` trains towards the uncut model, which would stay as it is then.
`cut` is the shell's default at 20%, `cut35` at 35%, calibration seed 0, each made once. The text is C4, Wikipedia and
Alpaca, joined, cut into windows of 128 tokens and shuffled; none of it is measured on. Perplexity is that of the first
characters of WikiText-2, PTB and Shakespeare; tasks are the papers' seven, 200 questions each. Rows are appended as
they are measured: what stands in the table is not run again.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, SEVEN, append, done, machine, shared

import prunekit as pk
from prunekit.recovery.data import training_windows as windows_of

TEXTS = {"wikitext2": "wikitext2/test.txt", "ptb": "ptb/ptb.test.txt", "shakespeare": "tinyshakespeare/input.txt"}
METHODS = {"LoRA": pk.LoRA, "FullTuning": pk.FullTuning, "Distillation": pk.Distillation}
CUTS = {"cut": 0.2, "cut35": 0.35}
BUILD = Path(__file__).parents[1] / "build" / "real"
DEFAULT = "LoRA()"


def cut_model(name: str) -> tuple[Any, Any]:
    """SmolLM2 with a part of its parameters gone, as `prunekit prune` cuts it."""
    folder = BUILD / f"cut{round(100 * CUTS[name])}"
    if not folder.is_dir():
        model, tokenizer = pk.load("smollm2")
        groups = pk.discover(model)
        calib = pk.calibration_set(shared("data/calibration/c4_demo.jsonl"), tokenizer, n_samples=64, seq_len=128)
        scores = pk.score(model, groups.of_kind("kv_head", "ffn_channel"), pk.Curvature(), calib)
        small = pk.prune(model, pk.plan(groups, scores, CUTS[name]), compensate=calib, measure=False)
        pk.save(small, folder, tokenizer=tokenizer)
    return pk.load(folder)


def training_windows(tokenizer: Any) -> torch.Tensor:
    """C4, Wikipedia and Alpaca as shuffled windows, int64 (n_windows, 128)."""
    rows = json.loads(shared("data/instruct/alpaca_en_demo.json").read_text())
    talk = ["\n".join(filter(None, (row["instruction"], row["input"], row["output"]))) for row in rows]
    data = [shared("data/calibration/c4_demo.jsonl"), shared("data/calibration/wiki_demo.txt"), talk]
    windows = torch.cat([windows_of(source, tokenizer, 128).tokens for source in data])
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]


def method_from(text: str, **options: Any) -> Any:
    """`LoRA(r=32)` as the method that it says, with further options."""
    name, _, rest = text.partition("(")
    pairs = [part.split("=") for part in rest.rstrip(")").replace(" ", "").split(",") if part]
    return METHODS[name](**{key: json.loads(value) for key, value in pairs}, **options)


def measured(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, float]:
    """Perplexities, and the mean accuracy of the seven tasks where they are asked for."""
    texts = {name: shared(f"data/{path}").read_text()[: args.characters] for name, path in TEXTS.items()}
    found = {name: round(pk.perplexity(model, tokenizer, text), 2) for name, text in texts.items()}
    found["tasks"] = float("nan")
    if args.tasks:
        result = pk.zero_shot(model, tokenizer, SEVEN, limit=200, data_dir=shared("data/zeroshot"))
        found["tasks"] = round(result.mean, 4)
    return found


def trained(model: Any, windows: torch.Tensor, way: str, tokens: int) -> tuple[Any, int, float]:
    """The model after training on so many tokens, how many those were, and the seconds."""
    if way == "untrained":
        return model, 0, 0.0
    *towards, how = way.replace(") ", ")|").split("|")
    batch = method_from(how).windows_a_step(len(windows))
    steps = tokens // (batch * windows.shape[1])
    began, method = time.perf_counter(), method_from(how, max_steps=steps)
    if towards:
        method = method_from(towards[0], teacher=pk.load("smollm2")[0], training=method)
    out = pk.recover(model, method, windows[: steps * batch], measure=False, inplace=True)
    return out, steps * batch * windows.shape[1], time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(*CUTS, "uncut"), default=["cut", "uncut"])
    parser.add_argument("--ways", nargs="+", default=["untrained", DEFAULT])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--characters", type=int, default=13_000)
    parser.add_argument("--tasks", action="store_true", help="ask the seven tasks too, some minutes a row")
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery_smollm2.csv")
    args = parser.parse_args()
    told, rows = machine(), done(args.out, "tasks", "model", "way", "tokens", "characters")
    there = {row[1:] for row in rows if row[0] != "nan" or not args.tasks}
    for way in args.ways:
        for name in args.models:
            asked = args.tokens if way != "untrained" else 0
            if (name, way, str(asked), str(args.characters)) in there:
                continue
            model, tokenizer = cut_model(name) if name in CUTS else pk.load("smollm2")
            model, seen, seconds = trained(model, training_windows(tokenizer), way, asked)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            row = {"model": name, "way": way, "tokens": asked, "seen": seen, "seconds": round(seconds, 1)}
            row |= {"peak_mb": peak, "characters": args.characters, **measured(model, tokenizer, args)}
            append({**told, **row}, args.out)


if __name__ == "__main__":
    main()
