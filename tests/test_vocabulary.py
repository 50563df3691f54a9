"""Tokens that stay get their new numbers wherever a configuration names them."""

import pytest
from evaluation_helpers import llama
from families import plan_keeping
from transformers import GenerationConfig, PreTrainedConfig

from prunekit import discover, prune
from prunekit.pruning.configurations import configurations, renumber

KEPT = {2: 0, 5: 1, 6: 2}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"suppress_tokens": [5, 7, 2]}, [1, 0]),
        ({"begin_suppress_tokens": [7, 8]}, None),
        ({"forced_bos_token_id": 6}, 2),
        ({"forced_eos_token_id": [6, 7]}, [2]),
        ({"bad_words_ids": [[5, 6], [5, 7], [2]]}, [[1, 2], [0]]),
        ({"bad_words_ids": [[7]]}, None),
        ({"force_words_ids": [[[5], [7, 5]], [[2, 6]]]}, [[[1]], [[0, 2]]]),
        ({"sequence_bias": [[[5, 6], -1.0], [[7], 2.0]]}, [[[1, 2], -1.0]]),
        ({"sequence_bias": None}, None),
    ],
)
def test_what_names_tokens_is_renumbered_and_what_went_is_dropped(before, after):
    config = GenerationConfig(**before)
    renumber(config, KEPT, 9, 3)
    assert [getattr(config, name) for name in before] == [after]


def test_configurations_inside_others_are_renumbered_too():
    inner = PreTrainedConfig(vocab_size=9, bos_token_id=5)
    outer = PreTrainedConfig(text_config=inner, image_token_index=6)
    for config in configurations(outer, None):
        renumber(config, KEPT, 9, 3)
    assert (inner.vocab_size, inner.bos_token_id, outer.image_token_index) == (3, 1, 2)


def test_pruning_leaves_the_numbers_of_the_model_it_cuts():
    model = llama()
    model.generation_config.suppress_tokens = [5, 7]
    small = prune(model, plan_keeping(discover(model), {"vocabulary": [2, 5, 6]}))
    assert (small.generation_config.suppress_tokens, model.generation_config.suppress_tokens) == ([1], [5, 7])
