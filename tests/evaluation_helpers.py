"""Tiny models and a byte tokenizer for the tests of evaluation."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from prunekit.questions import Question, Task

N_POSITIONS = 96
TEXT = "the cat sat on the mat. a dog ran to the sea, and the sea was cold. " * 6


def byte_tokenizer(adds_bos=True, bos="<s>"):
    """One token a byte, so that every text can be split anywhere and joined again."""
    words = [bos or "<unused>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos and bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>")


def llama(seed=0, **changes):
    """Two layers, 2 query heads a KV head; weights large enough for answers that differ."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": N_POSITIONS,
        "initializer_range": 0.4,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def gpt2(seed=0):
    """Absolute positions and tied embeddings."""
    torch.manual_seed(seed)
    sizes = {"n_positions": N_POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=258, bos_token_id=0, eos_token_id=1, **sizes)).eval()


def bloom(seed=0):
    """ALiBi: positions come from the attention mask."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 258, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.4}
    return BloomForCausalLM(BloomConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)).eval()


def opt(seed=0):
    """Learned positions, counted along the attention mask."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 258, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(max_position_embeddings=N_POSITIONS, word_embed_proj_dim=32, init_std=0.4, **sizes)
    return OPTForCausalLM(config).eval()


@torch.no_grad()
def sums_alone(model, spans):
    """Log-likelihood of each span's scored tokens, float64, from a forward pass of its own, without mask or cache."""
    sums = torch.zeros(len(spans), dtype=torch.float64)
    for number, span in enumerate(spans):
        ids = torch.tensor([span.tokens])
        rows = model(input_ids=ids[:, :-1], use_cache=False).logits[0, span.start - 1 :].float().log_softmax(-1)
        sums[number] = rows.double().gather(1, ids[0, span.start :, None]).sum()
    return sums


def dense_folder(root, **options):
    """A checkpoint folder with a tokenizer, and a text beside it; with options of `save_pretrained`."""
    folder = root / "dense"
    llama(num_key_value_heads=4, num_attention_heads=8, head_dim=4).save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def choice_task(n_questions=24, normalize=False, name="made_up"):
    """Choices of unequal length behind contexts of unequal length."""
    animals = ["a cat", "an old grey dog", "bees", "the very small bird"]
    questions = [
        Question(
            context=f"Q: {'what, ' * (number % 4)}who ran {number} miles?\nA:",
            choices=tuple(f" {animal}" for animal in animals[number % 2 : number % 2 + 2 + number % 3]),
            answer=number % 2,
            domain="script" if number % 3 else "fact",
            tier=None if number % 3 else "rare",
            hops=None if number % 3 else 1 + number % 2,
        )
        for number in range(n_questions)
    ]
    return Task(name, "arc_easy", tuple(questions), normalize)


def partial_task(n_questions=16):
    """WinoGrande's form: the choices differ on the left."""
    questions = [
        Question(
            context="",
            choices=(f" was {number} years old.",) * 2,
            answer=number % 2,
            domain="coreference",
            contexts=("Ann met Bartholomew, and Ann", "Ann met Bartholomew, and Bartholomew"),
        )
        for number in range(n_questions)
    ]
    return Task("who", "winogrande", tuple(questions))


def yes_no_task(n_questions=12):
    """BoolQ's form, where both choices follow the same context."""
    questions = [
        Question(f"Passage {number}. Is it so?", ("y", "n"), number % 2, "reading") for number in range(n_questions)
    ]
    return Task("is_it", "boolq", tuple(questions))
