"""Chats as texts in the tokenizer's template, and where the replies stand in them."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from prunekit.errors import PrunekitError, first_line

Spans = tuple[tuple[int, int], ...]  # begin and end of each reply, in characters
Turn = Mapping[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # ShareGPT's → the usual
_MARKERS = re.compile(r"\{%-?\s*generation\b")  # what transformers' own mask of the assistant's tokens needs


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
