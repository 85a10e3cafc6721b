"""`dam_report.html`: one file that opens from a disk and asks for nothing else."""

from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mergekit_dam.coefficients.file import REPORT_NAME
from mergekit_dam.errors import DamError
from mergekit_dam.reports.content import Section
from mergekit_dam.reports.depth import grid_of
from mergekit_dam.reports.pictures.colours import DARK, LIGHT, css, fills
from mergekit_dam.reports.schema import DamReport, read
from mergekit_dam.reports.sections.course import cost, trials
from mergekit_dam.reports.sections.gains import gains
from mergekit_dam.reports.sections.inputs import settings, text
from mergekit_dam.reports.sections.losses import losses
from mergekit_dam.reports.sections.maps import by_depth, coefficients, corrections
from mergekit_dam.reports.spared import merge_spared
from mergekit_dam.reports.summary import summary_of
from mergekit_dam.stored import written_whole

PAGE_NAME = "dam_report.html"


def sections_of(report: DamReport) -> list[Section]:
    """The sections of the page, from top to bottom; those without numbers are left out."""
    grid = grid_of(report)
    every = [
        gains(report, summary_of(report)),
        coefficients(report, grid),
        by_depth(report, grid),
        corrections(grid),
        losses(report, grid),
        trials(report),
        cost(report),
        text(report),
        settings(report),
    ]
    return [section for section in every if section is not None]


def render(report: DamReport, name: str) -> str:
    """The page as HTML; the same report gives the same text.

    Args:
        name: Name of the merged model.
    """
    template = _environment().get_template("page.html.j2")
    return template.render(report=report, name=name, sections=sections_of(report))


def write_page(folder: Path, page: Path | None = None) -> Path:
    """Make the page of a merge from its `dam_report.json`.

    Args:
        folder: Folder of the merged model.
        page: File to write; `dam_report.html` in the folder by default.

    Returns:
        The file that was written.

    Raises:
        DamError: The folder has no report, or a damaged one.
    """
    page = page or folder / PAGE_NAME
    html = render(read(folder / REPORT_NAME), folder.resolve().name)
    with written_whole(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return page


def remake_page(folder: Path, page: Path | None = None) -> Path:
    """The same as `write_page`, for a user who names the file.

    Raises:
        DamError: The page cannot be written, either.
    """
    try:
        return write_page(folder, page)
    except OSError as error:
        raise DamError(
            f"{page or folder / PAGE_NAME}: required a file that can be written ({error}); name "
            f"another one with `--html`"
        ) from error


def make_page(folder: Path) -> None:
    """Make the page at the end of a merge, which a page that cannot be made does not undo.

    Raises:
        OSError: The file cannot be written, as other files of the merge could not be then.
    """
    with merge_spared(
        f"{PAGE_NAME} could not be made; the merged model does not need it. "
        f"`mergekit-dam report` tries again"
    ):
        write_page(folder)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mergekit_dam.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": Markup, "code": _code}
    environment.globals |= {
        "asset": _asset,
        "light": Markup(css(LIGHT)),
        "dark": Markup(css(DARK)),
        "fills": Markup(fills()),
    }
    return environment


def _asset(name: str) -> Markup:
    """The text of a style sheet or script of the package."""
    return Markup((resources.files(__package__) / "templates" / name).read_text("utf-8"))


def _code(sentence: str) -> Markup:
    """A sentence whose `names` are set as code."""
    parts = sentence.split("`")
    tags = (Markup("<code>{}</code>") if k % 2 else Markup("{}") for k in range(len(parts)))
    return Markup("").join(tag.format(part) for tag, part in zip(tags, parts, strict=True))
