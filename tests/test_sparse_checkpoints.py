"""Sparse models on disk: what is saved is what is loaded, what is told is true, and 2:4 weights in torch's form."""

import json

import pytest
import torch
from evaluation_helpers import dense_folder
from families import FAMILIES, logits, plan_keeping
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_importance import tiny_llama
from test_keeping_zeros import keeps, sparse, told, zeros_of
from test_recovery import QUICK, counting
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import prunekit as pk
from prunekit import PrunekitError, export, load, recover, save, sparsify
from prunekit.cli import main
from prunekit.recovery import LoRA
from prunekit.sparsity import SparsityReport, semi_structured, to_semi_structured
from prunekit.sparsity.semi_structured import is_two_of_four


def cut_sparse(how=0.5):
    """A model with one head left and channels that differ by layer, so that it needs prunekit's layout; with zeros."""
    model = FAMILIES["llama_gqa"].model(dtype=torch.float32)
    groups = pk.discover(model)
    keep = {g.name: list(range(g.n_units // (2 + 2 * g.layer))) for g in groups.of_kind("ffn_channel")}
    return sparsify(pk.prune(model, plan_keeping(groups, keep)), None, "magnitude", how)


def fill(model, n=3):
    """Put ones where zeros are."""
    name, weight = next(iter(told(model).items()))
    with torch.no_grad():
        weight[tuple((weight == 0).nonzero()[:n].T)] = 1.0
    return name


@pytest.mark.parametrize("how", [0.5, "2:4"])
@pytest.mark.parametrize("name", ["llama", "conv1d", "experts", "cut"])
def test_a_sparse_model_is_saved_and_loaded_as_it_is(name, how, tmp_path):
    model = cut_sparse(how) if name == "cut" else sparse(name, how)
    zeros = zeros_of(model)
    again, _ = load(save(model, tmp_path / "out"))
    assert torch.equal(logits(again), logits(model)) and keeps(again, zeros)
    assert again.sparsity_report == model.sparsity_report
    assert all(torch.equal(found, zeros[name]) for name, found in zeros_of(again).items())
    kind = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert (kind == "prunekit") == (name == "cut")
    twice, _ = load(save(again, tmp_path / "twice"))
    assert twice.sparsity_report == model.sparsity_report


def test_the_folder_is_ordinary(tmp_path):
    model = sparse()
    folder = save(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(plain.eval()), logits(model)) and not hasattr(plain, "sparsity_report")
    stored = load_file(folder / "model.safetensors")
    dense = save(tiny_llama(), tmp_path / "dense")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, dense)]
    assert sizes[0] == sizes[1] and all(stored[name].eq(0).any() for name in told(model))
    assert SparsityReport.from_json((folder / "sparsity.json").read_text()) == model.sparsity_report
    assert not (dense / "sparsity.json").exists() and "## Zeros" not in (dense / "README.md").read_text()
    assert not hasattr(load(dense)[0], "sparsity_report")


def test_the_card_says_what_was_done_and_what_it_is_good_for(tmp_path):
    model = sparsify(tiny_llama(), counting(), "wanda", 0.5, report_error=True)
    card = (save(model, tmp_path / "out") / "README.md").read_text()
    section = card.split("## Zeros")[1].split("## Load")[0]
    assert repr(model.sparsity_report) in section
    for layer, row in model.sparsity_report.by_layer().iterrows():
        assert f"| {layer} | {row['sparsity']:.2%} | {row['error']:.4f} |" in section
    for said in ("numbers like any other", "make nothing faster", "no smaller", "2:4", "capability 8.0",
                 "semi_structured=True", "measure", "No other pattern is faster"):  # fmt: skip
        assert said in section
    unmeasured = (save(sparse(), tmp_path / "other") / "README.md").read_text()
    assert "| 0 | 50.52% | not measured |" in unmeasured


def test_remarks_stand_in_the_card(tmp_path):
    recovered = recover(sparse(), QUICK, counting())
    card = (save(recovered, tmp_path / "out") / "README.md").read_text()
    assert "- it was trained since it was sparsified: the output errors and the loss are those of before" in card
    assert load(tmp_path / "out")[0].sparsity_report == recovered.sparsity_report


def test_zeros_that_were_filled_are_told(tmp_path):
    model = sparse()
    before = model.sparsity_report
    name = fill(model)
    folder = save(model, tmp_path / "out")
    said = f"3 zeros of 1 matrices ({name}, …) were filled after it was sparsified"
    told_now = SparsityReport.from_json((folder / "sparsity.json").read_text())
    assert said in (folder / "README.md").read_text() and any(said in remark for remark in told_now.remarks)
    was, now = ({row["matrix"]: row["n_zeros"] for row in report.rows} for report in (before, told_now))
    assert now == {**was, name: was[name] - 3}
    assert model.sparsity_report == before  # saving changes no model
    again, _ = load(folder)
    assert again.sparsity_report == told_now
    save(again, tmp_path / "twice")
    assert (tmp_path / "twice" / "sparsity.json").read_text() == (folder / "sparsity.json").read_text()


def test_a_report_does_not_outlive_its_matrices(tmp_path):
    model = sparse()
    groups = pk.discover(model)
    keep = {g.name: list(range(g.n_units // 2)) for g in groups.of_kind("ffn_channel")}
    small = pk.prune(model, plan_keeping(groups, keep))
    small.sparsity_report = model.sparsity_report  # as a copied attribute would be
    folder = save(small, tmp_path / "out")
    assert not (folder / "sparsity.json").exists() and "## Zeros" not in (folder / "README.md").read_text()
    assert not hasattr(load(folder)[0], "sparsity_report")


def test_exports_tell_of_zeros_where_the_matrices_are_the_same(tmp_path):
    model = sparse()
    plain = export(model, tmp_path / "plain", layout="plain")
    assert SparsityReport.from_json((plain / "sparsity.json").read_text()) == model.sparsity_report
    padded = export(cut_sparse(), tmp_path / "padded", layout="padded")
    assert not (padded / "sparsity.json").exists()


def first_row(**changes):
    return lambda told: told["rows"][0].update(changes)


TEXTS = {"no JSON": lambda text: text[:-20], "no text": lambda text: "\ud800", "no object": lambda text: "[1, 2]",
         "too deep": lambda text: "[" * 100_000}  # fmt: skip
BROKEN = {
    "a key lacks": lambda told: told.pop("remarks"),
    "no rows": lambda told: told.update(rows=[]),
    "rows of text": lambda told: told.update(rows="abc"),
    "a row of text": lambda told: told.update(rows=["abc"]),
    "a field lacks": lambda told: told["rows"][0].pop("error"),
    "a number as text": first_row(n_zeros="3"),
    "a truth value": first_row(n_zeros=True),
    "a matrix as number": first_row(matrix=3),
    "another matrix": first_row(matrix="model.layers.7.mlp.up_proj.weight"),
    "an expert of a matrix": first_row(matrix="model.layers.0.self_attn.q_proj.weight[0]"),
    "another size": first_row(n_weights=12),
    "remarks as numbers": lambda told: told.update(remarks=[1]),
    "left as list": lambda told: told.update(left=["x"]),
    "a method as list": lambda told: told.update(method=[]),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_report_is_refused_by_name(broken, tmp_path):
    path = save(sparse(), tmp_path / "out") / "sparsity.json"
    content = json.loads(path.read_text())
    broken(content)
    path.write_text(json.dumps(content))
    with pytest.raises(PrunekitError, match=r"sparsity\.json' tells nothing of this model's zeros .*take it away"):
        load(tmp_path / "out")


def test_a_file_that_holds_no_report_is_refused_by_name(tmp_path):
    path = save(sparse(), tmp_path / "out") / "sparsity.json"
    text = path.read_text()
    for broken in TEXTS.values():
        path.write_bytes(broken(text).encode(errors="surrogatepass"))
        with pytest.raises(PrunekitError, match=r"sparsity\.json' tells nothing of this model's zeros"):
            load(tmp_path / "out")
    path.unlink()
    path.mkdir()
    with pytest.raises(PrunekitError, match=r"sparsity\.json' tells nothing"):
        load(tmp_path / "out")
    path.rmdir()
    assert not hasattr(load(tmp_path / "out")[0], "sparsity_report")


def test_the_name_is_taken_only_where_there_is_a_report(tmp_path):
    with pytest.raises(PrunekitError, match=r"'sparsity\.json' is a part of the checkpoint"):
        save(sparse(), tmp_path / "out", files={"sparsity.json": "mine"})
    assert not (tmp_path / "out").exists()


def test_the_shell_recovers_a_sparse_folder_and_keeps_its_zeros(tmp_path, capsys):
    dense = dense_folder(tmp_path)
    model, tokenizer = load(dense)
    model = sparsify(model, None, "magnitude", 0.5)
    save(model, tmp_path / "sparse", tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text("a quick brown fox jumps over the lazy dog. " * 40)
    given = ["recover", str(tmp_path / "sparse"), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    assert main([*given, "--max-steps", "3", "--seq-len", "32"]) == 0
    again, _ = load(tmp_path / "out")
    assert keeps(again, zeros_of(model)) and again.sparsity_report.rows == model.sparsity_report.rows
    changed = [n for n, p in again.named_parameters() if not p.equal(dict(model.named_parameters())[n])]
    card = (tmp_path / "out" / "README.md").read_text()
    assert changed and "## Zeros" in card and "## Recovered" in card


# In torch's semi-structured form


def two_of_four(dtype=torch.float16, how="2:4"):
    """A LLaMA with biases, of whose matrices down_proj alone has a width (96) that 64 does not divide."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return sparsify(model, None, "magnitude", how).to(dtype)


class Kernels:
    """What CUTLASS computes on a GPU, here on the CPU by way of the dense weight."""

    def __init__(self):
        self.calls = 0

    def mm(self, packed, meta, dense, *, out_dtype=None):
        self.calls += 1
        return sparse_semi_structured_to_dense_cutlass(packed, meta) @ dense

    def addmm(self, bias, packed, meta, dense, *, alpha=1, beta=1, out_dtype=None):
        return self.mm(packed, meta, dense) + bias[:, None]


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have one: CUTLASS's form is made on the CPU, and its products stood in for."""

    def convert(weight):
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        options = {"packed_t": None, "meta_t": None, "compressed_swizzled_bitmask": None}
        return SparseSemiStructuredTensorCUTLASS(weight.shape, packed=packed, meta=meta, **options)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", convert)
    monkeypatch.setattr(semi_structured, "_on_gpu", lambda weight: True)
    kernels, library = Kernels(), torch.library.Library("aten", "IMPL")
    library.impl("_sparse_semi_structured_mm", kernels.mm, "CPU")
    library.impl("_sparse_semi_structured_addmm", kernels.addmm, "CPU")
    yield kernels
    library._destroy()


CONVERTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemi")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("told_of", [True, False])
def test_what_is_two_of_four_and_fits_is_converted_and_computes_the_same(dtype, told_of, gpu):
    model, data = two_of_four(dtype), counting()
    if not told_of:
        del model.sparsity_report
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = model(input_ids=data).logits
    assert to_semi_structured(model) == 12
    found = {name: p for name, p in model.named_parameters() if isinstance(p, SparseSemiStructuredTensor)}
    assert set(found) == {name for name in weights if name.split(".")[-2] in CONVERTED and name.endswith("weight")}
    assert all(torch.equal(p.to_dense(), weights[name]) and not p.requires_grad for name, p in found.items())
    got = model(input_ids=data).logits
    assert gpu.calls == 12 and (got - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()
    for refused in (lambda: recover(model, LoRA(), data), lambda: save(model, "out"), lambda: export(model, "out")):
        with pytest.raises(PrunekitError, match="q_proj.weight is in semi-structured form, which cannot be"):
            refused()


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemi")
def test_only_what_the_report_names_is_converted(gpu):
    model = two_of_four()
    rows = tuple(row for row in model.sparsity_report.rows if row["layer"] == 1 and "mlp" not in row["matrix"])
    model.sparsity_report = SparsityReport("magnitude", "2 of 4 zero", rows)
    assert to_semi_structured(model) == 4
    converted = [name for name, p in model.named_parameters() if isinstance(p, SparseSemiStructuredTensor)]
    assert len(converted) == 4 and all("layers.1.self_attn" in name for name in converted)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemi")
def test_shared_weights_stay_dense(gpu):
    model = two_of_four()
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    assert to_semi_structured(model) == 10
    assert layers[1].self_attn.q_proj.weight is layers[0].self_attn.q_proj.weight


def test_what_cannot_be_converted_is_refused_unchanged(gpu, monkeypatch):
    for model, match in (
        (two_of_four(how=0.5), r"two zeros in every four.*sparsify\(\.\.\., sparsity='2:4'\)"),
        (two_of_four(torch.float32), "is torch.float32, of which torch has no 2:4 form.*dtype='float16'"),
        (sparse("llama", "2:4").half(), r"32 and 64 divide.*q_proj.* is \(16, 16\)"),
        (sparse("conv1d", "2:4").half(), "no linear layer has two zeros"),
    ):
        with pytest.raises(PrunekitError, match=match):
            to_semi_structured(model)
        assert not any(isinstance(p, SparseSemiStructuredTensor) for p in model.parameters())
    monkeypatch.setattr(semi_structured, "_on_gpu", lambda weight: weight.is_cuda)
    with pytest.raises(PrunekitError, match=r"is on the cpu; move the model first: model\.to\('cuda'\)"):
        to_semi_structured(two_of_four())


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemi")
def test_what_torch_refuses_says_whether_anything_was_changed(gpu, monkeypatch):
    real, calls = torch.sparse.to_sparse_semi_structured, []

    def fail(weight, at):
        calls.append(weight)
        if len(calls) > at:
            raise RuntimeError("cuSPARSELt not supported on your machine.")
        return real(weight)

    for at, said in (
        (0, r"q_proj\.weight \(cuSPARSELt not supported on your machine\.\)$"),
        (3, "3 matrices are converted alre"),
    ):
        calls.clear()
        monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", lambda weight, at=at: fail(weight, at))
        with pytest.raises(PrunekitError, match=said):
            to_semi_structured(two_of_four())


@pytest.mark.parametrize(
    ("cuda", "version", "capability", "match"),
    [
        (False, None, (9, 0), "need an NVIDIA GPU, and torch finds none here"),
        (True, None, (9, 4), "need an NVIDIA GPU"),  # as torch says of AMD's
        (True, "12.8", (7, 5), r"compute capability 7\.5, semi-structured weights need 8\.0"),
    ],
)
def test_machines_that_have_no_such_kernels_are_refused_before_anything_is_read(
    cuda, version, capability, match, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.version.cuda", version)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    with pytest.raises(PrunekitError, match=f"{match}.*leave semi_structured out"):
        load("/there/is/no/such/folder", semi_structured=True)
    with pytest.raises(PrunekitError, match=match):
        to_semi_structured(two_of_four())


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemi")
def test_load_brings_the_model_onto_the_gpu_and_converts_it(gpu, tmp_path, monkeypatch):
    save(two_of_four(torch.float32), tmp_path / "out")
    moved = []
    monkeypatch.setattr(LlamaForCausalLM, "to", lambda self, device: moved.append(device) or self)
    model, _ = load(tmp_path / "out", dtype="float16", semi_structured=True)
    assert moved == ["cuda"]
    assert sum(isinstance(p, SparseSemiStructuredTensor) for p in model.parameters()) == 12
    with pytest.raises(PrunekitError, match="is torch.float32"):
        load(tmp_path / "out", semi_structured=True)
    assert not any(isinstance(p, SparseSemiStructuredTensor) for p in load(tmp_path / "out")[0].parameters())


def matrices(n_runs):
    row = st.lists(st.sampled_from([0.0, 1.0, -2.0]), min_size=4 * n_runs, max_size=4 * n_runs)
    return st.lists(row, min_size=1, max_size=3)


@given(st.integers(1, 4).flatmap(matrices))
def test_two_of_four_is_counted_along_rows(rows):
    right = all(sum(x != 0 for x in row[i : i + 4]) <= 2 for row in rows for i in range(0, len(row), 4))
    assert is_two_of_four(torch.tensor(rows)) == right
    assert not is_two_of_four(torch.zeros(2, 6))
