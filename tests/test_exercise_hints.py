"""The checks of the exercises answer typical mistakes by a hint of their own, and not by the general one."""

import math
import runpy
import statistics
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "notebooks" / "exercises"


@cache
def exercise(number):
    return runpy.run_path(str(FOLDER / f"ex_{number}.py"))


def lowest(values, k):
    return sorted(range(len(values)), key=values.__getitem__)[:k]


def svd_of(change, rank, power=1):
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    return (left[:, :rank] * sizes[:rank] ** power) @ right[:rank]


def unit_score(order, reduce=None):
    reductions = {"sum": sum, "max": max, "prod": math.prod}
    return lambda slices, how, by: (reduce or reductions[by])([order(how, part) for part in slices])


def sized(how, part):
    return part.sum().abs() if how == "vector" else part.abs().sum()


def steps_of(n, batch, epochs):
    return epochs * math.ceil(n / batch)


def shares_of(hits):
    return sum(hits) / len(hits)


def differences(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def refit(x, missing, strength):
    gram = x.T @ x
    return torch.linalg.solve(gram + strength * torch.diag(gram.diagonal()), x.T @ missing)


def ridge_everywhere(x, missing, strength):
    gram = x.T @ x
    return torch.linalg.solve(gram + strength * torch.diag(gram), x.T @ missing)


def best_kept(scores, n):
    return sorted(lowest((-scores).tolist(), n))


def damage(table, share, how="mean", up=math.ceil):
    change = table.groupby("group")["change"].agg(how).sort_values(ascending=False)
    return change.index[: up(share * len(change))].tolist()


def pattern(scores, weight, n_zeros, of):
    """Weights with so many zeros in every `of` of a row."""
    runs = scores.unflatten(1, (-1, of))
    zeros = torch.zeros_like(runs, dtype=torch.bool).scatter(2, runs.topk(n_zeros, largest=False).indices, True)
    return weight.masked_fill(zeros.flatten(1, 2), 0)


def divergence(first, second):
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def mean_of(values):
    return statistics.mean(list(values))


def attention_of(coarse, fine, *, scaled=True, counted=True, mean_of=0):
    both = torch.stack([coarse, fine]).double()
    both = both / both.mean(1, keepdim=True) if scaled else both
    return torch.softmax(both @ both.T / (both.shape[1] if counted else 1), -1).mean(mean_of).tolist()


def falls(dense, without, least):
    return sorted((u for u, value in without.items() if dense - value >= least), key=lambda u: without[u])


def mean_ablated(inputs, calibration, units, *, copy=True):
    found = inputs.clone() if copy else inputs
    found[..., list(units)] = calibration.flatten(0, -2).mean(0)[list(units)]
    return found


def bootstrap(first, second, n, seed, *, apart=False, replace=True, ends=(0.025, 0.975)):
    """Limits for the mean of first − second."""
    rng = np.random.default_rng(seed)
    if apart:
        means = [rng.choice(first, len(first)).mean() - rng.choice(second, len(second)).mean() for _ in range(n)]
    else:
        means = [rng.choice(first - second, len(first), replace=replace).mean() for _ in range(n)]
    return [float(np.quantile(means, end)) for end in ends]


def half_space(x, update, remaining, stays):
    trial = x + update - (x + update) @ x / (x.norm() * remaining) * x / x.norm()
    return trial if stays(trial) else torch.zeros_like(x)


def mixed(gaps, tau, beta):
    powers = [math.exp(gap / tau) for gap in gaps]
    return [(1 - beta) * power / sum(powers) + beta / len(gaps) for power in powers]


# (number, name) → (what a learner writes, a part of the hint; `|` separates parts of which one must be there)
MISTAKES = {
    ("00", "channel_parameters"): [
        (lambda d_model, d_ff: d_model, "one row of one matrix"),
        (lambda d_model, d_ff: 2 * d_model, "two of the three"),
        (lambda d_model, d_ff: 3 * d_model * d_ff, "all channels together"),
        (lambda d_model, d_ff: 3 * d_ff, "not d_ff"),
    ],
    ("00", "count_right"): [
        (lambda a, t: sum(x in t for x in a), "anywhere among"),
        (lambda a, t: sum(y in x for x, y in zip(a, t, strict=True)), "part of a text"),
        (lambda a, t: a == t, "as a whole"),
        (lambda a, t: sum(x != y for x, y in zip(a, t, strict=True)), "wrong answers"),
        (lambda a, t: sum(x == y for x, y in zip(a, t, strict=True)) / len(a), "the share"),
    ],
    ("00", "share_won_back"): [
        (lambda dense, cut, back: max(0.0, (sum(back) - sum(cut)) / (sum(dense) - sum(cut))), "below 0"),
        (lambda dense, cut, back: min(1.0, (sum(back) - sum(cut)) / (sum(dense) - sum(cut))), "above 1"),
        (lambda d, c, r: sum(r) / sum(d), "did nothing should score 0"),
        (lambda d, c, r: sum(r) - sum(c), "in points"),
        (lambda d, c, r: (sum(d) - sum(r)) / (sum(d) - sum(c)), "still missing"),
        (lambda d, c, r: statistics.mean((z - y) / (x - y) for x, y, z in zip(d, c, r, strict=True)), "mean of each"),
    ],
    ("02", "unit_score"): [
        (lambda slices, how, by: abs(sum(part.sum() for part in slices)), "cancel each other"),
        (lambda slices, how, by: sum(part.sum() for part in slices), "negative"),
        (unit_score(lambda how, part: sized("element" if how == "vector" else "vector", part)), "wrong way round"),
        (unit_score(lambda how, part: part.abs().sum()), "Both granularities"),
        (unit_score(sized, sum), "reduction is not used"),
    ],
    ("02", "beyond_chance"): [
        (lambda common, kept: common / kept, "A ratio to chance"),
        (lambda common, kept: (1 - common) / (1 - kept), "other way"),
        (lambda common, kept: common, "does not use `kept`"),
        (lambda common, kept: (common - kept) / kept, "At 50% kept"),
    ],
    ("02", "interaction"): [
        (lambda dense, a, b, both: both - dense, "together"),
        (lambda dense, a, b, both: a + b - both - dense, "turned round"),
        (lambda dense, a, b, both: both - max(a, b), "more costly"),
        (lambda dense, a, b, both: (both - dense) / (a + b - 2 * dense), "difference, in nats"),
    ],
    ("04", "largest_rank"): [
        (lambda d_in, d_out: d_in * d_out // (d_in + d_out), "exactly as many"),
        (lambda d_in, d_out: d_in * d_out, "number of weights"),
        (lambda d_in, d_out: d_in + d_out, "one rank costs"),
        (lambda d_in, d_out: max(d_in, d_out), "more than the rank"),
    ],
    ("04", "peak_rate"): [
        (lambda n, batch, epochs, warmup, rate: rate * steps_of(n, batch, epochs) / warmup, "first step has rate 0"),
        (lambda n, batch, epochs, warmup, rate: rate * (steps_of(n, batch, 1) - 1) / warmup, "one epoch"),
        (lambda n, batch, epochs, warmup, rate: rate * (n // batch * epochs) / warmup, "round the batches down"),
        (lambda n, batch, epochs, warmup, rate: rate * (steps_of(n, batch, epochs) - 1) / warmup, "does not rise"),
    ],
    ("04", "nearest_of_rank"): [
        (lambda change, rank: change.zero_(), "has changed"),
        (lambda change, rank: svd_of(change, rank, 0), "values are missing"),
        (lambda change, rank: svd_of(change, rank, 2), "in it twice"),
        (lambda change, rank: change - svd_of(change, rank), "left over"),
        (lambda change, rank: torch.linalg.svd(change, full_matrices=False)[0][:, :rank], "Multiply the parts"),
        (lambda change, rank: change, "Nothing was left out"),
    ],
    ("05", "right_share"): [
        (lambda logs, i: math.exp(logs[i]), "likelihood of the choice"),
        (lambda logs, i: 1 / len(logs), "chance"),
        (lambda logs, i: math.exp(logs[i]) / sum(map(math.exp, logs)), "exp(-1000)"),
        (lambda logs, i: logs[i] - math.log(sum(map(math.exp, logs))), "logarithm of the share"),
    ],
    ("05", "pick"): [
        (lambda logs, choices, normalize: logs.index(max(logs)), "per character"),
        (lambda logs, choices, normalize: logs.index(min(logs)), "least likely"),
        (
            lambda logs, choices, normalize: lowest([-x / len(c) for x, c in zip(logs, choices, strict=True)], 1)[0],
            "`normalize` is False",
        ),
        (
            lambda logs, choices, normalize: lowest(
                [-x / (len(c) if normalize else 1) for x, c in zip(logs, choices, strict=True)], 1
            )[0],
            "White space",
        ),
    ],
    ("05", "paired_error"): [
        (lambda a, b: statistics.pstdev(differences(a, b)), "standard deviation of a difference"),
        (lambda a, b: shares_of(a) - shares_of(b), "difference of the two accuracies"),
        (lambda a, b: statistics.pvariance(differences(a, b)) / len(a), "Take the root"),
        (lambda a, b: statistics.pstdev(differences(a, b)) / len(a), "once too often"),
    ],
    ("07", "heads_needed"): [
        (lambda falls, share: len([x for x in falls if x > 0]), "all heads that cost"),
        (
            lambda falls, share: next(k for k in range(1, 9) if sum(sorted(falls)[::-1][:k]) >= share * sum(falls)),
            "-10",
        ),
        (
            lambda falls, share: next(
                k for k in range(9) if sum(sorted(falls)[::-1][: k + 1]) >= share * sum(x for x in falls if x > 0)
            ),
            "one head too early",
        ),
        (lambda falls, share: share * sum(x for x in falls if x > 0), "sum that must be reached"),
    ],
    ("07", "expected_both"): [
        (lambda a, b: min(sum(a), sum(b)), "the most that it can be"),
        (lambda a, b: shares_of(a) * shares_of(b), "share of all facts"),
        (lambda a, b: sum(a) * sum(b), "two numbers of facts"),
        (lambda a, b: sum(map(max, a, b)), "one way or the other"),
    ],
    ("09", "break_even"): [
        (lambda bits, index: bits / (bits + index), "weights that stay"),
        (lambda bits, index: index / bits, "ratio of the two"),
        (lambda bits, index: bits + index, "one weight in the list"),
        (lambda bits, index: 0.5, "as many bits as a value"),
    ],
    ("09", "cheapest_zero"): [
        (lambda row, h: int((row.square() * h.diagonal()).argmin()), "nothing else moves"),
        (lambda row, h: int((1 / torch.linalg.inv(h).diagonal()).argmin()), "Return|another one|right for one row"),
        (lambda row, h: int((row.abs() / torch.linalg.inv(h).diagonal()).argmin()), "Square the weight"),
        (lambda row, h: float((row.square() / torch.linalg.inv(h).diagonal()).min()), "number of one weight"),
    ],
    ("10", "scaled"): [
        (lambda shares, sizes, want: [want / sum(sizes)] * len(shares), "Keep the proportions"),
        (lambda shares, sizes, want: [x * want / sum(sizes) for x in shares], "size of the model"),
        (lambda shares, sizes, want: [x * 160 / want for x in shares], "upside down"),
        (lambda shares, sizes, want: [0.5 * x * n for x, n in zip(shares, sizes, strict=True)], "Return shares"),
    ],
    ("10", "best_found"): [
        (lambda p, m, k: len(set(lowest(p, k)) & set(lowest(m, k))), "Return the share"),
        (lambda p, m, k: len(set(lowest(p, k)) & set(lowest(m, k))) / len(p), "Divide by k"),
        (lambda p, m, k: sum(a == b for a, b in zip(lowest(p, k), lowest(m, k), strict=True)) / k, "place by place"),
        (
            lambda p, m, k: len(set(lowest(p, len(p))[-k:]) & set(lowest(m, len(m))[-k:])) / k,
            "highest values",
        ),
    ],
    ("11", "is_plain"): [
        (lambda widths, heads: len(set(widths)) == 1, "not the heads"),
        (lambda widths, heads: widths[0] == widths[-1], "between the first"),
        (lambda widths, heads: widths[0] == widths[1] and len(set(heads)) == 1, "last layer has another"),
        (lambda widths, heads: len(set(widths)), "True or False"),
    ],
    ("11", "choose"): [
        (lambda ppl, plain, sizes, limit: lowest(ppl, 1)[0], "not plain"),
        (lambda ppl, plain, sizes, limit: sizes.index(min(sizes)), "smallest one"),
        (lambda ppl, plain, sizes, limit: 1, "larger than the limit"),
        (
            lambda ppl, plain, sizes, limit: min(
                [i for i in range(len(ppl)) if plain[i] and sizes[i] <= limit], key=ppl.__getitem__
            ),
            "return -1",
        ),
    ],
    ("12", "written_shares"): [
        (lambda a, down, c: a * down[c], "Divide by their sum"),
        (lambda a, down, c: down[c] / down[c].sum(), "shares of the weights"),
        (lambda a, down, c: a * down[0] / (a * down[0]).sum(), "another channel"),
        (lambda a, down, c: (a * down[c]).abs() / (a * down[c]).abs().sum(), "no absolute values"),
    ],
    ("12", "gap_closed"): [
        (lambda ub, cb, ua, ca: 1 - (ca - ua) / (cb - ub), "take their logarithms"),
        (lambda ub, cb, ua, ca: math.log(cb / ca) / math.log(cb / ub), "same moment"),
        (lambda ub, cb, ua, ca: math.log(cb / ub) - math.log(ca / ua), "Which share"),
        (lambda ub, cb, ua, ca: ca / ua, "ratio of gaps"),
    ],
    ("01", "pairs_within_heads"): [
        (lambda n, d: [(i, i) for i in range(n)], "No two different"),
        (lambda n, d: [(i, i + 1) for i in range(n - 1)], "one head to the next"),
        (lambda n, d: [(i, i % (n // d)) for i in range(n)], "same place in all heads"),
        (lambda n, d: [(i, i + 1) for i in range(n)], "not there"),
        (lambda n, d: [(i, i + d) for i in range(n - d)], "different heads"),
    ],
    ("01", "norm_factor"): [
        (lambda before, after: math.isqrt(before // after), "round nothing"),
        (lambda before, after: math.sqrt(after / before), "Upside down: the cut"),
        (lambda before, after: before / after, "square root too"),
        (lambda before, after: after / before, "Upside down, and"),
        (lambda before, after: 1.0, "changes nothing"),
    ],
    ("01", "query_rows"): [
        (lambda u, heads, kv, d: list(range(u * d, (u + 1) * d)), "query head 1 alone"),
        (lambda u, heads, kv, d: [h * d + i for h in range(u, heads, kv) for i in range(d)], "stride apart"),
        (lambda u, heads, kv, d: list(range(u * heads // kv, (u + 1) * heads // kv)), "numbers of heads"),
    ],
    ("03", "entries_gone"): [
        (lambda rows, columns, r, c: r * columns + c * rows, "counted twice"),
        (lambda rows, columns, r, c: (rows - r) * (columns - c), "many entries stay"),
        (lambda rows, columns, r, c: r * c, "meet"),
    ],
    ("03", "keep_units"): [
        (lambda scores, fraction, to: best_kept(scores.neg_().neg(), 8), "have changed"),
        (lambda scores, fraction, to: lowest((-scores).tolist(), round(len(scores) * fraction)), "what goes"),
        (
            lambda scores, fraction, to: lowest(scores.tolist(), len(scores) - int(len(scores) * fraction)),
            "lowest first",
        ),
        (
            lambda scores, fraction, to: sorted(
                lowest((-scores).tolist(), (len(scores) - int(len(scores) * fraction)) // to * to)
            ),
            "round up",
        ),
        (lambda scores, fraction, to: lowest((-scores).tolist(), 8), "wrong order"),
        (
            lambda scores, fraction, to: best_kept(scores, -(-round(len(scores) * (1 - fraction)) // to) * to),
            "3 go and 7",
        ),
    ],
    ("03b", "refit_layer"): [
        (lambda x, w, x_gone, w_gone, strength: w, "as they were"),
        (lambda x, w, x_gone, w_gone, strength: refit(x, x_gone @ w_gone, strength), "fit alone"),
        (lambda x, w, x_gone, w_gone, strength: w + refit(x, x_gone @ w_gone, 0.0), "λ is missing"),
        (lambda x, w, x_gone, w_gone, strength: w - refit(x, x_gone @ w_gone, strength), "not subtracted"),
        (lambda x, w, x_gone, w_gone, strength: refit(x, x @ w + x_gone @ w_gone, strength), "shrinks W too"),
        (lambda x, w, x_gone, w_gone, strength: w + ridge_everywhere(x, x_gone @ w_gone, strength), "a second time"),
    ],
    ("03b", "bias"): [
        (lambda x_gone, w_gone: (x_gone @ w_gone).mean(1), "each token"),
        (lambda x_gone, w_gone: -(x_gone @ w_gone).mean(0), "turned round"),
        (lambda x_gone, w_gone: (x_gone @ w_gone).sum(0), "sum over tokens"),
        (lambda x_gone, w_gone: x_gone.mean(0), "should be"),
    ],
    ("07", "unprunable_groups"): [
        (lambda table, share: damage(table[table["ratio"] < 1], share)[::-1], "largest damage comes first"),
        (lambda table, share: damage(table, share), "without ratio 1"),
        (lambda table, share: damage(table[table["ratio"] < 1], share, "max"), "not one value"),
        (lambda table, share: damage(table[table["ratio"] < 1], share, up=int), "rounded up"),
    ],
    ("09", "wanda_pattern"): [
        (lambda w, squares, kept, of: pattern(w.abs(), w, kept, of), "you keep three"),
        (lambda w, squares, kept, of: pattern(w.abs(), w, of - kept, of), "squares is not used"),
        (lambda w, squares, kept, of: pattern(w.abs() * squares, w, of - kept, of), "take the root"),
    ],
    ("10", "front"): [
        (lambda costs, values: list(range(len(costs)))[::-1], "begin with the cheapest"),
        (lambda costs, values: lowest(costs, len(costs))[2:], "cheapest one of all"),
        (lambda costs, values: lowest(list(zip(costs, values, strict=True)), len(costs)), "cheaper and better"),
    ],
    ("11", "filling"): [
        (lambda widths, d_model: sum(max(widths) - n for n in widths), "How many numbers"),
        (lambda widths, d_model: sum(max(widths) - n for n in widths) * d_model, "three matrices"),
        (lambda widths, d_model: 3 * d_model * sum(widths), "parameters left"),
        (lambda widths, d_model: 3 * d_model * len(widths) * max(widths), "as a whole"),
    ],
    ("12", "real_cost"): [
        (lambda scores, losses, k: sum(sorted(losses)[:k]), "smallest losses"),
        (lambda scores, losses, k: sum(sorted(scores)[:k]), "added up scores"),
        (lambda scores, losses, k: sum(losses), "all heads"),
        (lambda scores, losses, k: sum(losses[i] for i in lowest(scores, len(scores))[-k:]), "highest scores"),
    ],
    ("13", "divergence"): [
        (lambda teacher, student: (teacher.softmax(-1) * (teacher - student)).sum(-1), "not log-probabilities"),
        (lambda teacher, student: divergence(student, teacher), "weights in the sum"),
        (lambda teacher, student: -divergence(teacher, student), "never negative"),
    ],
    ("13", "gigabytes"): [
        (lambda places, k: 8 * places / 1e9, "not one"),
        (lambda places, k: 8 * k * places / 1e6, "megabytes"),
        (lambda places, k: 4 * k * places / 1e9, "4 bytes"),
    ],
    ("14", "block_influence"): [
        (lambda a, b: 1 - torch.cosine_similarity(a.mean((0, 1)), b.mean((0, 1)), dim=-1), "average the streams"),
        (lambda a, b: torch.cosine_similarity(a, b, dim=-1).mean(), "mean cosine"),
        (lambda a, b: 1 - torch.cosine_similarity(a, b, dim=-1), "average over all tokens"),
    ],
    ("14", "layers_to_remove"): [
        (lambda layers, share: int(layers * (1 - share)), "Round up"),
        (lambda layers, share: round(layers * share - 0.01), "stay"),
        (lambda layers, share: layers, "solve"),
    ],
    ("06", "equal_totals"): [
        (lambda coarse, fine: (0.2, 0.8), "wrong way round"),
        (lambda coarse, fine: (0.5, 0.5), "make them equal"),
        (lambda coarse, fine: (1 / float(coarse.mean()), 1 / float(fine.mean())), "divide both by their sum"),
        (lambda coarse, fine: float(fine.mean() / (coarse + fine).mean()), "return two numbers"),
    ],
    ("06", "attention_rule"): [
        (lambda coarse, fine: attention_of(coarse, fine, mean_of=1), "Half each"),
        (lambda coarse, fine: attention_of(coarse, fine, scaled=False), "divide each by its mean"),
        (lambda coarse, fine: attention_of(coarse, fine)[::-1], "wrong way round"),
        (lambda coarse, fine: attention_of(coarse, fine, counted=False), "number of units"),
    ],
    ("06", "mean_excess"): [
        (
            lambda fused, coarse, fine: mean_of(f - min(c, e) for f, c, e in zip(fused, coarse, fine, strict=True)),
            "the logarithm of each",
        ),
        (
            lambda fused, coarse, fine: mean_of(math.log(f / c) for f, c in zip(fused, coarse, strict=True)),
            "with coarse alone",
        ),
        (
            lambda fused, coarse, fine: mean_of(math.log(f / e) for f, e in zip(fused, fine, strict=True)),
            "with fine alone",
        ),
        (
            lambda fused, coarse, fine: mean_of(
                math.log(f / max(c, e)) for f, c, e in zip(fused, coarse, fine, strict=True)
            ),
            "worse estimate",
        ),
        (
            lambda fused, coarse, fine: (
                -mean_of(math.log(f / min(c, e)) for f, c, e in zip(fused, coarse, fine, strict=True))
            ),
            "sign",
        ),
        (
            lambda fused, coarse, fine: (
                3 * mean_of(math.log(f / min(c, e)) for f, c, e in zip(fused, coarse, fine, strict=True))
            ),
            "sum over",
        ),
    ],
    ("07b", "needed_units"): [
        (
            lambda dense, without, least: [unit for unit, value in without.items() if value - dense >= least],
            "dense − value",
        ),
        (lambda dense, without, least: falls(dense, without, least + 0.8), "is it ≥ least"),
        (lambda dense, without, least: falls(dense, without, least)[::-1], "the order is not"),
        (lambda dense, without, least: falls(dense, without, 1.0), "use `least`"),
    ],
    ("07b", "mean_ablated"): [
        (lambda inputs, calibration, units: mean_ablated(inputs, calibration, units, copy=False), "inputs.clone()"),
        (lambda inputs, calibration, units: mean_ablated(inputs, calibration, range(6)), "only to [..., units]"),
        (lambda inputs, calibration, units: mean_ablated(inputs, 0 * calibration, units), "zero ablation"),
        (lambda inputs, calibration, units: mean_ablated(inputs, calibration[:1], units), "mean is not right"),
    ],
    ("07b", "moved_interval"): [
        (lambda first, second, n, seed: bootstrap(second, first, n, seed, apart=True), "not each model apart"),
        (lambda first, second, n, seed: bootstrap(first, second, n, seed), "which way round"),
        (lambda first, second, n, seed: bootstrap(second, first, n, seed, ends=(0.25, 0.75)), "2.5% on each side"),
        (lambda first, second, n, seed: bootstrap(second, first, n, seed)[::-1], "lower limit comes first"),
        (lambda first, second, n, seed: bootstrap(second, first, n, seed, replace=False), "with replacement"),
    ],
    ("08", "update_of_unit"): [
        (lambda a, b, scale, dim, index: scale * b @ a, "update of all of W"),
        (lambda a, b, scale, dim, index: scale * b @ a[:, index], "One row|A row needs"),
        (lambda a, b, scale, dim, index: b[index] @ a if dim == 0 else b @ a[:, index], "γ is missing"),
        (lambda a, b, scale, dim, index: scale * (b[0] @ a if dim == 0 else b @ a[:, 0]), "that part of γBA"),
    ],
    ("08", "half_space_step"): [
        (lambda x, update, remaining: x - x / remaining, "update is missing"),
        (lambda x, update, remaining: x + update - update @ x / x.norm() / remaining * x / x.norm(), "2.4, 3.2"),
        (lambda x, update, remaining: x + update - x / remaining, "a part of (x + update)"),
        (lambda x, update, remaining: half_space(x, update, remaining, lambda trial: True), "turns x round"),
        (lambda x, update, remaining: half_space(x, update, remaining, lambda trial: trial @ x > -1e-9), "last step"),
    ],
    ("08", "patch"): [
        (lambda gone, after, back, back_after: gone - after, "take their logarithms"),
        (lambda gone, after, back, back_after: math.log(gone / after), "subtract the gain with the units back"),
        (lambda gone, after, back, back_after: math.log(back / back_after), "must be subtracted"),
        (lambda gone, after, back, back_after: math.log(after / gone) - math.log(back_after / back), "sign"),
        (lambda gone, after, back, back_after: math.log(gone / after) + math.log(back / back_after), "do not add"),
    ],
    ("08b", "gap"): [
        (lambda cut, dense, n: mean_of((c - d) / k for c, d, k in zip(cut, dense, n, strict=True)), "counts as much"),
        (lambda cut, dense, n: sum(cut) - sum(dense), "divide by their number"),
        (lambda cut, dense, n: (sum(cut) - sum(dense)) / len(n), "not of documents"),
        (lambda cut, dense, n: (sum(dense) - sum(cut)) / sum(n), "sign"),
        (lambda cut, dense, n: sum(cut) / sum(n), "subtract that of the dense"),
    ],
    ("08b", "shares"): [
        (lambda gaps, tau, beta: [gap / sum(gaps) for gap in gaps], "in proportion"),
        (lambda gaps, tau, beta: mixed(gaps, 1.0, beta), "τ is missing"),
        (lambda gaps, tau, beta: mixed(gaps, 1 / tau, beta), "do not multiply"),
        (lambda gaps, tau, beta: mixed(gaps, tau, 0.0), "β is missing"),
        (lambda gaps, tau, beta: mixed(gaps, tau, 1 - beta), "wrong way round"),
        (lambda gaps, tau, beta: mixed(gaps, -tau, beta), "sign"),
        (lambda gaps, tau, beta: [1.2 * share for share in mixed(gaps, tau, beta)], "not to 1"),
        (lambda gaps, tau, beta: mixed([max(gap, 0) for gap in gaps], tau, beta), "below zero"),
    ],
    ("08b", "judge"): [
        (lambda before, after: [mean_of(after), max(after)], "gaps after training"),
        (lambda before, after: [mean_of(after) - mean_of(before), max(after) - max(before)], "sign"),
        (lambda before, after: [max(before) - max(after), mean_of(before) - mean_of(after)], "wrong way round"),
        (lambda before, after: [sum(before) - sum(after), max(before) - max(after)], "mean before minus mean after"),
        (lambda before, after: [mean_of(before) - mean_of(after), before[0] - after[0]], "worst before"),
    ],
    ("15", "times_control"): [
        (lambda recovered, dense, control: recovered / dense, "before training"),
        (lambda recovered, dense, control: control / recovered, "Upside down"),
        (lambda recovered, dense, control: recovered - control, "depends on the text"),
    ],
    ("15", "share_that_holds"): [
        (lambda found: found.count("holds") / len(found), "in the denominator"),
        (lambda found: found.count("holds"), "number of claims"),
        (lambda found: sum(x != "does not hold" for x in found) / len(found), "counts as one that holds"),
        (lambda found: sum("hold" in x for x in found) / len(found), "that was measured"),
    ],
    ("15", "is_clear"): [
        (lambda claimed, beside: max(claimed) <= min(beside), "the ranges touch"),
        (lambda claimed, beside: sum(claimed) < sum(beside), "means say yes"),
        (lambda claimed, beside: all(x < y for x, y in zip(claimed, beside, strict=True)), "seed by seed"),
        (lambda claimed, beside: min(claimed) > max(beside), "every value"),
        (lambda claimed, beside: max(claimed) < min(beside) or min(claimed) > max(beside), "wrong way round"),
    ],
}
CASES = [
    pytest.param(*exercise_name, wrong, part, id=f"{'-'.join(exercise_name)}-{number}")
    for exercise_name, mistakes in MISTAKES.items()
    for number, (wrong, part) in enumerate(mistakes)
]


@pytest.mark.parametrize(("number", "name", "wrong", "part"), CASES)
def test_a_typical_mistake_gets_its_own_hint(number, name, wrong, part):
    told = exercise(number)[f"check_{name}"](wrong)
    assert not told.startswith("✓") and any(option in told for option in part.split("|")), told


@pytest.mark.parametrize(("number", "name"), MISTAKES)
def test_mistakes_get_different_hints(number, name):
    check = exercise(number)[f"check_{name}"]
    told = {check(wrong) for wrong, _ in MISTAKES[number, name]}
    assert len(told) == len(MISTAKES[number, name]) >= 3
    assert check(lambda *arguments: 1e9) not in told  # the general hint
