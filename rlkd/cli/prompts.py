"""`rlkd prompts`: look at templates before a teacher reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, show and render prompt templates.", no_args_is_help=True, rich_markup_mode=None)

SPEC = "dataset[/subset][:name] or file.yaml[:name]"
TemplatesDir = Annotated[
    Path | None, typer.Option(help="Folder of templates. Default: ./prompts, then those shipped with rlkd.")
]


@app.command("list")
def list_(
    spec: Annotated[str | None, typer.Argument(help=f"{SPEC}; without it, the data sets.")] = None,
    templates_dir: TemplatesDir = None,
) -> None:
    """Data sets that have templates, or the templates of one data set or file."""
    from ..data.prompts import list_datasets, load_templates, template_folders

    if spec is None:
        for name, file in list_datasets(template_folders(templates_dir)).items():
            typer.echo(f"{name}\t{file}")
        return
    for template in load_templates(spec, folder=templates_dir):
        task = {True: "original task", False: "other task", None: ""}[template.original_task]
        typer.echo(f"{template.name}\t{template.id}\t{task}".rstrip())


@app.command()
def show(spec: Annotated[str, typer.Argument(help=SPEC)], templates_dir: TemplatesDir = None) -> None:
    """The source of templates and the columns they read."""
    from ..data.prompts import load_templates

    for template in load_templates(spec, folder=templates_dir):
        typer.echo(f"# {template.name} ({template.id})")
        typer.echo(f"columns: {', '.join(sorted(template.columns(target=True)))}")
        if template.answer_choices:
            typer.echo(f"answer_choices: {template.answer_choices}")
        typer.echo(f"{template.source}\n")


@app.command()
def render(
    spec: Annotated[str, typer.Argument(help=SPEC)],
    dataset: Annotated[str, typer.Option(help="Rows to render: a local file, a folder of parquet, or a hub id.")],
    subset: Annotated[str | None, typer.Option(help="Subset of a hub data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set or of a folder of shards.")] = "train",
    limit: Annotated[int, typer.Option(help="Number of rows.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Seed of templates that draw at random.")] = 0,
    templates_dir: TemplatesDir = None,
) -> None:
    """The first rows of a data set under templates, input and target."""
    from ..data.examples import check_template_columns
    from ..data.prompts import load_templates
    from ..data.rows import load_rows

    templates = load_templates(spec, folder=templates_dir)
    rows = load_rows(dataset, split=split, subset=subset, limit=limit)
    check_template_columns(rows, templates, dataset, target=False)
    for number, row in enumerate(rows):
        for template in templates:
            rendered = template.render(row, seed=seed)
            typer.echo(f"# row {number}, {template.name}")
            if rendered is None:
                typer.echo("(not applicable)\n")
            else:
                typer.echo(f"{rendered[0]}\n-> {rendered[1] if rendered[1] is not None else '(no target)'}\n")
