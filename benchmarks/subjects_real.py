"""What single questions and MMLU's subjects need in SmolLM2, for notebook 07b: some minutes on two cores.

- results/needs_smollm2.csv: one row per KV head and per whole FFN, the fall of the answer's log-probability of a few
  questions (`pk.needs`), with the seconds that the question took.
- results/subjects_smollm2.csv: one row per group of a few layers, ablated as a whole, and subject (10 questions of
  each): the rise of the loss with a 95% interval (`pk.compare_knowledge`), and the accuracy of the dense model.
"""

import time

from machine import RESULTS, machine, save, shared

import prunekit as pk

QUESTIONS = {"The capital of France is": " Paris", "Two plus two is": " four", "The opposite of hot is": " cold"}
SUBJECTS = ("anatomy", "astronomy", "high_school_geography", "us_foreign_policy", "elementary_mathematics")
LAYERS = (0, 10, 20, 29)
N_QUESTIONS = 10  # of each subject


def needed(model, tokenizer, groups) -> list[dict]:
    rows = []
    for question, answer in QUESTIONS.items():
        began = time.perf_counter()
        table = pk.needs(model, tokenizer, question, answer, groups=groups)
        seconds = round(time.perf_counter() - began, 1)
        print(f"{question!r}: {len(table)} ablations in {seconds} s", flush=True)
        told = {"question": question, "answer": answer, "seconds": seconds}
        rows += [{**told, **row} for row in table.drop(columns="measure").round(4).to_dict("records")]
    return rows


def subjects(model, tokenizer, groups) -> list[dict]:
    chosen = [group for group in groups if group.layer in LAYERS]
    scores = pk.score(model, chosen, pk.Magnitude())  # not used at ratio 1, where all units go
    known = pk.knowledge_distribution(
        model, tokenizer, chosen, scores, ratios=(1.0,), tasks=[f"mmlu_{name}" for name in SUBJECTS],
        limit=N_QUESTIONS, data_dir=shared("data"),
    )  # fmt: skip
    accuracy = known.questions.assign(hit=known.dense_hit).groupby("domain")["hit"].mean()
    table = pk.compare_knowledge({"dense": known}).drop(columns=["moved", "moved_low", "moved_high"])
    return table.assign(accuracy=table["domain"].map(accuracy)).round(4).to_dict("records")


def main() -> None:
    machine()
    model, tokenizer = pk.load("smollm2")
    groups = pk.discover(model).of_kind("kv_head", "ffn_channel")
    for measure, name in ((needed, "needs"), (subjects, "subjects")):
        path = RESULTS / f"{name}_smollm2.csv"
        if not path.exists():
            began = time.perf_counter()
            save(measure(model, tokenizer, groups), path)
            print(f"wrote {path.name} in {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
