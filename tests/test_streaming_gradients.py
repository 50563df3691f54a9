"""A checkpoint that is not loaded is scored by gradients, one layer at a time: what goes on, and what is refused."""

import pytest
import torch
from families import FAMILIES, tokens
from other_families import EVERYONE
from test_streaming import write
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit as pk
from prunekit import Curvature, PrunekitError, Taylor, prune_checkpoint
from prunekit.importance.by_layer import layers_of
from prunekit.layer_gradients import LayerBackward


def test_layers_that_were_scored_by_gradients_are_not_scored_again(tmp_path, monkeypatch):
    source, out, scored, unit_scores = write(tmp_path / "in"), tmp_path / "out", [], Curvature.unit_scores
    whole = prune_checkpoint(source, tmp_path / "whole", Curvature(), 0.2, tokens())

    def once(*arguments):
        scored.append({group.layer for group in arguments[2]})
        if len(scored) == 2:
            raise KeyboardInterrupt
        return unit_scores(*arguments)

    monkeypatch.setattr(Curvature, "unit_scores", once)
    with pytest.raises(KeyboardInterrupt, match="the same call goes on from it"):
        prune_checkpoint(source, out, Curvature(), 0.2, tokens())
    assert sorted(path.name for path in (tmp_path / ".out.partial").iterdir()) == [
        "checkpoint", "scores.safetensors", "scoring.json"]  # and no streams  # fmt: skip
    assert prune_checkpoint(source, out, Curvature(), 0.2, tokens()).keep == whole.keep
    assert scored == [{1}, {0}, {0}]


@pytest.mark.parametrize(
    ("name", "importance", "options", "message"),
    [
        ("llama_gqa", Taylor(), {"kinds": ["hidden"]}, "'hidden' does not lie in one layer alone, and Taylor"),
        ("llama_gqa", Curvature(), {"kinds": ["vocabulary"]}, "does not lie in one layer alone, and Curvature"),
        ("mixtral", Curvature(), {}, "no linear layer consumes .*experts"),
    ],
)
def test_what_gradients_layer_by_layer_cannot_score_is_refused(name, importance, options, message, tmp_path):
    """And nothing is left, so that another importance may be taken at once."""
    source, out = tmp_path / "in", tmp_path / "out"
    EVERYONE[name].model(dtype=torch.float32).save_pretrained(source)
    with pytest.raises(PrunekitError, match=message):
        prune_checkpoint(source, out, importance, 0.2, tokens(), **{"of": "units", **options})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_layers_with_more_than_one_stream_are_refused(tmp_path):
    """Gemma 3n's layers pass on four of them."""
    sizes = {"vocab_size": 48, "vocab_size_per_layer_input": 48, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0, "sliding_window": 8}
    lists = {"layer_types": 4 * ["full_attention"], "activation_sparsity_pattern": 4 * [0.0]}
    config = AutoConfig.for_model("gemma3n_text", **sizes, **lists)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "in")
    with pytest.raises(PrunekitError, match="Gemma3nForCausalLM do not read one another's outputs alone"):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", Taylor(), 0.2, tokens(), of="units")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_weights_that_two_layers_share_have_no_layer():
    model = FAMILIES["llama_gqa"].model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    shared = pk.discover(model).of_kind("ffn_channel")
    with pytest.raises(PrunekitError, match="does not lie in one layer alone, and Taylor"):
        layers_of(model, shared, Taylor())


def test_a_loss_that_routers_add_to_is_refused(tmp_path):
    model = FAMILIES["mixtral"].model(dtype=torch.float32)
    model.config.output_router_logits = True
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(PrunekitError, match="config.output_router_logits adds to the loss.*; set it to False"):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", Taylor(), 0.2, tokens(), of="units")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_weights_that_are_not_finite_are_named_before_gradients(tmp_path):
    model = FAMILIES["llama_gqa"].model(dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(PrunekitError, match="layers.1.mlp.up_proj.weight has NaN or infinite weights"):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", Taylor(), 0.2, tokens())


def test_what_a_killed_run_left_of_its_streams_goes(tmp_path):
    source, left = write(tmp_path / "in"), tmp_path / ".out.partial" / "hidden"
    left.mkdir(parents=True)
    (left / "hidden-7.safetensors").write_bytes(bytes(100))
    plan = prune_checkpoint(source, tmp_path / "out", Curvature(), 0.2, tokens())
    assert plan.gone and {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_a_layer_in_two_portions_is_run_twice(tmp_path, monkeypatch):
    whole = prune_checkpoint(write(tmp_path / "in"), tmp_path / "whole", Curvature(), 0.2, tokens())
    monkeypatch.setattr("prunekit.importance.input_statistics.ROOM", 1)
    runs, run = [], LayerBackward.run
    monkeypatch.setattr(LayerBackward, "run", lambda self: (runs.append(self), run(self)))
    assert prune_checkpoint(tmp_path / "in", tmp_path / "out", Curvature(), 0.2, tokens()).keep == whole.keep
    assert len(runs) == 4
