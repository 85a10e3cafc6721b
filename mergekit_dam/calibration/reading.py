"""A source -> documents, read lazily with one model's tokenizer."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mergekit_dam.calibration.documents import Document, documents_from
from mergekit_dam.calibration.files import local_rows
from mergekit_dam.calibration.folders import find_files
from mergekit_dam.calibration.formats import RowReader, columns_of
from mergekit_dam.calibration.hub import hub_rows, resolve_revision
from mergekit_dam.calibration.pieces import Intake
from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.calibration.tally import Tally
from mergekit_dam.calibration.templates import ChatTemplate
from mergekit_dam.errors import CalibrationError


@dataclass(frozen=True, slots=True)
class Reading:
    """The documents of a source, which are still to be read.

    Attributes:
        documents: Read when they are asked for.
        tally: What was left out of rows or replaced, so far.
        template: Name of the chat template, for the log.
        left_out: Sentences that say which files were left out.
        revision: Revision of a Hub dataset; a commit if the Hub answered.
    """

    documents: Iterator[Document]
    tally: Tally
    template: str
    left_out: tuple[str, ...] = ()
    revision: str | None = None

    def read_as(self, intake: Intake) -> str:
        """As what the documents were read: "ShareGPT, 2,311 chats, template of org/math"."""
        forms = [
            f"{form}, {count:,} {'chats' if templated else 'documents'}"
            for (form, templated), count in sorted(intake.forms.items(), reverse=True)
        ]
        chats = any(templated for _, templated in intake.forms)
        return " and ".join(forms) + (f", {self.template}" if chats else "")


def open_source(
    source: CalibrationSource, *, tokenizer: PreTrainedTokenizerBase, model: str, seed: int
) -> Reading:
    """Find the files or the dataset of a source, and prepare to read its rows.

    Args:
        source: What to read.
        tokenizer: The model's tokenizer, whose chat template renders chats.
        model: Name of the model, for the log.
        seed: Seed of the order of the files, or of the rows of a Hub dataset.

    Raises:
        CalibrationError: If there is nothing to read, or if the tokenizer cannot tell which
            tokens are an assistant's.
    """
    tally = Tally()
    template = ChatTemplate(tokenizer, path=source.chat_template, model=model, tally=tally)
    padding = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else None
    reader = RowReader(
        form=source.format,
        column=source.column,
        padding=padding,
        is_end=padding is not None and padding == tokenizer.eos_token_id,
        tally=tally,
    )
    columns = columns_of(source.column)
    revision: str | None = None
    left_out: tuple[str, ...] = ()
    if source.kind == "hub":
        revision = resolve_revision(source)
        rows = hub_rows(source, columns=columns, revision=revision, seed=seed)
    else:
        found = find_files(source)
        rows, left_out = local_rows(found.files, columns=columns, seed=seed), found.left_out
    answers = template.answers if source.loss_on == "assistant" else None
    if answers is not None and not tokenizer.is_fast:
        raise CalibrationError(
            f"{source.text!r}: `loss_on=assistant` needs a tokenizer that tells the characters of "
            f"its tokens, but that of {model} is a slow one: remove `loss_on`, or save the model "
            "with a tokenizer.json"
        )
    documents = documents_from(rows, reader=reader, render=template.render, answers=answers)
    return Reading(documents, tally, template.name, left_out, revision)
