"""The headline claims of the five papers, each with where this project measures the same comparison.

The papers' figures are quoted. Ours are not: a claim says in which rows and which column of which table of `results`
the figure stands that the paper says is better, and the one beside it. `scoreboard.py` reads and compares them.
"""

from typing import Any, NamedTuple


class At(NamedTuple):
    """A column of those rows of a table in `results` that have the given values (of a list: one of them)."""

    file: str
    column: str
    rows: dict[str, Any]


class Claim(NamedTuple):
    """What a paper says, and the same comparison here, as (better by the paper, beside it); None: there is no table."""

    paper: str
    claim: str
    paper_figure: str
    paper_model: str
    measure: str
    better: str  # "lower" or "higher"
    smollm2: tuple[At, At] | None
    world: tuple[At, At] | None
    why: str  # the figures differ, or are missing
    share: float = 1.0  # of the figure beside it, that must be beaten


def recipe(name: str, stage: str, column: str) -> At:
    return At("recipes_smollm2.csv", column, {"recipe": name, "stage": stage})


def real(way: str, column: str = "wikitext2") -> At:
    return At("real_smollm2.csv", column, {"way": way, "ratio": 0.2})


def alone(*layers: int) -> At:
    """The rise of the loss where a layer is cut alone, as a mean over layers."""
    return At("layers_smollm2.csv", "alone", {"layer": layers})


def quality(method: str, ratio: float, stage: str = "untuned", column: str = "perplexity") -> At:
    return At("quality_world.csv", column, {"method": method, "ratio": ratio, "stage": stage})


def sheared(method: str, ratio: float) -> At:
    return At("lorashear_world.csv", "seven", {"method": method, "ratio": ratio})


def zeros(model: str, target: str) -> tuple[At, At]:
    """Perplexity by SparseLLM, and by SparseGPT."""
    file, rows = f"sparsity_{model}.csv", {"target": target, "allocation": "uniform"}
    return At(file, "perplexity", {"method": "sparsellm", **rows}), At(
        file, "perplexity", {"method": "sparsegpt", **rows}
    )


def searched(column: str) -> tuple[At, At]:
    """Found by the predictor, and by LLM-Pruner's rule."""
    return At("predictor_world.csv", column, {"method": "predictor", "ratio": 0.2}), At(
        "predictor_world.csv", column, {"method": "LLM-Pruner's layers", "ratio": 0.2}
    )


L7, L1, L2_7 = "LLaMA-7B, 20% gone", "LLaMA-1 7B", "LLaMA-2-7b, first half of the layers"
OPT = "OPT-30b, first half of the layers"
ALONE = "rise of the loss (nats) if one layer is cut alone, mean over layers"
PERPLEXITY = "perplexity: WikiText-2; of the world, its own text"
SEVEN = "mean accuracy of the papers' seven tasks"
SPARED = "LLM-Pruner (taylor, ends spared)"
SMALL = "Both models here are 50 to 9,000 times smaller, and the world's text is far easier."
SHORT = (
    "Recovery here reads 41,000 tokens (SmolLM2) or takes 60 steps (world); in the paper, 50,000 instructions twice."
)
FAR_MORE = "The paper trains for far more tokens; here LoRAShear has the same few for shrinking and for recovery."
CHANCE = "A hundred questions a task vary by about two points by chance, and recovery was measured once."
TOY = "The models are toys trained on the world, pruned in all layers; SmolLM2 was measured at 50%, 70% and 2:4."
SEARCH = "The baseline here is LLM-Pruner's selection at 20%, and 40 candidates on SmolLM2 are far fewer than 525."

CLAIMS = (
    Claim(
        "LLM-Pruner", "Without training, element scores of first-order Taylor lose less than L2 scores.",
        "19.09 against 582", L7, PERPLEXITY, "lower",
        (real("taylor"), real("l2")), (quality("element", 0.2), quality("L2", 0.2)), SMALL,
    ),
    Claim(
        "LLM-Pruner", "Without training, random scores lose less than L2 scores.",
        "27.5 against 582", L7, PERPLEXITY, "lower",
        (real("random"), real("l2")), (quality("random", 0.2), quality("L2", 0.2)), SMALL,
    ),
    Claim(
        "LLM-Pruner", "Without training, element scores lose less than random ones.",
        "19.09 against 27.5", L7, PERPLEXITY, "lower",
        (real("taylor"), real("random")), (quality("element", 0.2), quality("random", 0.2)), SMALL,
    ),
    Claim(
        "LLM-Pruner", "Without training, element scores lose less than vector scores.",
        "19.09 against 22.28", L7, PERPLEXITY, "lower",
        None, (quality("element", 0.2), quality("vector", 0.2)), SMALL,
    ),
    Claim(
        "LLM-Pruner", "Cutting heads and channels of blocks loses less than cutting the hidden dimension.",
        "19.09 against 74.6", L7, PERPLEXITY, "lower",
        None, None, "No table here has cuts of the hidden dimension at this size.",
    ),
    Claim(
        "LLM-Pruner", "Recovery by LoRA lowers the perplexity of the cut model.",
        "17.58 against 19.09", L7, PERPLEXITY, "lower",
        (recipe("LLM-Pruner", "recovered", "wikitext2"), recipe("LLM-Pruner", "pruned", "wikitext2")),
        (quality("element", 0.2, "recovered"), quality("element", 0.2)), SHORT,
    ),
    Claim(
        "LLM-Pruner", "After recovery, the cut model has 93% of the dense model's accuracy.",
        "59.23 of 63.25", L7, f"{SEVEN}, beside 93% of the dense model's", "higher",
        (recipe("LLM-Pruner", "recovered", "tasks"), recipe("dense", "pruned", "tasks")),
        (sheared("LLM-Pruner + LoRA", 0.2), sheared("dense", 0.0)),
        "The dense SmolLM2 is near the 36% of guessing, and the world's questions are nearly saturated.", 0.93,
    ),
    Claim(
        "LLM-Pruner", "Without a fifth of its parameters, the model runs faster.",
        "58.6 s against 69.3 s", L7, "time of one evaluation", "lower",
        None, None, "No table here has times of the recipe's cut beside the dense model on a quiet machine.",
    ),
    Claim(
        "LoRAShear", "With 20% gone, LoRAShear has a higher accuracy than LLM-Pruner.",
        "62.22 against 59.82", L1, SEVEN, "higher",
        (recipe("LoRAShear", "recovered", "tasks"), recipe("LLM-Pruner", "recovered", "tasks")),
        (sheared("LoRAShear", 0.2), sheared("LLM-Pruner + LoRA", 0.2)), FAR_MORE,
    ),
    Claim(
        "LoRAShear", "With 50% gone, LoRAShear has a higher accuracy than LLM-Pruner.",
        "51.63 against 48.88", L1, SEVEN, "higher",
        None, (sheared("LoRAShear", 0.5), sheared("LLM-Pruner + LoRA", 0.5)), FAR_MORE,
    ),
    Claim(
        "LoRAShear", "With 20% gone, LoRAShear has 98% of the dense model's accuracy.",
        "62.22 of 63.25", L1, f"{SEVEN}, beside 98% of the dense model's", "higher",
        (recipe("LoRAShear", "recovered", "tasks"), recipe("dense", "pruned", "tasks")),
        (sheared("LoRAShear", 0.2), sheared("dense", 0.0)), FAR_MORE, 0.98,
    ),
    Claim(
        "LoRAShear", "With 20% gone, LoRAShear has a higher accuracy than LoRAPrune.",
        "62.22 against 60.05", L1, SEVEN, "higher", None, None, "LoRAPrune is not among the recipes here.",
    ),
    Claim(
        "LoRAShear", "Training on pretraining text first, then on instructions, beats instructions alone.",
        "62.22 against 60.63", f"{L1}, 20% gone", SEVEN, "higher",
        None, None, "Instructions alone were not measured; notebook 08b compares mixtures of text on the world.",
    ),
    Claim(
        "LoRAShear", "The first few layers matter more than those in the middle.",
        "stated without a figure", L1, ALONE, "higher",
        (alone(0, 1, 2, 3), alone(*range(4, 28))), None,
        "The first four and last two layers are those that LLM-Pruner spares; the world's map is not stored.",
    ),
    Claim(
        "LoRAShear", "The last few layers matter more than those in the middle.",
        "stated without a figure", L1, ALONE, "higher",
        (alone(28, 29), alone(*range(4, 28))), None,
        "The first four and last two layers are those that LLM-Pruner spares; the world's map is not stored.",
    ),
    Claim(
        "HyWIA", "With 20% gone, the fused score gives a higher accuracy than LLM-Pruner's.",
        "+1.1 points", "LLaMA-7B", "mean accuracy: the papers' seven tasks; of the world, all eleven", "higher",
        (recipe("HyWIA", "recovered", "tasks"), recipe("LLM-Pruner", "recovered", "tasks")),
        (quality("HyWIA attention", 0.2, "recovered", "mean_accuracy"),
         quality("element", 0.2, "recovered", "mean_accuracy")), CHANCE,
    ),
    Claim(
        "HyWIA", "The gain is there on other families too.",
        "+1.02, +2.0 and +1.2 points", "Vicuna-7B, Baichuan-7B, Bloom-7b1", "mean accuracy", "higher",
        None, None, "Both models here are of the LLaMA family.",
    ),
    Claim(
        "HyWIA", "With 50% gone, the fused score gives a higher accuracy than LLM-Pruner's.",
        "+2.82 points", "LLaMA-7B", "mean accuracy of the world's eleven tasks", "higher",
        None, (quality("HyWIA attention", 0.5, "recovered", "mean_accuracy"),
               quality("element", 0.5, "recovered", "mean_accuracy")),
        "The paper's rule of fusion is not public; ours is a reconstruction, and all layers are cut alike here.",
    ),
    Claim(
        "SparseLLM", "With 80% zeros, an OPT by SparseLLM has a lower perplexity than by SparseGPT.",
        "15.61 against 16.49", OPT, PERPLEXITY, "lower", None, zeros("opt", "80%"), TOY,
    ),
    Claim(
        "SparseLLM", "With 90% zeros, an OPT by SparseLLM has a lower perplexity than by SparseGPT.",
        "3051 against 5748", OPT, PERPLEXITY, "lower", None, zeros("opt", "90%"), TOY,
    ),
    Claim(
        "SparseLLM", "With three zeros of every four, an OPT by SparseLLM has a lower perplexity than by SparseGPT.",
        "51.3 against 441", OPT, PERPLEXITY, "lower", None, zeros("opt", "3 of 4 zero"), TOY,
    ),
    Claim(
        "SparseLLM", "With 90% zeros, a LLaMA by SparseLLM has a lower perplexity than by SparseGPT.",
        "225 against 345", L2_7, PERPLEXITY, "lower", None, zeros("world", "90%"), TOY,
    ),
    Claim(
        "SparseLLM", "With three zeros of every four, a LLaMA by SparseLLM has a lower perplexity than by SparseGPT.",
        "64.2 against 68.3", L2_7, PERPLEXITY, "lower", None, zeros("world", "3 of 4 zero"), TOY,
    ),
    Claim(
        "Accuracy predictor", "What the predictor finds has a lower perplexity on WikiText-2 than its baseline.",
        "−9.48%", "not stated in the abstract", PERPLEXITY, "lower",
        (recipe("predictor", "pruned", "wikitext2"), real(SPARED)), searched("perplexity"), SEARCH,
    ),
    Claim(
        "Accuracy predictor", "What the predictor finds has a lower perplexity on PTB than its baseline.",
        "−5.76%", "not stated in the abstract", "perplexity on PTB", "lower",
        (recipe("predictor", "pruned", "ptb"), real(SPARED, "ptb")), None, SEARCH,
    ),
    Claim(
        "Accuracy predictor", "What the predictor finds has a higher accuracy on MMLU than its baseline.",
        "+6.28%", "not stated in the abstract", "mean accuracy of the world's eleven tasks, in place of MMLU", "higher",
        None, searched("mean"), "MMLU was not measured on SmolLM2; the world's eleven tasks stand for it.",
    ),
    Claim(
        "Accuracy predictor", "After fine-tuning, what the predictor found is still better than its baseline.",
        "−9.48%, before or after is not stated", "not stated in the abstract", PERPLEXITY, "lower",
        (recipe("predictor", "recovered", "wikitext2"), recipe("LLM-Pruner", "recovered", "wikitext2")), None,
        "The predictor's cut is smaller by 1.5 points, and spares no layer by rule.",
    ),
)  # fmt: skip
