"""Chats -> text, with the model's own chat template or the one its source names."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mergekit_dam.errors import CalibrationError

from .documents import Message, RenderChat


def chat_renderer(tokenizer: PreTrainedTokenizerBase, *, template_path: str | None) -> RenderChat:
    """A function that renders `(messages, origin)` with the template in the file
    `template_path`, or with the tokenizer's own.

    It raises CalibrationError, naming `origin`, if the template refuses the chat, or if
    there is none; the file is read here, and is reported here if it cannot be.
    """
    template = _read(template_path) if template_path is not None else None

    def render(messages: Sequence[Message], origin: str) -> str:
        if not messages:
            return ""
        if template is None and not tokenizer.chat_template:
            raise CalibrationError(
                f"{origin} holds chat messages, but the model's tokenizer has no chat "
                "template: write `:chat_template=FILE.jinja` behind the source, or give `text`"
            )
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages], chat_template=template, tokenize=False
            )
        except Exception as error:  # a template is a program: it may raise anything
            name = template_path or "the model's chat template"
            raise CalibrationError(f"{origin}: {name} refuses this chat: {error}") from error
        return str(text)

    return render


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"the chat template {path} cannot be read: {error}") from error
