"""The command line: parse arguments, run a command, print errors, return the exit code.

Heavy imports are inside the commands, after the settings are validated.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from job import __version__
from job.config.redaction import redact
from job.distributed import place
from job.errors import (
    CRASHED,
    DONE,
    EXIT_CODES,
    INTERRUPTED,
    INVALID_INPUT,
    PUBLISH_FAILED,
    ExitCode,
    InvalidInputError,
    describe_failure,
    print_error,
)
from job.runs import shutdown
from job.system import events, import_hooks, logging_setup, streams
from job.system.printable import printable, printable_line

if TYPE_CHECKING:
    from job.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with shutdown.handled():
        return _run_until_interrupted(arguments)


def command() -> NoReturn:
    """Run one command as a program; after an interruption, exit without waiting for the threads of libraries."""
    streams.protect()
    import_hooks.install()
    with shutdown.handled(then=signal.SIG_IGN):  # when it is over, a signal must not change its exit code
        assignment = place.assignment()
        code = _run_until_interrupted(None) if assignment is None else _work(assignment)
        if code == INTERRUPTED or place.has_others() or shutdown.are_threads_left_behind():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def _work(assignment: place.Assignment) -> int:
    logging_setup.configure(assignment.inputs["settings"]["run"]["log"])  # before the imports log something
    from job import worker  # imports torch, during which a signal is handled already

    return worker.work(assignment)


def _run_until_interrupted(arguments: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(arguments, argparse.Namespace(recipe=None))
        logging_setup.configure()
        code = _run_command(options)
        shutdown.check()
    except KeyboardInterrupt:
        by = f" by {shutdown.received()}" if shutdown.received() else ""
        message = f"interrupted{by}; the same command resumes from what is saved"
        if events.is_json():
            events.write("error", "warning", message, exit_code=INTERRUPTED)
        else:
            print(message, file=sys.stderr)
        return INTERRUPTED
    return code


def _run_command(options: argparse.Namespace) -> int:
    """Load the settings and run the command; print an expected error and return its exit code."""
    from job.config import environment  # takes 0.2 s, in which a signal is handled already

    try:
        logging_setup.configure(environment.log_style(options.recipe))
        for name, value in environment.third_party_variables(options.recipe).items():
            os.environ.setdefault(name, value)
        COMMANDS[options.command].run(options, environment.load(options.recipe))
    except Exception as error:
        shutdown.check()  # a library may have turned the interruption into an error
        failure = describe_failure(error)
        if failure is None:
            raise
        message, code = failure
        if events.is_json():
            events.write("error", "error", printable(redact(message)), exit_code=code)
        else:
            print_error(message)
        return code
    return DONE


def show(result: object) -> None:
    """Print a line of results on standard output; what it quotes from others is made harmless."""
    print(printable_line(str(result)))


def _run(options: argparse.Namespace, settings: Settings) -> None:
    from job import pipeline

    if options.allow_differences and options.manifest is None:
        raise InvalidInputError("--allow-differences is for --from manifest.json; add it, or leave the option out")
    if options.manifest is None:
        show(pipeline.run(settings))
    else:
        show(pipeline.reproduce_run(settings, options.manifest, allow_differences=options.allow_differences))


def _check(options: argparse.Namespace, settings: Settings) -> None:
    from job import preflight
    from job.dataset.summary import describe, summarise

    started = time.monotonic()
    checked = preflight.check(settings)
    machine = preflight.check_machine(checked, preflight.processes_here(checked.settings))
    found = None
    if options.measure:
        from job import measure

        found = measure.measure(checked, machine.processes, checks_seconds=time.monotonic() - started)
    if options.json:
        report = preflight.report_as_json(checked, machine)
        report |= {} if found is None else {"estimate": measure.as_json(found)}
        print(json.dumps(report, indent=2, ensure_ascii=not streams.is_utf(sys.stdout)))
        return
    show(f"base model: {checked.settings.base.model} at {checked.settings.base.revision or 'this machine'}")
    for line in describe(summarise(checked.examples, checked.settings.data)):
        show(line)
    show(f"run: {checked.run.path}{', already complete' if checked.complete else ''}")
    if checked.settings.run.store is not None:
        show(f"store: {checked.settings.run.store}{', which has this run' if checked.run.in_store else ''}")
    show(f"push: {checked.repo or 'nothing will be pushed'}")
    for line in (*machine.describe(), *(found.describe() if found is not None else ())):
        show(line)


def _prefetch(options: argparse.Namespace, settings: Settings) -> None:
    from job import data
    from job.hub import embedders, weights

    show(f"data: {len(data.load(settings.data).train)} examples to train on")
    show(f"base model: {weights.resolve_weights(settings.base)}")
    if embedder := embedders.resolve_embedder(settings.eval):
        show(f"embedding model: {embedder}")


def _retrain(options: argparse.Namespace, settings: Settings) -> None:
    from job import pipeline

    show(pipeline.retrain(settings))


def _evaluate(options: argparse.Namespace, settings: Settings) -> None:
    from job import data, model_card, pipeline
    from job.dataset.split import split_digest
    from job.runs import markup

    held_out = data.load(settings.data).held_out[: settings.eval.limit]
    tagger = pipeline.load_tagger_as_trained(settings, "BASE", "DATA_SEPARATOR", "DATA_MAX_LENGTH", texts=len(held_out))

    from job.evaluate import evaluate

    scores, _ = evaluate(tagger, held_out)
    show(f"split: {len(held_out)} held-out examples, {split_digest(held_out)}")
    for line in markup.markdown_table(model_card.score_table({"adapter": scores})):
        show(line)


def _push(options: argparse.Namespace, settings: Settings) -> None:
    from job import push
    from job.runs import run_folder
    from job.runs.store import stored

    run = run_folder.find_run(settings.run)
    if not run.publishable:
        raise InvalidInputError(
            f"{run.path} was rejected by its gate, or was interrupted before the gate; run the job again with the "
            "same settings, it resumes the run"
        )
    settings = settings.with_result_values(run.manifest["settings"])
    repo = push.prepare_repo(settings)
    if repo is None:
        raise InvalidInputError(
            "there is no token to push with, or TAGGER_HUB_PUSH or HF_HUB_OFFLINE forbids it; set HF_TOKEN"
        )

    from job import notify, pipeline
    from job.system.device import ComputeSpec

    with notify.notified(settings) as ending, run.released_afterwards(), stored(settings.run, run):
        ending.run = run
        run.lock()
        compute = ComputeSpec.resolve(settings.run.device, settings.train.precision)
        ending.result = pipeline.finish(run, settings, repo, compute)
    show(ending.result)


def _promote(options: argparse.Namespace, settings: Settings) -> None:
    from job import promote, push
    from job.hub import access
    from job.hub import client as hub

    if hub.token() is None:
        raise InvalidInputError(
            "promote changes a repo on the Hub and there is no token; set HF_TOKEN to one with write access"
        )
    repo = push.repo_name(settings, access.token_info())
    with hub.publish_errors(f"{repo} could not be changed", "run the same command again"):
        published = promote.promote(repo, options.revision, settings.hub)
    show(f"{published.url} is published, as {published.tag}")


def _sample(options: argparse.Namespace, settings: Settings) -> None:
    from job import data, pipeline, results
    from job.dataset.texts import check_texts

    texts = check_texts(options.texts, "TEXT") or data.inference_texts(settings.sample)
    results.check_output(settings.sample)
    tagger = pipeline.load_tagger_as_trained(settings, "BASE", "DATA", texts=len(texts))
    results.show_samples(tagger.tag(texts), settings.sample.output)


def _tag(options: argparse.Namespace, settings: Settings) -> None:
    from job import pipeline, tag

    settings, adapter = pipeline.find_adapter(settings, *tag.TRAINED_WITH)
    for line in tag.tag(settings, adapter, pipeline.load_adapter, from_the_start=options.restart):
        show(line)


def _runs(options: argparse.Namespace, settings: Settings) -> None:
    from job import compare
    from job.runs import markup

    runs = compare.list_runs(settings.run)
    if options.json:
        print(json.dumps(runs, indent=2))
        return
    for line in markup.plain_table(compare.runs_table(runs)):
        show(line)


def _compare(options: argparse.Namespace, settings: Settings) -> None:
    from job import compare

    comparison = compare.compare(settings.run, *options.runs)
    if options.json:
        print(json.dumps(asdict(comparison), indent=2))
        return
    for line in compare.describe(comparison, shown=options.examples):
        show(line)


def _tune(options: argparse.Namespace, settings: Settings) -> None:
    from job import tune

    if not options.check:
        for line in tune.tune(settings, options.recipe):
            show(line)
        return
    plan = tune.check(settings, options.recipe)
    for line in plan.describe():
        show(line)
    for line in tune.estimate(plan):
        show(line)


def _settings(options: argparse.Namespace, settings: Settings) -> None:
    from job.config import environment, recipes, reference
    from job.settings import to_env

    if options.recipes:
        for name in recipes.recipe_names():
            show(f"{name:<12} {recipes.describe_recipe(name)}")
        return
    if options.env_example or options.markdown:
        print(reference.env_example() if options.env_example else reference.settings_markdown(), end="")
        return
    sources = environment.sources(options.recipe)
    for name, value in settings.values().items():
        show(f"{name}={to_env(value, name)}   # {sources.get(name, 'default')}")
    in_files = environment.third_party_variables(options.recipe)
    for name in ("HF_TOKEN", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"):
        if (value := os.environ.get(name)) is not None:
            source = "a file" if in_files.get(name) == value else "environment"
            show(f"{name}={'***' if name == 'HF_TOKEN' else redact(value)}   # {source}")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return int(text)


@dataclass(frozen=True)
class Command:
    """A subcommand: the function that runs it, and what its --help says."""

    run: Callable[[argparse.Namespace, Settings], None]
    help: str
    """One line, for the list of commands."""
    description: str
    """What the command does and prints."""
    exit_codes: tuple[int, ...] = (DONE, CRASHED, INVALID_INPUT, INTERRUPTED)
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For each argument, the keyword arguments of `ArgumentParser.add_argument`."""
    resumes: bool = False
    """Whether it resumes from what an interrupted one has saved."""


COMMANDS = {
    "run": Command(
        _run,
        "do the complete job: train, evaluate, publish, tag the sample texts",
        "Check everything, fine-tune the base model on the data, evaluate the adapter on held-out examples, publish it "
        "if there is a token and the gate passes, and tag the sample texts. An interrupted run is resumed; a complete "
        "one is not repeated. Prints the tagged texts, then where the adapter is. Progress goes to standard error.",
        tuple(EXIT_CODES),
        {
            "--from": {
                "type": Path,
                "dest": "manifest",
                "metavar": "MANIFEST",
                "help": "reproduce the run of this manifest.json: on the same kind of machine with the same adapter",
            },
            "--allow-differences": {
                "action": "store_true",
                "help": "with --from: reproduce it although data, versions or device differ; they are logged",
            },
        },
        resumes=True,
    ),
    "check": Command(
        _check,
        "check settings, data, token, device, memory and disk, without training",
        "Make the checks that `run` makes before it trains, and nothing else; weights are not downloaded. Prints base "
        "model, data with tags and warnings, run, repo, device, longest example and memory. Problems are reported "
        "together in each of three stages: settings; token, repo, base model and data; device, memory and disk.",
        arguments={
            "--json": {"action": "store_true", "help": "print everything as JSON (job/runs/check.schema.json)"},
            "--measure": {
                "action": "store_true",
                "help": "take a few steps and give a few answers on the device, and print time, memory and price of "
                "the complete run; weights are downloaded",
            },
        },
    ),
    "prefetch": Command(
        _prefetch,
        "download base model and data set, for machines without access to the Hub",
        "Download base model, data set and the model of TAGGER_EVAL_EMBEDDER into the Hugging Face cache. Prints the "
        "number of training examples and the path of the base model.",
    ),
    "retrain": Command(
        _retrain,
        "run only if something has changed, and publish only what is no worse",
        "Do nothing if the published adapter was trained with the same base model, data and settings. Otherwise do "
        "what `run` does, with the gate `published` if TAGGER_EVAL_GATE is off: publish only an adapter that is "
        "shown to be no worse than the published one. Prints what `run` prints, or that there is nothing to do.",
        tuple(EXIT_CODES),
        resumes=True,
    ),
    "evaluate": Command(
        _evaluate,
        "score an adapter on the held-out examples: of TAGGER_HUB_REPO, or of a run",
        "Evaluate the adapter of TAGGER_HUB_REPO, or if that is not set, of the run TAGGER_RUN_ID or the newest run, "
        "on the held-out examples of TAGGER_DATA_DATASET. Set TAGGER_DATA_DATASET, TAGGER_DATA_SEED and "
        "TAGGER_DATA_EVAL_SIZE as in training. Prints a digest of these examples and a table of scores.",
    ),
    "push": Command(
        _push,
        "finish publishing a run on disk: TAGGER_RUN_ID, or the newest",
        "Publish the adapter of the run TAGGER_RUN_ID or the newest run, which was trained but not published. Nothing "
        "is trained, and nothing is published twice. Prints where the adapter is.",
        (DONE, CRASHED, INVALID_INPUT, PUBLISH_FAILED, INTERRUPTED),
        resumes=True,
    ),
    "promote": Command(
        _promote,
        "publish a revision of TAGGER_HUB_REPO: a candidate, or an earlier version",
        "Make a revision of TAGGER_HUB_REPO the published one: a candidate that the gate rejected, or an earlier "
        "version, to roll back. Files are copied on the Hub; nothing is loaded. Prints the new commit and its version.",
        (DONE, CRASHED, INVALID_INPUT, PUBLISH_FAILED, INTERRUPTED),
        {"--revision": {"required": True, "metavar": "REV", "help": "a branch, a version such as v1, or a commit"}},
        resumes=True,
    ),
    "sample": Command(
        _sample,
        "tag texts with an adapter: of TAGGER_HUB_REPO, or of a run",
        "Tag texts with the adapter of TAGGER_HUB_REPO, or if that is not set, of the run TAGGER_RUN_ID or the newest "
        "run. Prints a line for each text, the prompt and its tags. Writes them to TAGGER_SAMPLE_OUTPUT if it is set.",
        arguments={
            "texts": {
                "nargs": "*",
                "metavar": "TEXT",
                "help": "a text to tag, instead of TAGGER_SAMPLE_PROMPTS and TAGGER_SAMPLE_INPUT",
            }
        },
    ),
    "tag": Command(
        _tag,
        "tag a file, folder or data set of any size, in parts that are not done twice",
        "Tag TAGGER_TAG_INPUT into TAGGER_TAG_OUTPUT, with the adapter of TAGGER_HUB_REPO, or if that is not set, of "
        "the run TAGGER_RUN_ID or the newest run. Each row of the output has the tags, their confidences, and an error "
        "or null. Several workers may do it together (TAGGER_TAG_SHARD), and what one has sealed is not done again. "
        "Prints a summary.",
        arguments={
            "--restart": {"action": "store_true", "help": "delete the parts of an earlier job there, and tag all again"}
        },
        resumes=True,
    ),
    "tune": Command(
        _tune,
        "choose between recipes, or in a grid of settings, on folds of the training data",
        "Train the candidates of TAGGER_TUNE_CANDIDATES on parts of the training examples, and score each on the texts "
        "that it was not trained on; no held-out example is used. Half of the candidates are left after each round, "
        "and train twice as long in the next one. The last two are compared by a paired bootstrap: the better one is "
        "chosen if the interval of the difference says that it is better, else the cheaper one. What is finished is "
        "not repeated. Prints the winner, the reason, and where report and winner.env are: a recipe for `run`.",
        arguments={
            "--check": {
                "action": "store_true",
                "help": "only check everything, take a few steps of each candidate, and print what the tune takes",
            }
        },
        resumes=True,
    ),
    "runs": Command(
        _runs,
        "list the runs in TAGGER_RUN_DIR with status, scores and where they were published",
        "List the runs in TAGGER_RUN_DIR, the newest first: status, start, micro-F1 with its 95% interval, that of "
        "TF-IDF, the verdict of the gate, and where the adapter is.",
        arguments={"--json": {"action": "store_true", "help": "print the list as JSON"}},
    ),
    "compare": Command(
        _compare,
        "show what differs between two runs: settings, scores, answers",
        "Compare two runs, each named by its folder in TAGGER_RUN_DIR or by a path. Prints the settings, data and "
        "versions that differ, the scores on the held-out examples of both with the 95% interval of the difference "
        "(paired bootstrap), and the examples whose answers changed.",
        arguments={
            "runs": {"nargs": 2, "metavar": "RUN", "help": "the earlier run, then the later one"},
            "--examples": {
                "type": _count,
                "default": 5,
                "metavar": "N",
                "help": "how many examples that became better, and how many that became worse, are printed (5)",
            },
            "--json": {"action": "store_true", "help": "print everything as JSON"},
        },
    ),
    "settings": Command(
        _settings,
        "print the effective settings and where each comes from",
        "Print every setting as NAME=value with its source: environment, a file, or default. A token is masked.",
        arguments={
            "--recipes": {"action": "store_true", "help": "list the recipes of the package instead, a line for each"},
            "--env-example": {"action": "store_true", "help": "print .env.example instead"},
            "--markdown": {"action": "store_true", "help": "print the reference of all settings instead"},
        },
    ),
}


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--recipe",
        metavar="RECIPE",
        default=argparse.SUPPRESS,
        help="name of a shipped recipe (see `tagger-job settings --recipes`), or a file with lines NAME=value; "
        ".env and the environment override it",
    )
    parser = argparse.ArgumentParser(
        prog="tagger-job",
        description="Fine-tune a small language model into a tagger.\n"
        "Settings are environment variables named TAGGER_<GROUP>_<NAME>; see `tagger-job settings`.",
        epilog=_exit_code_help(EXIT_CODES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(command="run", manifest=None, allow_differences=False)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", description="default: run")
    for name, entry in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=entry.help,
            description=textwrap.fill(entry.description, 80),
            epilog=_exit_code_help(entry.exit_codes, resumes=entry.resumes),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
        )
        for argument, options in entry.arguments.items():
            subparser.add_argument(argument, **options)
        subparser.set_defaults(command=name)
    return parser


def _exit_code_help(codes: Iterable[int], *, resumes: bool = True) -> str:
    entries = {code: EXIT_CODES[code] for code in codes}
    if not resumes:
        entries[INTERRUPTED] = ExitCode("interrupted", "run the command again", "warning")
    lines = [f"  {code:<3}{entry.meaning}\n     {entry.action}" for code, entry in entries.items()]
    return "\n".join(["exit codes, and what to do:", *lines])
