"""The `mft` command. Imports nothing heavy at the top: `mft --help` answers at once."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mft_core.errors import ConfigError, StageError, told
from mft_core.names import printable, without_secrets

if TYPE_CHECKING:
    from mft_core.store.artifacts import ArtifactStore
    from pipelines.plan.plan import Plan
    from pipelines.report.asked import Asked

_LONGEST = 4_000
"""characters of an error, in which names of any length may stand"""
app = typer.Typer(
    help="Can a fine-tuned LLM be made better by removing weights? Where, how much, and is the gain real?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
mask_app = typer.Typer(help="Look at mask files, combine, apply and undo them.", no_args_is_help=True)
app.add_typer(mask_app, name="mask")
model_app = typer.Typer(help="Make checkpoints of other files.", no_args_is_help=True)
app.add_typer(model_app, name="model")

StudyName = Annotated[str, typer.Argument(help="name of a shipped study, or a YAML file")]
ProfileName = Annotated[str, typer.Option("--profile", help="name of a shipped profile, or a YAML file")]
Budget = Annotated[str | None, typer.Option("--budget", help="the profile's size for less time, e.g. small; else full")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override a setting, e.g. mask.training.epochs=2")]
Seeds = Annotated[str | None, typer.Option(help="comma-separated, instead of the study's own, e.g. 0,1,2")]
Replicates = Annotated[int | None, typer.Option(min=1, help="fine-tunings, instead of the study's own number")]
Until = Annotated[
    Literal["decided"] | None,
    typer.Option(help="add fine-tunings at 3, 5, 8, 12 (--replicates: the most) till the contrasts are decided"),
]
Rerun = Annotated[list[str] | None, typer.Option("--rerun", help="compute this stage again even where cached")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


def main() -> None:
    """Run the command line; exit codes: 0 success, 1 a stage failed, 2 bad usage, 130 Ctrl-C or SIGTERM (by typer)."""
    _open_closed_streams()
    code: Any = 0
    try:
        app()
    except SystemExit as asked:
        code = asked.code
    except ConfigError as error:
        print(f"error: {_told(error)}", file=sys.stderr)
        code = 2
    except (StageError, OSError) as error:  # of the system: a full disk, a folder that may not be read
        print(f"failed: {_told(error)}", file=sys.stderr)
        code = 1
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":  # a tokenizer's own, which is no Exception
            raise
        print(f"error: the tokenizer gives up on a text ({_told(error)}); give a sound one.", file=sys.stderr)
        code = 2
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # `| head -1` has seen enough; typer ends with 1 where it notices earlier
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left, to stop servers, happens without us too
    sys.exit(code)


def _open_closed_streams() -> None:
    """Put the null device where the shell closed a stream (`>&-`), or the next open file takes its place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may have what the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")


def _told(error: BaseException) -> str:
    text = printable(without_secrets(told(error)))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def _version(asked: bool) -> None:
    if asked:
        print(importlib.metadata.version("mft-pipeline"))
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
]


@app.callback()
def options(version: Version = False) -> None:
    # no docstring: it would take the place of the app's help
    pass


@app.command()
def plan(
    study: StudyName,
    profile: ProfileName = "tiny",
    budget: Budget = None,
    overrides: Overrides = None,
    seeds: Seeds = None,
    replicates: Replicates = None,
    as_json: AsJson = False,
    on: Annotated[str | None, typer.Option(help="another device to tell the times of: cpu, h100, a100, …")] = None,
) -> None:
    """Show what a study would run: runs, stages, what is cached, time, memory and disk. Computes nothing."""
    from mft_core.store.artifacts import ArtifactStore
    from pipelines.cost.plan_view import as_dict, show, show_together
    from pipelines.cost.predicted import bills, device_of
    from pipelines.cost.probe import probe
    from pipelines.plan.preflight import check_weights_named

    asked, store = _asked(study, profile, budget, overrides, seeds, replicates), ArtifactStore.from_environment()
    plans = asked.plans(store, unpinned=True)
    for each in plans:
        check_weights_named(each)
    device = device_of(plans[0].runtime)
    known = {} if on is not None else probe(plans, store, device, lambda text: print(text, file=sys.stderr))
    priced = bills(plans, store, on, known)
    if as_json:
        found = [as_dict(bill) for bill in priced]
        print(json.dumps(found if len(found) > 1 else found[0], indent=2))
    elif len(priced) == 1:
        show(priced[0])
    else:
        show_together(priced)


@app.command()
def run(
    study: StudyName,
    profile: ProfileName = "tiny",
    budget: Budget = None,
    overrides: Overrides = None,
    seeds: Seeds = None,
    replicates: Replicates = None,
    until: Until = None,
    rerun: Rerun = None,
    as_json: AsJson = False,
) -> None:
    """Run a study (only what is not cached) and print its answer."""
    asked = _asked(study, profile, budget, overrides, seeds, replicates)
    if until is None:
        rows, table, page = _run_study(asked, rerun)
    else:
        from pipelines.report.command import undecided_contrasts
        from pipelines.report.looks import declared

        done: set[str] = set()  # a look judges what the one before has drawn, and draws none of it again
        for look in declared(asked):
            rows, table, page = _run_study(look, rerun, done)
            if not (contrasts := undecided_contrasts(look)):
                break
            print(f"undecided with {look.replicates} fine-tunings: {', '.join(contrasts)}", file=sys.stderr)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print(f"\n{table}")
    print(f"report:          {page}\nbrowse the runs: mft up   (then the MLflow and Prefect UIs)")


def _run_study(asked: Asked, rerun: list[str] | None, done: set[str] | None = None) -> Any:
    """Run a study; returns its rows, its table and its page. What is `done` is not computed again."""
    from pipelines.config.study import load_study
    from tasks.mlflow import client

    plans, store = _checked_plans(asked, rerun)
    given = plans, store, load_study(asked.study), asked, rerun or [], done

    def planned(flows: Any) -> Any:
        client.load()  # takes seconds, in which the Prefect server starts
        return flows.mft_ablation, lambda: flows.run_study(*given)

    return _run_flow(store, planned, asked, rerun)


@app.command()
def verdict(
    checkpoint: Annotated[str, typer.Argument(help="of the fine-tuned model: a directory, or a hub name")],
    data: Annotated[list[Path], typer.Option(help="training rows: JSON lines, JSON or Parquet; may be given again")],
    benchmark: Annotated[
        list[str], typer.Option(help="a folder of tasks, or lm-eval's name of one; may be given again")
    ],
    base: Annotated[str | None, typer.Option(help="what the checkpoint was fine-tuned from")] = None,
    budget: Annotated[str, typer.Option(help="time until the answer, e.g. 2h, 90m, 1h30m")] = "2h",
    out: Annotated[Path | None, typer.Option(help="the profile that is written; by default verdict-NAME.yaml")] = None,
    as_json: AsJson = False,
) -> None:
    """Find out whether a fine-tuned checkpoint can be made better by removing weights: yes, no, or what it would take.

    Runs the study `verdict` with a profile that is written for you, within the budget; trains nothing but masks, and
    further training for comparison. The same command goes on where an earlier one stopped.
    """
    from pipelines.commands.verdict import asked_for
    from pipelines.report.asked import Asked

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    question, store = asked_for(checkpoint, data, benchmark, base, budget, out)

    def planned(flows: Any) -> Any:
        return flows.mft_ablation, lambda: flows.run_verdict(question, store)

    found, merged, rows, table, page = _run_flow(store, planned, Asked("verdict", str(question.path)), None)
    where = f" The merged checkpoint lies in {merged}." if merged and found.word == "better" else ""
    if as_json:
        row = {name: found.row[name] for name in ("variant", "n", "gain", "gain_low", "gain_high")} if found.row else {}
        answer = {"verdict": found.word, "sentence": found.sentence, **row, "checkpoint": merged and str(merged)}
        print(json.dumps({**answer, "profile": str(question.path), "report": page, "rows": rows}, indent=2))
        return
    print(f"\n{table}\nprofile: {question.path}\nreport:  {page}\n\n{found.sentence}{where}")


@app.command()
def stage(
    name: Annotated[str, typer.Argument(metavar="STAGE", help="e.g. learn-mask")],
    study: StudyName,
    profile: ProfileName = "tiny",
    budget: Budget = None,
    overrides: Overrides = None,
    seeds: Seeds = None,
    replicates: Replicates = None,
    rerun: Rerun = None,
    as_json: AsJson = False,
) -> None:
    """Run one stage of a study, and what it needs; prints where its artifacts lie."""
    from mft_core.stages import get_stage

    get_stage(name)
    asked = _asked(study, profile, budget, overrides, seeds, replicates)
    plans, store = _checked_plans(asked, rerun)
    given = name, plans, store, asked, rerun or []

    def planned(flows: Any) -> Any:
        return flows.stage_flow(name), lambda: flows.run_stage(*given)

    made = _run_flow(store, planned, asked, rerun)
    if as_json:
        print(json.dumps(made, indent=2))
        return
    for item in made:
        print(f"{item['label']}\n  {item['directory']}")


@app.command()
def report(
    study: StudyName,
    profile: ProfileName = "tiny",
    budget: Budget = None,
    overrides: Overrides = None,
    seeds: Seeds = None,
    replicates: Replicates = None,
    until: Until = None,
    as_json: AsJson = False,
    sync: Annotated[bool, typer.Option("--sync", help="write all numbers to MLflow again")] = False,
    out: Annotated[
        Path | None, typer.Option(help="folder of the pages; by default reports/STUDY-PROFILE under MFT_HOME")
    ] = None,
) -> None:
    """Write the report of a study that has been run (Markdown, HTML, CSV, Parquet), and print its answer.

    From its artifacts alone: needs no server and computes nothing.
    """
    from pipelines.report.command import write, write_last_look

    asked = _asked(study, profile, budget, overrides, seeds, replicates)
    reports, page = (write if until is None else write_last_look)(asked, out, sync)
    if as_json:
        print(json.dumps([row for found in reports for row in (*found.rows, *found.contrasts)], indent=2))
        return
    print("\n\n".join(found.table for found in reports))
    print(f"report: {page}")


@app.command()
def compare(
    a: Annotated[
        Path,
        typer.Argument(
            help="the baseline: lm-eval's samples_*.jsonl, a folder of them, an evaluation "
            "of this project, or JSONL with id and score"
        ),
    ],
    b: Annotated[Path, typer.Argument(help="the other model's, on the same items")],
    margin: Annotated[
        float, typer.Option(help="points below which a gain or a loss is not worth having; of scores beyond 1, units")
    ] = 1.0,
    cluster: Annotated[str | None, typer.Option(help="field that names items which belong together")] = None,
    metric: Annotated[str | None, typer.Option(help="such as exact_match, or exact_match,strict-match")] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether model B is better than model A, item by item. Exit code: 0 not worse, 1 worse, 3 undecided."""
    from pipelines.commands.compare import compare as compare_logs

    sys.exit(compare_logs(a, b, margin, metric, cluster, as_json))


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="the model of a shipped profile, e.g. smollm2-135m, or alpaca-eval")],
) -> None:
    """Fetch the model or benchmark of a profile once; afterwards nothing of it needs a network."""
    from mft_core.store.artifacts import ArtifactStore
    from pipelines.commands.fetch import fetch as fetched

    print(fetched(name, ArtifactStore.from_environment()))


@app.command()
def status(as_json: AsJson = False) -> None:
    """Say what runs under MFT_HOME and how far it is, and what became of what ran lately; from any terminal."""
    from mft_core.store.artifacts import ArtifactStore
    from pipelines.commands.status import text
    from pipelines.servers.runs import runs

    home = ArtifactStore.from_environment().home
    print(json.dumps(runs(home), indent=2) if as_json else text(runs(home), home))


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="delete it; without this, it is only shown")] = False,
    older: Annotated[int, typer.Option(min=1, max=10_000, metavar="DAYS", help="keep what is younger")] = 7,
    as_json: AsJson = False,
) -> None:
    """Show (or delete) what no study with a page under MFT_HOME/reports reaches: artifacts, states, logs, rows."""
    from mft_core.store.artifacts import ArtifactStore
    from pipelines.commands.gc import collect

    store = ArtifactStore.from_environment()
    waste = collect(store, older, delete)
    if as_json:
        paths = {kind: [str(path) for path in found] for kind, found in waste.paths.items()}
        rows = {"prefect_runs": waste.prefect_runs, "mlflow_runs": list(waste.mlflow_runs)}
        print(json.dumps({"deleted": delete, "bytes": waste.sizes, "paths": paths, **rows}, indent=2))
        return
    print(f"{'deleted' if delete else 'would be deleted'}, older than {older} days, under {store.home}:")
    print("\n".join(waste.lines()))
    if store.shared:
        print(f"Of this machine only: what lies in {printable(without_secrets(store.shared.url))} stays.")
    if not delete:
        print("nothing is deleted yet; that is done by: mft gc --delete")


@app.command()
def up() -> None:
    """Start the Prefect server, the MLflow UI and the served deployments; Ctrl-C stops them."""
    from mft_core.store.artifacts import ArtifactStore
    from pipelines.servers.services import up as start_services

    store = ArtifactStore.from_environment()
    store.check_writable()
    start_services(store.home)


@app.command()
def doctor(profile: ProfileName = "tiny", as_json: AsJson = False) -> None:
    """Say what this machine lacks for a profile: models, data, disk, memory, network, packages."""
    from pipelines.commands.doctor import examine

    findings = examine(profile)
    if as_json:
        print(json.dumps([finding.__dict__ for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{'ok     ' if finding.ok else 'MISSING'}  {finding.what}: {finding.detail}")
    if not all(finding.ok for finding in findings):
        sys.exit(1)


def _asked(
    study: str, profile: str, budget: str | None, overrides: list[str] | None, seeds: str | None, replicates: int | None
) -> Asked:
    """Return what is asked: of the profile itself where the budget is `full`, else of PROFILE-BUDGET beside it."""
    from pipelines.config.by_name import locate
    from pipelines.report.asked import Asked

    suffix = Path(profile).suffix if profile.endswith((".yaml", ".yml")) else ""
    sized = profile if budget in (None, "full") else f"{profile.removesuffix(suffix)}-{budget}{suffix}"
    if sized != profile:
        try:
            locate("profile", sized)
        except ConfigError as error:
            raise ConfigError(f"--budget {budget}: {profile} has no such size; leave it out. ({error})") from None
    return Asked(study, sized, overrides or [], _seeds(seeds), replicates)


def _checked_plans(asked: Asked, rerun: list[str] | None) -> tuple[list[Plan], ArtifactStore]:
    """Plan, and refuse here all that can be known to fail, before a server or a model is started."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the study runs there is nothing to stop and nothing to say
    return asked.checked_plans(rerun or [])


def _run_flow(
    store: ArtifactStore, pick: Callable[[Any], tuple[Any, Callable[[], Any]]], asked: Asked, rerun: list[str] | None
) -> Any:
    """Do a flow's work in this process, once a Prefect server is there; it starts while the flows are imported."""
    from pipelines.servers.services import lost_server, use_prefect, wait_for_prefect

    use_prefect(store.home)
    import httpx

    from pipelines import flows
    from pipelines.run import interrupt

    served, work = pick(flows)

    def interruptible() -> Any:
        interrupt.handle_signals()
        return work()

    wait_for_prefect()
    interrupt.handle_signals()
    try:
        return flows.with_work(served, interruptible)(**asked.parameters, rerun=rerun or []).unquote()
    except httpx.HTTPError as error:
        raise StageError(f"{lost_server()} ({error})\nThe same command continues where this one stopped.") from error


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds '{text}': give whole numbers separated by commas, e.g. 0,1,2.") from None
    if min(seeds) < 0 or max(seeds).bit_length() > 63 or len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds '{text}': seeds are different whole numbers from 0 to 2^63 - 1, e.g. 0,1,2.")
    return seeds


@mask_app.command("show")
def mask_show(
    mask: Path,
    figure: Annotated[Path | None, typer.Option(help="write a heat map of where the mask cuts, a .png file")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where a mask cuts: share and number of zeros per layer and module."""
    from pipelines.commands.mask import show

    show(mask, figure, as_json)


@mask_app.command("apply")
def mask_apply(
    base: Path,
    mask: Path,
    out: Path,
    rewind_to: Annotated[
        Path | None, typer.Option(help="of a rewind mask: the model that the fine-tuning started from")
    ] = None,
) -> None:
    """Merge a mask into its base checkpoint; OUT is an ordinary Hugging Face checkpoint."""
    from pipelines.commands.mask import apply

    apply(base, mask, out, rewind_to)


@mask_app.command("undo")
def mask_undo(merged: Path, out: Path) -> None:
    """Take a mask out of a checkpoint that `apply` wrote; OUT is its base again, bit for bit."""
    from pipelines.commands.mask import undo

    undo(merged, out)


@mask_app.command("compare")
def mask_compare(a: Path, b: Path, as_json: AsJson = False) -> None:
    """Compare two masks: overlap (Jaccard index of the removed weights) per layer and module, beside chance."""
    from pipelines.commands.mask import compare

    compare(a, b, as_json)


@mask_app.command("combine")
def mask_combine(
    op: Annotated[str, typer.Argument(help="union, intersection, difference (A without B), or complement (of A)")],
    masks: Annotated[list[Path], typer.Argument(metavar="A [B]", help="masks of one base")],
    out: Annotated[Path, typer.Argument(help="directory of the new mask")],
) -> None:
    """Make a mask of others, by what they remove."""
    from pipelines.commands.mask import combine

    combine(op, masks, out)


@model_app.command("import")
def model_import(file: Path, out: Path) -> None:
    """Write the model of a GGUF file as an ordinary Hugging Face checkpoint, dequantised, with its chat template."""
    from mft_core.checkpoints.gguf import import_gguf

    print(f"{import_gguf(file, out)}; checkpoint written to {out}")


if __name__ == "__main__":
    main()
