"""The verb `study`, one command a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import Json, Offline, Threads, app, listed, use_threads
from secateur.errors import UsageError

__all__ = ["gpt2", "studies", "threshold"]

studies = typer.Typer(
    no_args_is_help=True, help="Studies that end in a table and a report.", rich_markup_mode=None
)
app.add_typer(studies, name="study")


@studies.callback()
def common() -> None:
    """Studies that end in a table and a report."""


@studies.command()
def threshold(
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    data: Annotated[Path | None, typer.Option(help="mnist.npz; default: scikit-learn's digits")] = None,
    samples: Annotated[
        int | None, typer.Option(min=100, help="pictures to train on; default: at most 20000")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="default: 2 for MNIST, 15 for the digits")] = None,
    tau: Annotated[float, typer.Option(min=0, help="threshold after training")] = 0.4,
    sweep: Annotated[
        str, typer.Option(help="more thresholds, comma-separated")
    ] = "0.01,0.02,0.05,0.1,0.15,0.2,0.3,0.4",
    loop_tau: Annotated[float, typer.Option(min=0, help="threshold in the training loop")] = 0.001,
    loop_percentile: Annotated[
        float, typer.Option(min=0, max=100, help="percentile in the training loop")
    ] = 20.0,
    pictures: Annotated[bool, typer.Option(help="also write PNG files, with matplotlib")] = True,
    if_exists: Annotated[str, typer.Option("--if-exists", help="fail or overwrite")] = "fail",
    seed: Annotated[int, typer.Option(min=0, help="of the initial weights and the order of the pictures")] = 0,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """A small network's weights: initial, trained, thresholded in the training loop, and pruned at a sweep of tau."""
    use_threads(threads)
    from secateur.folder import new_folder
    from secateur.study.threshold import Plan, images, study, write_study
    from secateur.terminal import progress

    try:
        taus = tuple(float(word) for word in listed([sweep]))
    except ValueError:
        raise UsageError(f"--sweep {sweep!r}: expected numbers with commas between, as 0.1,0.2") from None
    given = images(data, samples=20_000 if samples is None else samples, seed=seed)
    rounds = epochs if epochs is not None else (15 if data is None else 2)
    plan = Plan(rounds, loop_tau, loop_percentile, tau, taus, seed)
    with new_folder(out, if_exists) as folder, progress() as tell:
        stages = study(given, plan, tell)
        write_study(folder, given, plan, stages, pictures=pictures)
    if json_:
        rows = [
            {"stage": s.name, "zeros": s.zeros, "weights": s.size, "accuracy": s.accuracy.value} for s in stages
        ]
        typer.echo(json.dumps({"out": str(out), "stages": rows}))
        return
    width = max(len(stage.name) for stage in stages)
    typer.echo(f"{given.name}: {len(given.train[1]):,} pictures to train on, {len(given.test[1]):,} to test on")
    typer.echo(f"{'':{width}}{'zeros':>10}{'of':>10}{'accuracy':>10}")
    for stage in stages:
        typer.echo(f"{stage.name:{width}}{stage.zeros:10,}{stage.size:10,}{stage.accuracy.value:10.2%}")
    typer.echo(f"written  {out}\nreport   {out}/report.html")


@studies.command()
def gpt2(
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    model: Annotated[
        str | None, typer.Option(help="causal language model; default: the small GPT-2 of this package")
    ] = None,
    smaller: Annotated[
        str | None, typer.Option(help="smaller model with the same tokens; default: one is distilled")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="TEXT to measure perplexity on; default: python-docs")
    ] = None,
    train: Annotated[str | None, typer.Option(help="TEXT to fine-tune on; goes with --text")] = None,
    reviews: Annotated[
        list[str] | None,
        typer.Option(help="table with text and label; twice: to fit on, to judge by"),
    ] = None,
    summaries: Annotated[
        str | None, typer.Option(help="table with articles: FILE or FILE:document:summary")
    ] = None,
    groups: Annotated[str, typer.Option(help="n of merged_n and compressed_n")] = "2,4,6,8,10",
    nonzero: Annotated[
        str | None, typer.Option(help="non-zeros of the pruned model, as 104.69M; default: the same fraction")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=64, help="to judge by")] = None,
    train_tokens: Annotated[int | None, typer.Option(min=64, help="to fine-tune on")] = None,
    context: Annotated[int | None, typer.Option(min=48, help="tokens of a window that is trained on")] = None,
    articles: Annotated[int | None, typer.Option(min=1, help="to fine-tune on")] = None,
    lr: Annotated[float | None, typer.Option(help="peak rate of the fine-tuning")] = None,
    pictures: Annotated[bool, typer.Option(help="also write a PNG file, with matplotlib")] = True,
    if_exists: Annotated[str, typer.Option("--if-exists", help="fail, resume or overwrite")] = "resume",
    seed: Annotated[int, typer.Option(min=0, help="of every choice")] = 0,
    threads: Threads = None,
    json_: Json = False,
    offline: Offline = False,
) -> None:
    """Pruned, merged and compressed models beside a smaller one, before and after the same fine-tuning."""
    use_threads(threads)
    from secateur import model as models
    from secateur.demo.language import model_folder
    from secateur.folder import new_folder
    from secateur.request import parse_count, spec_name
    from secateur.study.gpt2 import Plan, Sources, read, study, write_study
    from secateur.study.gpt2.pages import as_markdown
    from secateur.terminal import progress

    if reviews is not None and len(reviews) != 2:
        raise UsageError(f"--reviews is given {len(reviews)} times; expected twice: to fit on, and to judge by")
    try:
        sizes = tuple(int(word) for word in listed([groups]))
    except ValueError:
        raise UsageError(f"--groups {groups!r}: expected whole numbers with commas between, as 2,4,6") from None
    given_settings = {
        "nonzero": None if nonzero is None else parse_count(nonzero),
        "tokens": tokens, "train_tokens": train_tokens, "context": context, "articles": articles, "lr": lr,
    }  # fmt: skip
    plan = Plan(groups=sizes, seed=seed, **{k: v for k, v in given_settings.items() if v is not None})  # type: ignore[arg-type]
    sources = Sources(text, train, None if reviews is None else (reviews[0], reviews[1]), summaries)
    spec = model or model_folder()
    loaded = models.load(spec, offline=offline)
    small = None if smaller is None else models.load(smaller, offline=offline)
    name = spec_name(spec) if model else "the package's GPT-2 of 3.5 million parameters"
    with new_folder(out, if_exists) as folder, progress() as tell:
        given = read(sources, plan, loaded.tokenizer, loaded.model)
        found = study(
            name, loaded, small, given, plan, folder / "run" / "state", tell,
            show=lambda part: write_study(folder, part, given, plan),
        )  # fmt: skip
        write_study(folder, found, given, plan, pictures=pictures)
    if json_:
        typer.echo((out / "study.json").read_text())
        return
    typer.echo(as_markdown(found))
    typer.echo(f"written  {out}\nreport   {out}/report.html")
