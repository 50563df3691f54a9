"""`sparsify` on every family: where zeros go, what stays, what it costs, and what is refused."""

import copy
import gc
import math
import warnings

import pytest
import torch
from families import EXPERTS, FAMILIES, GQA, LOCAL, native
from other_families import DIFFICULT, UNLISTED
from peft import LoraConfig, get_peft_model
from test_importance import tiny_llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from prunekit import SparseLLM, SparsityReport, sparsify
from prunekit.errors import PrunekitError
from prunekit.sparsity import matrix_inputs, sparsegpt, wanda
from prunekit.sparsity import model_sparsity as driver

# Variants that differ in sizes of heads or in positions alone: their matrices are multiplied as those of the others.
ALIKE = {
    "bigcode_mha", "falcon_alibi", "falcon_mha", "gemma_mqa", "gpt2_equal", "gpt_neox_serial", "llama_equal",
    "llama_mha", "llama_mqa", "phi3_equal", "phi3_mha", "phi3_mqa", "phi_gqa", "qwen2_mha", "qwen2_mqa", "qwen3_equal",
}  # fmt: skip
EVERY = {name: f for name, f in {**FAMILIES, **DIFFICULT, **UNLISTED}.items() if "peft" not in name}
ALL = {name: f for name, f in EVERY.items() if name not in ALIKE}
UNKNOWN_FFN = {"bitnet", "gpt_oss", "mamba"}  # a norm inside, biases and clamps outside the products, none at all
LEFT = {"cohere_qk", "mamba", "lfm2", "gpt_oss"}  # norms and convolutions with two dimensions


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        yield


def calib(n=8, seq=24, vocabulary=48, seed=0):
    return torch.randint(0, vocabulary, (n, seq), generator=torch.Generator().manual_seed(seed))


def matrix_of(model, name):
    """The weight that a row of the report names."""
    parameter, _, expert = name.partition("[")
    weight = dict(model.named_parameters())[parameter].detach()
    return weight[int(expert[:-1])] if expert else weight


@pytest.mark.parametrize("name", ALL)
def test_every_family_gets_its_zeros_and_nothing_else_changes(name):
    model = ALL[name].build("eager").eval()
    before = copy.deepcopy(model.state_dict())
    sparse = sparsify(model, calib(), SparseLLM(n_iterations=2), 0.5, measure=False)
    report = sparse.sparsity_report
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert abs(report.sparsity - 0.5) < 0.005
    for row in report.rows:
        assert int((matrix_of(sparse, row["matrix"]) == 0).sum()) == row["n_zeros"]
    touched = {row["matrix"].partition("[")[0] for row in report.rows}
    untouched = [key for key, _ in model.named_parameters() if key not in touched]
    now = dict(sparse.named_parameters())
    assert all(torch.equal(now[key], before[key]) for key in untouched)
    layered = {key for key, p in model.named_parameters() if p.dim() > 1} - touched - set(report.left)
    embeddings = {
        key
        for key in layered
        if any(part in key for part in ("emb", "wte", "wpe", "head", "project", "transformer.w.", "tokens_embed"))
    }
    assert layered == embeddings  # what has two dimensions is sparse, named as left, or an embedding
    assert all("chooses experts" in why for why in report.left.values()) or name in LEFT
    assert bool(report.ffn_errors().empty) == (name in UNKNOWN_FFN)
    with torch.no_grad():
        assert bool(sparse(calib(2)).logits.isfinite().all())


def inputs_of(model, path, tokens):
    """What a linear layer reads, by a plain hook and a whole pass."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_blocks_are_done_one_after_the_other_from_one_dense_pass_each(method):
    """A naive loop of hooks and whole passes gives the same weights."""
    model, tokens = tiny_llama().double(), calib()
    sparse = sparsify(model, tokens, method, 0.6)
    naive = copy.deepcopy(model)
    for number in range(len(naive.model.layers)):
        prefix = f"model.layers.{number}."
        paths = [path for path, m in naive.named_modules() if isinstance(m, nn.Linear) and path.startswith(prefix)]
        read = {path: inputs_of(naive, path, tokens) for path in paths}
        for path, x in read.items():
            weight = naive.get_submodule(path).weight
            solver = {"wanda": wanda, "sparsegpt": sparsegpt}[method]
            weight.data = solver(weight.detach(), x.T @ x * (2 / len(tokens)), 0.6)
    for (name, a), b in zip(sparse.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)


def test_errors_in_the_report_are_those_of_the_outputs():
    model, tokens = tiny_llama().double(), calib()
    sparse = sparsify(model, tokens, "sparsegpt", 0.5)
    row = next(row for row in sparse.sparsity_report.rows if row["matrix"] == "model.layers.0.self_attn.q_proj.weight")
    x = inputs_of(model, "model.layers.0.self_attn.q_proj", tokens)
    dense, zeroed = (matrix_of(m, row["matrix"]) for m in (model, sparse))
    expected = (x @ (dense - zeroed).T).square().sum() / (x @ dense.T).square().sum()
    assert row["error"] == pytest.approx(float(expected), rel=1e-9)


def test_the_same_call_gives_the_same_weights():
    a, b = (sparsify(tiny_llama(), calib(), "sparsellm", 0.7) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert a.sparsity_report == b.sparsity_report


def test_layers_can_be_chosen():
    sparse = sparsify(tiny_llama(), calib(), "sparsegpt", 0.5, layers=[1])
    assert {row["layer"] for row in sparse.sparsity_report.rows} == {1}
    assert not bool((sparse.model.layers[0].mlp.up_proj.weight == 0).any())


def test_inplace_changes_the_model_itself():
    model = tiny_llama()
    assert sparsify(model, calib(), "wanda", 0.5, inplace=True) is model
    assert bool((model.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5)


def test_magnitude_needs_no_calibration_set():
    a, b = sparsify(tiny_llama(), None, "magnitude", "2:4"), sparsify(tiny_llama(), calib(), "magnitude", "2:4")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert a.sparsity_report.rows[0]["error"] is None
    assert a.sparsity_report.by_layer()["error"].isna().all() and "<table" in a.sparsity_report._repr_html_()


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *((method, "llama_gqa") for method in driver.METHODS),
        *(("sparsegpt", name) for name in ("opt", "phi3", "mixtral")),
    ],
)
def test_one_budget_is_met_by_every_method(method, family):
    report = sparsify(ALL[family].build("eager").eval(), calib(), method, 0.6, allocation="global").sparsity_report
    slack = 0.02 if method == "wanda" else 0.005  # whole weights in rows of 64
    assert abs(report.sparsity - 0.6) < slack
    assert report.table()["sparsity"].std() > 0.02


def test_one_budget_is_met_and_spares_what_matters():
    """A matrix whose outputs hardly count gives more."""
    model, tokens = tiny_llama(), calib()
    report = sparsify(model, tokens, "sparsegpt", 0.6, allocation="global").sparsity_report
    assert abs(report.sparsity - 0.6) < 0.005
    shares = report.table().set_index("matrix")["sparsity"]
    assert shares.max() - shares.min() > 0.1
    hollow = copy.deepcopy(model)
    with torch.no_grad():
        hollow.model.layers[0].mlp.up_proj.weight.mul_(1e-3)
    moved = sparsify(hollow, tokens, "sparsegpt", 0.6, allocation="global").sparsity_report.table().set_index("matrix")
    assert moved["sparsity"]["model.layers.0.mlp.up_proj.weight"] > shares["model.layers.0.mlp.up_proj.weight"] + 0.2
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_expert_that_no_token_reaches_is_said():
    model = native("mixtral", "mixtral", {**GQA, **EXPERTS, "num_local_experts": 8}).build("eager").eval()
    with pytest.warns(UserWarning, match="no token reached"):
        sparse = sparsify(model, calib(1, 2), "sparsegpt", 0.5)  # two tokens choose four experts at most
    rows = [row for row in sparse.sparsity_report.rows if row["layer"] == 0 and row["note"]]
    assert rows and all(row["method"] == "magnitude" and "[" in row["matrix"] for row in rows)
    assert "no token reached" in " ".join(sparse.sparsity_report.remarks)


def live_bytes(model):
    """Memory of all tensors that are alive but the model's own."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storages = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in gc.get_objects()
                    if isinstance(o, torch.Tensor) and (o.device.type, o.layout) == ("cpu", torch.strided)}  # fmt: skip
    return sum(size for pointer, size in storages.items() if pointer not in own)


def peak(monkeypatch, n_layers, n_samples, method):
    """The most that is alive while layers are pruned, above what was alive before."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=n_layers, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=64, max_position_embeddings=128,
    )  # fmt: skip
    model, seen, solve = LlamaForCausalLM(config).eval(), [], driver.prune_layer

    def watched(*args):
        result = solve(*args)
        seen.append(live_bytes(model))
        return result

    monkeypatch.setattr(
        "prunekit.sparsity.layers.prune_ffn", lambda *a, **k: (seen.append(live_bytes(model)), old(*a, **k))[1]
    )
    monkeypatch.setattr(driver, "prune_layer", watched)
    gc.collect()
    gc.disable()
    before = live_bytes(model)
    sparsify(model, calib(n_samples, 64), method, 0.5, inplace=True)
    gc.enable()
    monkeypatch.setattr(driver, "prune_layer", solve)
    return max(seen) - before


old = __import__("prunekit.sparsity.layers", fromlist=["prune_ffn"]).prune_ffn


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsegpt", "sparsellm"])
def test_memory_is_that_of_one_layer(monkeypatch, method):
    once = peak(monkeypatch, 2, 32, method)
    deeper, wider = peak(monkeypatch, 4, 32, method), peak(monkeypatch, 2, 64, method)
    assert abs(deeper - once) < 0.02 * once + 200_000
    more_tokens = 32 * 64 * 4
    stream, auxiliaries = 64 * more_tokens, (2 * 64 + 3 * 96) * more_tokens if method == "sparsellm" else 0
    assert wider - once < 1.1 * (2 * stream + auxiliaries) + 200_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1}, "sparsity=1 is not allowed"),
        ({"sparsity": math.nan}, "sparsity=nan"),
        ({"sparsity": None}, "give one of the two"),
        ({"sparsity": "5:4"}, "1 ≤ kept ≤ of"),
        ({"sparsity": None, "pattern": (2, 5)}, r"model\.layers\.0\.self_attn\.q_proj\.weight has rows of"),
        ({"method": "fast"}, "method='fast' is unknown"),
        ({"method": None}, "method=None"),
        ({"method": ["wanda"]}, "is not allowed; give a text, or an object of class SparseLLM"),
        ({"allocation": "local"}, "allocation='local' is unknown"),
        ({"sparsity": "2:4", "allocation": "global"}, "cannot move zeros"),
        ({"layers": [7]}, r"layers=\[7\]"),
        ({"layers": []}, "numbers from 0 to"),
        ({"layers": "all"}, "layers='all'"),
        ({"layers": 1.5}, "layers=1.5"),
        ({"damping": 0}, "damping=0 is not allowed"),
        ({"sparsity": 70}, r"did you mean 0\.7\?"),
        ({"inplace": "no"}, "inplace='no'"),
        ({"calib": None}, "needs a calibration set"),
        ({"calib": torch.zeros(2, 3)}, "integer tensor"),
        ({"calib": torch.full((2, 4), 10_000)}, "token ids"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_stays(options, message):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    options = {"calib": calib(), "sparsity": 0.5, **options}
    with pytest.raises(PrunekitError, match=message):
        sparsify(model, options.pop("calib"), **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def damaged(change):
    model = tiny_llama()
    with torch.no_grad():
        change(model)
    return model


class Quantised(nn.Linear):
    """A stand-in for a library's own layer."""


Quantised.__module__ = "bitsandbytes.nn.modules"


def with_quantised_layer(model):
    model.model.layers[0].mlp.up_proj = Quantised(64, 96, bias=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: damaged(lambda m: m.model.norm.weight.fill_(math.nan)), "NaN"),
        (lambda: damaged(lambda m: m.model.layers[1].input_layernorm.weight.zero_()), "are zero for every token"),
        (lambda: damaged(lambda m: m.model.layers[0].input_layernorm.weight.fill_(3e38)), "not finite"),
        (lambda: damaged(with_quantised_layer), r"quantised \(model\.layers\.0\.mlp\.up_proj is a bitsandbytes"),
        (lambda: damaged(lambda m: setattr(m.config, "quantization_config", {"quant_method": "gptq"})), "'gptq'"),
        (lambda: damaged(lambda m: m.to(torch.float8_e4m3fn)), "quantised .*float8"),
        (lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), "has adapters"),
        (lambda: nn.Linear(3, 3), "not a transformers model, so it cannot run on tokens"),
        (lambda: torch.compile(tiny_llama()), "compiled"),
        (lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, vocab_size=9)), "an encoder"),
        (lambda: "a/path", "model='a/path' is not allowed"),
    ],
)
def test_models_that_cannot_be_are_refused_by_name(model, message):
    with pytest.raises(PrunekitError, match=message):
        sparsify(model(), calib(), "sparsegpt", 0.5)


def test_fewer_tokens_than_inputs_are_said():
    with pytest.warns(UserWarning, match="12 tokens and a matrix"):
        sparse = sparsify(tiny_llama(), calib(2, 6), "sparsegpt", 0.5)
    assert abs(sparse.sparsity_report.sparsity - 0.5) < 0.01
    assert "12 tokens" in sparse.sparsity_report.remarks[0]


def test_what_sparsellm_does_not_know_is_said():
    with pytest.warns(UserWarning, match="no form that SparseLLM supports"):
        sparse = sparsify(DIFFICULT["bitnet"].build("eager").eval(), calib(), "sparsellm", 0.5)
    assert {row["method"] for row in sparse.sparsity_report.rows} == {"sparsegpt"}


def test_an_interrupt_leaves_the_model(monkeypatch):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(driver, "prune_layer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sparsify(model, calib(), "wanda", 0.5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_report_reads_and_comes_back(tmp_path):
    report = sparsify(tiny_llama(), calib(), SparseLLM(n_iterations=2), 0.5).sparsity_report
    assert SparsityReport.load(report.save(tmp_path / "report.json")) == report
    assert "sparsellm" in repr(report) and "50%" in repr(report)
    assert "<table" in report._repr_html_()
    assert report.by_layer()["sparsity"].between(0.49, 0.51).all()
    assert set(report.ffn_errors()["iteration"]) == {0, 1}
    for text in ("{}", "[1]", "no json", '{"method": 1}'):
        with pytest.raises(PrunekitError, match="not a sparsity report"):
            SparsityReport.from_json(text)


def test_expert_options_are_as_before():
    model = native("mixtral", "mixtral", {**GQA, **LOCAL, **EXPERTS}).build("eager").eval()
    was = model.config._experts_implementation_internal
    sparse = sparsify(model, calib(), "wanda", 0.5)
    assert model.config._experts_implementation_internal == sparse.config._experts_implementation_internal == was


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_no_gram_matrix_is_summed_up_where_the_solver_needs_none(method, monkeypatch):
    monkeypatch.setattr(matrix_inputs, "add_to_gram", None)
    plain = sparsify(tiny_llama(), calib(), method, 0.5)
    assert all(row["error"] is None for row in plain.sparsity_report.rows)
    assert "not measured" in plain.sparsity_report._repr_html_()


def test_a_model_is_looked_at_without_the_logits_of_all_tokens():
    model, seen = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2].numel()))
    sparsify(model, calib(), "wanda", 0.5, inplace=True, measure=False)
    assert seen and max(seen) == len(calib())  # one token a sequence
