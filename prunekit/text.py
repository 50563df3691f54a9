"""Text as tokens: joins documents into one stream, cuts windows, adds BOS; writes chats in the tokenizer's template."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import PrunekitError, first_line

DOCUMENT_SEPARATOR = "<|endoftext|>"  # between documents in TinyStories and many other corpora
JOINT = "\n"  # between documents in a stream of tokens, as in the embedded world's training
Spans = tuple[tuple[int, int], ...]  # begin and end of each reply, in characters
Turn = Mapping[str, Any]
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # ShareGPT's → the usual
_MARKERS = re.compile(r"\{%-?\s*generation\b")  # what transformers' own mask of the assistant's tokens needs
NO_TOKENIZER = (
    "a checkpoint that has no tokenizer gets one by tokenizer.json and tokenizer_config.json in its folder; where "
    "tokens were cut, that of the uncut model does not fit: plan.json lists under keep the old number of each new one"
)


def leading_bos(tokenizer: Any, asked: bool | None = None) -> int | None:
    """The first token of every window of text: BOS if the tokenizer adds it by itself.

    Args:
        tokenizer: a transformers tokenizer.
        asked: True always uses BOS, False never; None follows the tokenizer.

    Returns:
        The id of BOS, or None where windows begin with text.

    Raises:
        PrunekitError: no tokenizer, or BOS requested from a tokenizer without one.
    """
    if tokenizer is None:
        raise PrunekitError(f"tokenizer=None, and text needs one; {NO_TOKENIZER}")
    bos: int | None = tokenizer.bos_token_id
    if asked and bos is None:
        raise PrunekitError("bos=True, but this tokenizer has no BOS token; give bos=None or bos=False")
    if asked is None and bos is not None:
        bare, marked = encode(tokenizer, "a"), tokenizer("a", verbose=False)["input_ids"]
        asked = marked[: len(bare) + 1] == [bos, *bare]  # compared with the bare text: "a" itself may be unknown
    return bos if asked else None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text alone, without the markers that the tokenizer would add."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def tokenize(
    documents: Sequence[str | Tensor],
    tokenizer: Any,
    *,
    enough: int | None = None,
    bos: int | None = None,
) -> Tensor:
    """One stream of tokens: the documents one after the other, a line break between two texts.

    Args:
        documents: texts, or tokens, int64 (length,).
        tokenizer: a transformers tokenizer; not used where all are tokens.
        enough: stop at the first document after which there are this many tokens; None reads all.
        bos: the token that windows begin with; where a document begins with it too, as a chat template may write it,
            it is left out there. None leaves all tokens.

    Returns:
        int64 (n_tokens,).

    Raises:
        PrunekitError: text, and no tokenizer.
    """
    ids: list[int] = []
    for number, document in enumerate(documents, start=1):
        found = token_ids(document, tokenizer, JOINT * (number < len(documents)))
        ids.extend(found[1:] if bos is not None and found[:1] == [bos] else found)
        if enough is not None and len(ids) >= enough:
            break
    return torch.tensor(ids, dtype=torch.long)


def token_ids(document: str | Tensor, tokenizer: Any, joint: str = "") -> list[int]:
    """Tokens of a document: its own, or those of its text with what joins it to the next.

    Raises:
        PrunekitError: text, and no tokenizer.
    """
    if isinstance(document, Tensor):
        found: list[int] = document.tolist()
        return found
    if tokenizer is None:
        raise PrunekitError(f"the data is text: give tokenizer=tokenizer, or token ids; {NO_TOKENIZER}")
    return encode(tokenizer, document + joint)


def text_width(width: int, bos: int | None) -> int:
    """Tokens of text in a window of `width` tokens, of which BOS is one where there is one."""
    return width if bos is None else width - 1


def begin_windows(tokens: Tensor, bos: int | None) -> Tensor:
    """BOS, where there is one, and then the text of each window: (…, n_tokens) → int64 (…, n_tokens + 1)."""
    return tokens if bos is None else torch.nn.functional.pad(tokens, (1, 0), value=bos)


def whole_windows(stream: Tensor, width: int, bos: int | None) -> Tensor:
    """A stream of tokens as windows without overlap; the rest is dropped.

    Args:
        stream: int64 (n_tokens,), without BOS.
        width: tokens a window, BOS included.
        bos: what `leading_bos` says.

    Returns:
        int64 (n_windows, width), BOS first in each.
    """
    step = text_width(width, bos)
    n_windows = len(stream) // step
    return begin_windows(stream[: n_windows * step].view(n_windows, step), bos)


# --- chats --------------------------------------------------------------------------------------


class TextWithReplies(str):
    """A text of which some characters answer the others; found when asked, since only training asks."""

    locate: Callable[[], Spans]

    @classmethod
    def of(cls, text: str, locate: Callable[[], Spans]) -> "TextWithReplies":
        """The text; `locate` gives the places of its replies."""
        made = cls(text)
        made.locate = locate
        return made

    @cached_property
    def replies(self) -> Spans:
        """Begin and end of each reply, in characters.

        Raises:
            PrunekitError: the template does not show where they are.
        """
        return self.locate()


def answered(prompt: str, reply: str) -> TextWithReplies:
    """A prompt with its reply."""
    return TextWithReplies.of(prompt + reply, lambda: ((len(prompt), len(prompt) + len(reply)),))


def written_chat(turns: Sequence[Any], tokenizer: Any, names: tuple[str, str], place: str) -> TextWithReplies:
    """A chat in the tokenizer's own template.

    Args:
        turns: mappings with a role and a text.
        tokenizer: a transformers tokenizer with a template.
        names: columns of role and text, `role` and `content` or ShareGPT's.
        place: where the chat stands, to begin messages with; may be empty.

    Raises:
        PrunekitError: a turn without role or text, no template, or one that refuses the chat.
    """
    if not getattr(tokenizer, "chat_template", None):
        missing = "no tokenizer was given" if tokenizer is None else "this tokenizer has no chat template"
        raise PrunekitError(
            f"{place}a chat is written in the tokenizer's template, and {missing}; give a tokenizer with one "
            "(tokenizer.chat_template = ...), or the text"
        )
    chat = [_turn(turn, *names, place) for turn in turns]
    text = _written(chat, tokenizer, place)
    return TextWithReplies.of(text, lambda: _replies(chat, tokenizer, text, place))


def _turn(turn: Any, role: str, content: str, place: str) -> Turn:
    """One turn of a chat as templates read it."""
    for by, text in ((role, content), ("role", "content")):
        if isinstance(turn, Mapping) and isinstance(turn.get(by), str) and text in turn:
            return {**turn, "role": _ROLES.get(turn[by], turn[by]), "content": turn[text]}
    shown = " ".join(repr(turn).split())
    raise PrunekitError(f"{place}a turn of a chat is {shown:.80}; give one with {role!r} and {content!r}")


def _written(chat: list[Turn], tokenizer: Any, place: str, *, prompting: bool = False) -> str:
    if not chat:
        return ""
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompting))
    except Exception as error:  # templates raise exceptions of any type, such as for roles that do not alternate
        roles = ", ".join(str(turn["role"]) for turn in chat)
        raise PrunekitError(
            f"{place}the tokenizer's chat template refuses this chat, whose roles are {roles}, and says "
            f"{first_line(error)!r}; bring the turns into the form that it takes, or give the text"
        ) from error


def _replies(chat: list[Turn], tokenizer: Any, text: str, place: str) -> Spans:
    """Where the assistant's turns stand, up to the end of each turn."""
    if _MARKERS.search(tokenizer.get_chat_template()):
        return _marked(chat, tokenizer)
    numbers = [number for number, turn in enumerate(chat) if turn["role"] == "assistant"]
    return tuple(_reply(chat, number, tokenizer, text, place) for number in numbers)


def _marked(chat: list[Turn], tokenizer: Any) -> Spans:
    """Tokens in the template's own `{% generation %}` parts, as places in the text."""
    found = tokenizer.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"return_offsets_mapping": True}
    )
    pairs = zip(found["offset_mapping"], found["assistant_masks"], strict=True)
    return tuple((begin, end) for (begin, end), is_reply in pairs if is_reply)


def _reply(chat: list[Turn], number: int, tokenizer: Any, text: str, place: str) -> tuple[int, int]:
    """What a turn adds to the text before it, without the header that asks for it.

    Templates that write a turn otherwise once others follow (Qwen3 leaves out its thoughts) are read by its content.
    """
    asked = _written(chat[:number], tokenizer, place, prompting=True)
    after = _written(chat[: number + 1], tokenizer, place)
    content = str(chat[number]["content"] or "").strip()
    at = text.find(content, len(asked)) if content else len(asked)
    ends_with = after[after.rfind(content) + len(content) :]
    whole = text.startswith(after)
    if not text.startswith(asked) or at < 0 or not (whole or text.startswith(ends_with, at + len(content))):
        raise PrunekitError(
            f"{place}the tokenizer's chat template does not show where the reply {content!r:.60} ends: it rewrites "
            "earlier turns; give train_on='all', or a template with {% generation %} around what the assistant says"
        )
    has_header = asked != _written(chat[:number], tokenizer, place)  # else the template knows no generation prompt
    return len(asked) if has_header else at, len(after) if whole else at + len(content) + len(ends_with)
