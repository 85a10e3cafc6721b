"""Chats -> texts, with a model's chat template or another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from mergekit_dam.calibration.messages import Chat
from mergekit_dam.calibration.tally import Tally
from mergekit_dam.calibration.turns import Span, marks_turns, masked_spans, turns_by_prefixes
from mergekit_dam.errors import CalibrationError
from mergekit_dam.untrusted import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime(2024, 7, 26)
"""The date that templates are given for today's; Llama's templates use it where they have no clock.
With another date every day, each merge would be another one."""

NONE = "none"
"""Value of `:chat_template=` for texts without a chat template."""

_CLOCK = "strftime_now"
_DIRECTIVES = "aAbBcdfHIjmMpSUwWxXyYzZ"


class ChatTemplate:
    """Renders chats.

    Args:
        tokenizer: Tokenizer whose template is used by default.
        path: File of another template, which is read at once; `NONE` for no template.
        model: Name of the model, for the log.
        tally: Counts, updated in place.

    Raises:
        CalibrationError: If the file cannot be read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        path: str | None,
        model: str,
        tally: Tally,
    ) -> None:
        self._tokenizer = tokenizer
        self._none = path == NONE
        self._own = _read(path) if path is not None and not self._none else None
        self._tally = tally
        self._said = path or "the model's chat template"
        self.name = f"template {path}" if self._own is not None else f"template of {model}"

    def render(self, chat: Chat, origin: str) -> tuple[str, bool]:
        """A chat as text, and whether a template made it and wrote all special tokens.

        Raises:
            CalibrationError: If there is no template, or if it refuses the chat.
        """
        if not chat.messages:
            return "", False
        if self._own is None and (self._none or not self._tokenizer.chat_template):
            if chat.plain is not None:
                return chat.plain.text, False
            has_none = "the model's tokenizer has no chat template"
            raise CalibrationError(
                f"{origin} holds chat messages, but "
                f"{'`chat_template` is none' if self._none else has_none}: write "
                "`:chat_template=FILE.jinja` behind the source, or give `text`"
            )
        return self._rendered(chat, origin), True

    def answers(self, chat: Chat, text: str, origin: str) -> tuple[Span, ...]:
        """Where in the text of a chat the assistant's turns are.

        They are what the template marks by `{% generation %}`, or what the text gains with each
        of the assistant's messages.

        Args:
            chat: A chat that the template wrote.
            text: Its text.
            origin: Its place, for errors.

        Raises:
            CalibrationError: If they cannot be found.
        """
        for messages in _forms(chat):
            try:
                written = self._apply(messages, chat.tools)
            except Exception:  # as in `render`, which went on with another form
                continue
            if written == text:
                spans = self._turns(messages, chat.tools, text)
                if spans is not None:
                    return spans
        raise CalibrationError(
            f"{origin}: the {self.name} does not tell which tokens are the assistant's: earlier "
            "messages are written in another way if others follow, and it has no "
            "`{% generation %}`; put `{% generation %}` and `{% endgeneration %}` around what it "
            "writes of an assistant's message, in a copy that `:chat_template=FILE.jinja` names, "
            "or write `:loss_on=all`"
        )

    def _turns(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], text: str
    ) -> tuple[Span, ...] | None:
        template, offered = self._with(tools)
        if not marks_turns(template):
            return turns_by_prefixes(
                text, messages, lambda some, invite: self._apply(list(some), tools, invite=invite)
            )
        encoded: Any = self._tokenizer.apply_chat_template(
            messages,
            tools=offered,
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
        )
        return masked_spans(encoded["assistant_masks"], encoded["offset_mapping"])

    def _rendered(self, chat: Chat, origin: str) -> str:
        messages = [dict(message) for message in chat.messages]
        try:
            text = self._apply(messages, chat.tools)
        except Exception as error:  # a template is a program: it may raise anything
            if all("content" in message for message in messages):
                raise CalibrationError(
                    f"{origin}: {self._said} refuses this chat: {error}"
                ) from error
            # A tool call has no content. Some templates read it all the same.
            return self._rendered(Chat(tuple(_filled(chat)), chat.tools), origin)
        if any(_words(message) and _words(message) in text for message in messages):
            return text
        # Templates of vision models may read lists of parts alone, and drop strings.
        try:
            in_parts = self._apply([_in_parts(message) for message in messages], chat.tools)
        except Exception:
            return text
        return in_parts if any(_words(m) and _words(m) in in_parts for m in messages) else text

    def _with(self, tools: Sequence[Mapping[str, Any]]) -> tuple[str, Any]:
        """The template for some tools, with its clock replaced, and the tools that it reads."""
        template = self._own
        offered: Any = [dict(tool) for tool in tools] or None
        if template is None:
            template = self._tokenizer.get_chat_template(tools=offered)
        if _CLOCK in template:
            self._tally.dated = (
                f"the {self.name} writes today's date; it is given {TODAY:%d %b %Y} on every day, "
                "so that equal text gives equal tokens"
            )
            template = _clock() + template
        return template, offered

    def _apply(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        invite: bool = False,
    ) -> str:
        template, offered = self._with(tools)
        rendered = self._tokenizer.apply_chat_template(
            messages,
            tools=offered,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=invite,
        )
        return str(rendered)


def _clock() -> str:
    """A macro that replaces the function by which templates ask for the date."""
    replaced = "".join(
        f" | replace('%{pad}{letter}', '{_formatted(letter, pad)}')"
        for letter in _DIRECTIVES
        for pad in ("-", "")
    )
    return f"{{%- macro {_CLOCK}(format) %}}{{{{ format{replaced} }}}}{{%- endmacro %}}"


def _formatted(letter: str, pad: str) -> str:
    text = TODAY.strftime(f"%{letter}")
    return (text.lstrip("0") or "0") if pad else text


def _words(message: Mapping[str, Any]) -> str:
    return str(message.get("content", "")).strip()


def _filled(chat: Chat) -> list[dict[str, Any]]:
    return [{"content": "", **message} for message in chat.messages]


def _forms(chat: Chat) -> list[list[dict[str, Any]]]:
    """The forms of a chat's messages that `render` tries."""
    own, filled = [dict(message) for message in chat.messages], _filled(chat)
    forms = [own, filled] if own != filled else [own]
    return [*forms, *([_in_parts(message) for message in form] for form in forms)]


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message.get("content", "")}]}


def _read(path: str) -> str:
    try:
        return expanded(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not there, no UTF-8, a NUL byte
        raise CalibrationError(f"the chat template {path!r} cannot be read: {error}") from error
