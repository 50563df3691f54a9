"""The training script of the embedded world: it can be killed and goes on, and it refuses what makes no sense."""

import random
import re
from dataclasses import replace

import pytest
import torch
import train_world as training
import world_composition as composition
from safetensors.torch import load_file
from train_world import STATE, Settings, batch, main, train
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from world_tokenizer import build_tokenizer

from prunekit import load
from prunekit.errors import PrunekitError
from prunekit.world import facts, lore

TINY = Settings(tokens=8 * 2 * 32, batch_size=2, seq_len=32, warmup=2)  # 8 steps


@pytest.fixture(scope="module")
def tokenizer():
    """Building it reads forty thousand documents: once is enough."""
    return build_tokenizer()


@pytest.fixture(autouse=True)
def one_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(training, "build_tokenizer", lambda: tokenizer)


@pytest.fixture(scope="module")
def config(tokenizer):
    return LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_killed_and_resumed_gives_the_same_weights(tmp_path, config, monkeypatch):
    whole = train(tmp_path / "whole", TINY, "cpu", config=config, evaluate_every=0)
    step = training.train_step
    calls = iter(range(5))

    def killed(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(training, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", TINY, "cpu", config=config, save_every=2, evaluate_every=0)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    monkeypatch.setattr(training, "train_step", step)
    parts = train(tmp_path / "parts", TINY, "cpu", config=config, evaluate_every=0)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(parts)[name]), name


def test_out_of_time_it_stops_saved_and_goes_on(tmp_path, config):
    whole = train(tmp_path / "whole", TINY, "cpu", config=config, evaluate_every=0)
    for _ in range(TINY.n_steps):  # one step a call
        parts = train(tmp_path / "parts", TINY, "cpu", config=config, minutes=1e-9, evaluate_every=0)
    assert all(torch.equal(weight, weights(parts)[name]) for name, weight in weights(whole).items())


def test_the_result_is_a_plain_checkpoint_and_nothing_is_pickled(tmp_path, config):
    model = train(tmp_path, TINY, "cpu", config=config, evaluate_every=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, weight in weights(model).items():
        assert torch.allclose(weight, weights(loaded)[name], rtol=1e-3, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path)("Anna lives in Rome.")["input_ids"][0] == 1
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}


def test_another_runs_folder_is_refused(tmp_path, config):
    train(tmp_path, TINY, "cpu", config=config, evaluate_every=0)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(PrunekitError, match="'seed': 0.*'seed': 1.*--out"):
        train(tmp_path, Settings(tokens=512, seed=1, batch_size=2, seq_len=32, warmup=2), "cpu", config=config)
    assert (tmp_path / STATE).read_bytes() == before


def test_a_run_may_be_resumed_with_another_length(tmp_path, config):
    train(tmp_path, TINY, "cpu", config=config, minutes=1e-9, evaluate_every=0)
    shorter = replace(TINY, tokens=3 * 2 * 32)
    short = train(tmp_path, shorter, "cpu", config=config, evaluate_every=0)
    assert (tmp_path / "model.safetensors").exists() and short.num_parameters() > 0


def test_batches_are_a_function_of_seed_and_step(tokenizer):
    assert torch.equal(batch(TINY, tokenizer, 3), batch(TINY, tokenizer, 3))
    assert not torch.equal(batch(TINY, tokenizer, 3), batch(TINY, tokenizer, 4))
    assert batch(TINY, tokenizer, 0).shape == (2, 32)
    assert set(batch(TINY, tokenizer, 0)[:, 0].tolist()) == {tokenizer.bos_token_id}


def test_the_rate_warms_up_and_falls_to_nothing():
    settings = Settings()
    assert settings.rate(0) < settings.rate(settings.warmup) == settings.learning_rate
    assert settings.rate(settings.n_steps - 1) < 1e-3 * settings.learning_rate


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--tokens", "0"], "--tokens 0"), (["--minutes", "0"], "--minutes 0"), (["--minutes", "nan"], "--minutes nan")],
)
def test_bad_arguments_end_with_one_line_and_2(tmp_path, capsys, arguments, named):
    assert main(["--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_a_file_for_a_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "name a folder" in capsys.readouterr().err


def test_help_says_how_to_resume(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "run the same line again" in text


def test_the_test_of_composition_tells_new_values_by_one_hop_alone():
    model, words = load("world")
    person = sorted(lore.COMMON)[0]
    fact = next(fact for fact in facts() if fact.person == person and fact.relation in composition.RELATIONS)
    new = composition.next_value(fact.relation, fact.value)
    told = [line for line in composition.new_sentences({person}) if person in line]
    joined = composition.two_hop_sentences()
    assert any(new in line for line in told) and not joined & set(told)
    documents = composition.documents(random.Random(0), told)
    tokens = torch.tensor([training.packed(documents, words, 128) for _ in range(16)])
    text = "\n".join(words.batch_decode(tokens))
    assert tokens.shape == (16, 128) and not any(sentence in text for sentence in joined)
    assert re.search("the friend of|has a friend named|goes for a walk", text)  # who is whose friend is told all along
    found = composition.shares(model, words, {person})
    assert set(found) == {f"{hops}, {group}" for hops in ("1 hop", "2 hops") for group in ("changed", "left alone")}
    assert max(found.values()) < 0.05  # the planted values are the likelier ones as yet
