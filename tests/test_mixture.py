"""Dynamic fine-tuning: what is drawn follows what was lost."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_calibration import tokenizer, words  # noqa: F401
from test_importance import tiny_llama
from test_recovery import counting

from prunekit.calibration import mean_loss
from prunekit.errors import PrunekitError
from prunekit.recovery import LoRA
from prunekit.recovery.mixture import Mixture, MixtureLog, _whole, recover_on_mixture
from prunekit.recovery.sources import join, open_sources, shuffle

QUICK = LoRA(r=4, alpha=8, max_steps=8, batch_size=4, learning_rate=1e-2, dropout=0.0)
SOURCES = {"ones": counting(24, step=1), "threes": counting(24, step=3)}


def trained():
    """A dense model that knows both sources, and a copy that has forgotten most of one of them."""
    from prunekit import recover

    both = torch.cat(list(SOURCES.values()))
    dense = recover(tiny_llama(), LoRA(r=8, max_steps=250, batch_size=16, learning_rate=2e-2, dropout=0.0), both)
    forgetful = recover(dense, LoRA(r=8, max_steps=60, batch_size=8, learning_rate=1e-2), SOURCES["ones"])
    return dense, forgetful


@pytest.fixture(scope="module")
def models():
    return trained()


@pytest.mark.slow
def test_the_source_that_lost_most_gets_most(models):
    dense, forgetful = models
    before = {name: p.clone() for name, p in forgetful.named_parameters()}
    longer = replace(
        QUICK, r=8, alpha=16, max_steps=160
    )  # in eight steps the gap falls on one processor, and rises on another
    recovered = recover_on_mixture(forgetful, dense, SOURCES, longer, Mixture(n_rounds=2, temperature=0.2))
    table = recovered.mixture_log.table()
    first = table[table["round"] == 1].set_index("source")
    assert first.loc["threes", "gap"] > first.loc["ones", "gap"] + 0.5
    assert first.loc["threes", "n_windows"] > 2 * first.loc["ones", "n_windows"] > 0
    assert table.groupby("round")["n_windows"].sum().tolist() == [320, 320, 0]
    last = table[table["round"] == 3].set_index("source")
    assert last.loc["threes", "gap"] < first.loc["threes", "gap"] - 0.1
    assert len(recovered.recovery_log.losses) == 160
    assert all(torch.equal(p, before[name]) for name, p in forgetful.named_parameters())


@pytest.mark.slow
def test_what_is_logged_is_what_was_measured(models):
    dense, forgetful = models
    recovered = recover_on_mixture(forgetful, dense, SOURCES, QUICK, Mixture(n_rounds=2))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    held = SOURCES["ones"][order][:4]
    rows = recovered.mixture_log.table().query("source == 'ones'").set_index("round")
    assert rows.loc[1, "loss"] == pytest.approx(mean_loss(forgetful, held))
    assert rows.loc[1, "dense"] == pytest.approx(mean_loss(dense, held))
    assert rows.loc[3, "loss"] == pytest.approx(mean_loss(recovered, held))
    assert rows.loc[1, "gap"] == pytest.approx(rows.loc[1, "loss"] - rows.loc[1, "dense"])


def test_uniform_sampling_is_the_control(models):
    dense, forgetful = models
    log = recover_on_mixture(forgetful, dense, SOURCES, QUICK, Mixture(n_rounds=2, uniform_share=1.0)).mixture_log
    assert set(log.table().query("n_windows > 0")["n_windows"]) == {8}


def test_what_is_measured_on_is_never_trained_on(models, monkeypatch):
    from prunekit.recovery import mixture

    dense, forgetful = models
    trained_on, held = [], []
    real, real_loss = mixture.recover, mixture.mean_loss
    monkeypatch.setattr(mixture, "recover", lambda m, how, t, **o: trained_on.append(t) or real(m, how, t, **o))
    monkeypatch.setattr(mixture, "mean_loss", lambda m, t: held.append(t) or real_loss(m, t))
    recover_on_mixture(forgetful, dense, SOURCES, QUICK, Mixture(n_rounds=2))
    rows = {tuple(row.tolist()) for windows in trained_on for row in windows.tokens}
    assert rows
    assert not rows & {tuple(row.tolist()) for tokens in held for row in tokens}


@pytest.mark.slow
def test_the_same_seed_draws_the_same(models):
    dense, forgetful = models
    a, b = (recover_on_mixture(forgetful, dense, SOURCES, QUICK, Mixture(n_rounds=2, seed=4)) for _ in range(2))
    assert a.mixture_log == b.mixture_log
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@given(st.lists(st.floats(-1, 5), min_size=1, max_size=8), st.floats(0, 1), st.floats(0.01, 10))
def test_shares_sum_to_one_follow_the_gaps_and_keep_some_of_each(gaps, beta, tau):
    shares = Mixture(uniform_share=beta, temperature=tau).shares(torch.tensor(gaps, dtype=torch.float64))
    assert float(shares.sum()) == pytest.approx(1)
    assert bool((shares >= beta / len(gaps) - 1e-12).all())
    order = torch.tensor(gaps, dtype=torch.float64).argsort()
    assert bool((shares[order].diff() >= -1e-12).all())


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8), st.integers(0, 200))
def test_shares_become_whole_windows(shares, total):
    shares = torch.tensor(shares, dtype=torch.float64)
    shares = shares / shares.sum()
    counts = _whole(shares, total)
    assert sum(counts) == total
    assert all(abs(n - float(s) * total) < 1 for n, s in zip(counts, shares, strict=True))


def test_stages_follow_each_other_in_the_log():
    rows = tuple({"round": n, "source": "a", "gap": 1.0 / n, "n_windows": 4 * (2 - n)} for n in (1, 2))
    log = MixtureLog(rows) + MixtureLog(rows)
    assert log.table()["round"].tolist() == [1, 2, 3, 4]
    assert "2 rounds over 1 sources; mean gap 1.000 → 0.500" in repr(log)
    assert "<table" in log._repr_html_()
    assert MixtureLog(()) + log == log
    assert "nothing" in repr(MixtureLog(())) + MixtureLog(())._repr_html_()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "sources are empty; give at least one as a mapping"),
        ("text", "sources='text' is not allowed; give a dictionary"),
        (["one.txt", "two.txt"], "sources\\[0\\]='one.txt' is not allowed"),
        ({"empty": ""}, "source 'empty'"),
        ({"ones": SOURCES["ones"], "one": counting(1)}, "source 'one' has 12 tokens in 1 pieces"),
        ({"ones": SOURCES["ones"], "text": "no tokenizer"}, "source 'text'.*tokenizer"),
        ({"strange": torch.full((4, 12), 99)}, "source 'strange'.*token ids"),
        ({"real": torch.rand(4, 12)}, "source 'real'.*give integers"),
        ({"flat": torch.arange(12)}, "source 'flat'.*give integers"),
    ],
)
def test_sources_that_cannot_be_are_refused(sources, message):
    with pytest.raises(PrunekitError, match=message):
        recover_on_mixture(tiny_llama(), tiny_llama(), sources, QUICK)


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_rounds", 0), ("uniform_share", 1.1), ("uniform_share", -0.1), ("temperature", 0.0), ("temperature", math.inf),
     ("n_validation", 0), ("n_rounds", True), ("temperature", "x")],
)  # fmt: skip
def test_mixtures_that_cannot_be_are_refused(name, value):
    with pytest.raises(PrunekitError, match=f"{name}={value!r}"):
        Mixture(**{name: value})


def test_what_is_no_method_is_refused():
    with pytest.raises(PrunekitError, match="is not allowed; give LoRA"):
        recover_on_mixture(tiny_llama(), tiny_llama(), SOURCES, Mixture())


def test_more_rounds_than_steps_are_refused():
    with pytest.raises(PrunekitError, match="n_rounds=9, but training has 8 steps"):
        recover_on_mixture(tiny_llama(), tiny_llama(), SOURCES, QUICK, Mixture(n_rounds=9))


def test_documents_of_several_sources_share_a_window():
    texts = {name: torch.full((40, 8), token) for token, name in enumerate(("a", "b"), 1)}
    opened = open_sources(texts, None, 8, tiny_llama())
    windows = join(shuffle([d for source in opened for d in source.draw(16)], seed=0), 16).tokens
    assert windows.shape == (16, 16)
    mixed = [bool((row == 1).any() and (row == 2).any()) for row in windows]
    assert 3 < sum(mixed) < 14


def test_every_document_comes_once_before_any_comes_again():
    rows = torch.arange(20)[:, None].repeat(1, 4)
    (source,) = open_sources({"a": rows}, None, 4, tiny_llama())
    first = [int(d[0, 0]) for d in source.draw(16)]
    assert len(set(first)) == 16 == source.n_windows
    assert [int(d[0, 0]) for d in source.draw(16)] == first
    assert not set(first) & set(source.validation[:, 0].tolist())


def test_long_documents_are_cut_and_short_ones_joined(tokenizer):  # noqa: F811
    text = {"long": " ".join([words(1, 45)] * 7), "short": [words(1, 9)] * 60}
    long, short = open_sources(text, tokenizer, 12, tiny_llama())
    assert {d.shape[1] for d in long.documents} <= set(range(1, 13))
    assert short.validation.shape[1] == long.validation.shape[1] == 12
