"""Private names of other libraries: each test says what breaks where a release has changed one."""

import inspect
import json

import peft
import pytest
import torch
from families import FAMILIES
from other_families import UNLISTED
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Trainer

from prunekit import compat
from prunekit.models import empty_model


class Noting(compat.TorchDispatchMode):
    """Which operators run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class NotingFunctions(TorchFunctionMode):
    """Which functions are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_nothing_is_traced_within_untraced():
    """Else discovery labels its own labels, and never ends."""
    with Noting() as operators, NotingFunctions() as functions:
        torch.ones(2).add(1)
        n_operators, n_functions = len(operators.seen), len(functions.seen)
        with compat.untraced():
            torch.ones(2).add(1)
    assert 0 < n_operators == len(operators.seen) and 0 < n_functions == len(functions.seen)


def test_no_function_mode_is_called_without_them():
    """Else sparsify notes the products that it makes itself."""
    with NotingFunctions() as functions:
        torch.ones(2).add(1)
        before = len(functions.seen)
        with compat.without_function_modes():
            torch.ones(2).add(1)
    assert 0 < before == len(functions.seen)


def test_a_product_below_autograd_is_one_operation():
    """Else discovery sees the reshapes that a batched product is made of, and locks what it must not."""
    x, w = torch.ones(2, 3, 4), torch.ones(5, 4)
    with Noting() as usual:
        nn.functional.linear(x, w)
    with Noting() as one, compat.below_autograd():
        nn.functional.linear(x, w)
    assert [func.overloadpacket.__name__ for func in one.seen] == ["linear"] and len(usual.seen) > 1


def test_a_storage_has_a_key_that_its_views_share():
    """Else labels are lost at the first view."""
    one, other = torch.ones(4, 4), torch.ones(4, 4)
    key = compat.storage_key(one.untyped_storage())
    assert key == compat.storage_key(one[1:].t().untyped_storage()) != compat.storage_key(other.untyped_storage())


def test_a_version_counts_what_is_written_in_place():
    """Else two products share their sums of inputs though the inputs changed in between."""
    one = torch.ones(4)
    before = compat.version_of(one)
    assert compat.version_of(one.view(2, 2)) == before
    one.add_(1)
    assert compat.version_of(one) > before


def test_an_operator_names_its_arguments_and_can_be_decomposed():
    """Else reductions are read over the wrong dimension, and operators without a rule lock what they touch."""
    assert compat.argument_names(torch.ops.aten.sum.dim_IntList)[:2] == ["self", "dim"]
    x = torch.randn(3, 4)
    found = compat.decomposed(torch.ops.aten.linear.default, (x, torch.ones(2, 4)), {})
    assert torch.equal(found, x @ torch.ones(4, 2))
    assert compat.decomposed(torch.ops.aten.sort.default, (x,), {}) is NotImplemented


def test_reading_a_shape_is_seen_as_the_function_that_is_named():
    """Else discovery does not know from which widths a module computes its views."""
    with NotingFunctions() as functions:
        torch.ones(2).shape  # noqa: B018
    assert compat.SHAPE_READ in functions.seen


def test_leaves_of_what_an_operator_returns_are_found():
    """Else the peak of memory misses what an operator returns in a list."""
    assert compat.tree_leaves([1, (2, {"a": 3})]) == [1, 2, 3]


def test_adamw_makes_one_step_without_calling_hooks():
    """Else LHSPG's own step calls an optimiser's hooks twice."""
    weight = nn.Parameter(torch.ones(2))
    optimizer, called = torch.optim.AdamW([weight], lr=0.1), []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    weight.grad = torch.ones(2)
    with torch.no_grad():
        compat.adamw_step(optimizer)
    assert not called and bool((weight < 1).all())


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama_gqa", compat.ATTENTION_IMPLEMENTATION), ("mixtral", compat.EXPERTS_IMPLEMENTATION)],
)
def test_a_configuration_says_how_attention_and_experts_run(family, name):
    """Else they are traced as fused kernels, and numbers that modules keep are not read."""
    assert name in vars(FAMILIES[family].model().config)


@pytest.mark.parametrize(("family", "turned"), [("mixtral", False), ("gpt_oss", True)])
def test_stacked_experts_say_in_which_orientation_they_lie(family, turned):
    """Else their inputs are not measured, and they have no activation scores."""
    found = [
        vars(module)[compat.TRANSPOSED_EXPERTS]
        for module in {**FAMILIES, **UNLISTED}[family].model().modules()
        if compat.TRANSPOSED_EXPERTS in vars(module)
    ]
    assert found == [turned, turned]


def test_a_trainer_knows_whether_a_model_takes_the_number_of_labels(tmp_path):
    """Else the Trainer divides the loss by one label too many, and the log differs from the measured loss."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    assert isinstance(getattr(Trainer(FAMILIES["llama_gqa"].model(), arguments), compat.LOSS_KEYWORDS), bool)


@pytest.mark.parametrize(
    ("task", "name"),
    [("CAUSAL_LM", "LlamaForCausalLM"), ("IMAGE_TEXT_TO_TEXT", "LlavaForConditionalGeneration"),
     ("SEQUENCE_CLASSIFICATION", "LlamaForSequenceClassification"), ("MULTIPLE_CHOICE", "BertForMultipleChoice"),
     ("TOKEN_CLASSIFICATION", "LlamaForTokenClassification"), ("QUESTION_ANSWERING", "LlamaForQuestionAnswering")],
)  # fmt: skip
def test_the_classes_of_a_task_are_listed(task, name):
    """Else a folder's kind of model is not known, and every checkpoint is refused or taken."""
    assert name in compat.class_names(task).values()


def test_lora_casts_its_inputs():
    """Else masked adapters cannot compute what peft does."""
    adapted = peft.get_peft_model(FAMILIES["llama_gqa"].model(), peft.LoraConfig(target_modules=["q_proj"]))
    layer = next(module for name, module in adapted.named_modules() if name.endswith("q_proj"))
    assert compat.lora_inputs(layer, torch.ones(2, dtype=torch.float64), torch.float32).dtype == torch.float32
    assert callable(layer.get_delta_weight)


def test_lines_of_a_journal_begin_with_the_key(tmp_path):
    """Else a journal that was cut off is not mended."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = JournalFileBackend(str(tmp_path / "journal.log"))
    optuna.create_study(storage=optuna.storages.JournalStorage(backend))
    assert all(compat.JOURNAL_KEY in json.loads(line) for line in (tmp_path / "journal.log").read_text().splitlines())
    assert (tmp_path / "journal.log").read_text().startswith(f'{{"{compat.JOURNAL_KEY}"')


def test_the_cache_has_one_of_the_known_names():
    """Else decoding is timed without it, a patch goes by wrong positions, and its bytes count as none."""
    model = FAMILIES["llama_gqa"].model()
    output = model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=True)
    name = compat.cache_name(output)
    assert name == compat.cache_name(inspect.signature(model.forward).parameters)
    assert output[name].get_seq_length() == 4
    assert compat.cache_name({"input_ids": 1}) is None and compat.cache_name({"cache": 1}) == "cache"


def test_an_empty_model_is_not_filled_with_random_numbers():
    """Else transformers draws each parameter of a model without memory, which took most of the time of building one."""
    config = FAMILIES["llama_gqa"].model().config
    with Noting() as operators:
        empty = empty_model(config)
    drawn = [func for func in operators.seen if func is torch.ops.aten.normal_.default]
    assert len(drawn) <= 1 < len(list(empty.parameters()))  # torch itself draws the embedding
