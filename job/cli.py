"""The command line: parse, log, exit code. Nothing heavy is imported before the settings are valid."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from job import __version__
from job.errors import EXIT_CODES, INTERRUPTED, InvalidInputError, JobError, print_error
from job.runs import shutdown
from job.system import logging_setup

if TYPE_CHECKING:
    from job.settings import Settings

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    with shutdown.handled():
        return _run_until_interrupted(arguments)


def command() -> NoReturn:
    """Run as a program: as `main`, and nothing that a library left running delays the end of what was interrupted."""
    with shutdown.handled(then=signal.SIG_IGN):  # once it is over, its code is known
        code = _run_until_interrupted(None)
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run_until_interrupted(arguments: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(arguments, argparse.Namespace(recipe=None))
        logging_setup.configure()
        code = _run_command(options)
        shutdown.check()
    except KeyboardInterrupt:
        by = f" by {shutdown.received()}" if shutdown.received() else ""
        print(f"interrupted{by}; the same command goes on from what is saved", file=sys.stderr)
        return INTERRUPTED
    return code


def _run_command(options: argparse.Namespace) -> int:
    """Run the command; its errors become sentences and exit codes."""
    from job.config import environment  # takes 0.2 s, in which a signal is handled already

    try:
        for name, value in environment.third_party_variables(options.recipe).items():
            os.environ.setdefault(name, value)
        options.command(options, environment.load(options.recipe))
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        shutdown.check()  # what a library made of an interruption is not an error
        if isinstance(error, JobError):
            problem, code = str(error), error.exit_code
        elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
            problem = (
                f"{error.filename or 'the disk'} cannot be written: {error.strerror}. What was saved before is whole: "
                "make room or permit it, then run the same command again"
            )
            code = 1
        else:
            raise
        print_error(problem)
        return code
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--recipe",
        metavar="RECIPE",
        default=argparse.SUPPRESS,
        help="name of a shipped recipe (see `tagger-job settings --recipes`), or file with lines NAME=value; "
        ".env and the environment override it",
    )
    parser = argparse.ArgumentParser(
        prog="tagger-job",
        description="Fine-tune a small language model into a tagger. Settings are environment variables named "
        "TAGGER_<GROUP>_<KNOB>; `tagger-job settings` lists them.",
        epilog=_exit_codes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(command=_run)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", description="without one: run")

    run = commands.add_parser("run", parents=[common], help="the whole job: train, evaluate, publish, sample")
    run.set_defaults(command=_run)

    sample = commands.add_parser(
        "sample", parents=[common], help="tag texts with the adapter of TAGGER_HUB_REPO, or else of a run on disk"
    )
    sample.add_argument("texts", nargs="*", metavar="TEXT", help="texts to tag instead of TAGGER_SAMPLE_PROMPTS")
    sample.set_defaults(command=_sample)

    check = commands.add_parser("check", parents=[common], help="only what can be known before anything is spent")
    check.set_defaults(command=_check)

    prefetch = commands.add_parser(
        "prefetch", parents=[common], help="download base model and data set, for machines that see no Hub"
    )
    prefetch.set_defaults(command=_prefetch)

    push = commands.add_parser(
        "push", parents=[common], help="finish the push of a run on disk: TAGGER_RUN_ID, or the newest"
    )
    push.set_defaults(command=_push)

    again = commands.add_parser(
        "retrain", parents=[common], help="as run, and published only if no worse; nothing if nothing has changed"
    )
    again.set_defaults(command=_retrain)

    evaluate = commands.add_parser(
        "evaluate", parents=[common], help="score the adapter of TAGGER_HUB_REPO, or else of a run on disk"
    )
    evaluate.set_defaults(command=_evaluate)

    promote = commands.add_parser(
        "promote", parents=[common], help="publish a revision of TAGGER_HUB_REPO: a candidate, or one from before"
    )
    promote.add_argument("--revision", required=True, metavar="REV", help="a branch, a tag such as v1, or a commit")
    promote.set_defaults(command=_promote)

    show = commands.add_parser("settings", parents=[common], help="the effective settings and where each came from")
    show.add_argument("--recipes", action="store_true", help="list the recipes that ship with the package instead")
    show.add_argument("--env-example", action="store_true", help="print .env.example instead")
    show.add_argument("--markdown", action="store_true", help="print the reference of all settings instead")
    show.set_defaults(command=_settings)
    return parser


def _exit_codes() -> str:
    lines = [f"  {code:<3}{entry.meaning}\n     {entry.action}" for code, entry in EXIT_CODES.items()]
    return "\n".join(["exit codes, and what to do:", *lines])


def _run(options: argparse.Namespace, chosen: Settings) -> None:
    from job import pipeline

    print(pipeline.run(chosen))


def _check(options: argparse.Namespace, chosen: Settings) -> None:
    from job import preflight

    checked = preflight.check(chosen)
    examples, run = checked.examples, checked.run
    print(f"base model: {checked.settings.base.model} at {checked.settings.base.revision or 'this machine'}")
    aside = f"{len(examples.calibration)} set aside for the threshold, " if examples.calibration else ""
    print(
        f"data: {len(examples.train)} examples to train on, {aside}{len(examples.held_out)} held out, "
        f"{examples.skipped} rows skipped, {examples.near_duplicates} near-duplicates of held-out ones left out"
    )
    print(f"run: {run.path}{', complete already' if run.complete else ''}")
    print(f"push: {checked.repo or 'nothing will be pushed'}")
    for line in preflight.check_machine(checked):
        print(line)


def _prefetch(options: argparse.Namespace, chosen: Settings) -> None:
    from job import data, quantize

    print(f"data: {len(data.load(chosen.data).train)} examples to train on")
    print(f"base model: {quantize.resolve_weights(chosen.base)}")


def _push(options: argparse.Namespace, chosen: Settings) -> None:
    from job import push
    from job.runs import run_folder

    run = run_folder.find_run(chosen.run)
    if not run.publishable:
        raise InvalidInputError(
            f"{run.path} was refused by its gate, or was cut off before it; run the job again with the same settings, "
            "it goes on from there"
        )
    chosen = chosen.with_result_values(run.manifest["settings"])
    repo = push.prepare_repo(chosen)
    if repo is None:
        raise InvalidInputError(
            "there is no token to push with, or TAGGER_HUB_PUSH or HF_HUB_OFFLINE forbids it; set HF_TOKEN"
        )

    from job import pipeline
    from job.system.device import ComputeSpec

    run.lock()
    print(pipeline.finish(run, chosen, repo, ComputeSpec.resolve(chosen.run.device, chosen.train.precision)))


def _retrain(options: argparse.Namespace, chosen: Settings) -> None:
    from job import pipeline

    print(pipeline.retrain(chosen))


def _promote(options: argparse.Namespace, chosen: Settings) -> None:
    from job import promote, push
    from job.hub import access
    from job.hub import client as hub

    if hub.token() is None:
        raise InvalidInputError(
            "promote changes a repo on the Hub and there is no token; set HF_TOKEN to one with write access"
        )
    repo = push.repo_name(chosen, access.token_info())
    with hub.publish_errors(f"{repo} could not be changed", "the same command again tries anew"):
        published = promote.promote(repo, options.revision, chosen.hub)
    print(f"{published.url} is published, as {published.tag}")


def _sample(options: argparse.Namespace, chosen: Settings) -> None:
    from job import data, pipeline, report
    from job.config.validators import is_unicode

    if any(not text.strip() or not is_unicode(text) for text in options.texts):
        raise InvalidInputError("a TEXT to tag is empty or not readable text; expected some words")
    texts = options.texts or data.inference_texts(chosen.sample)
    report.check_output(chosen.sample.output, chosen.sample.input)
    report.show_samples(pipeline.tagger(chosen, "BASE", "DATA").tag(texts), chosen.sample.output)


def _evaluate(options: argparse.Namespace, chosen: Settings) -> None:
    from job import data, model_card, pipeline
    from job.dataset.split import split_digest
    from job.runs import markup

    held_out = data.load(chosen.data).held_out[: chosen.eval.limit]
    tagger = pipeline.tagger(chosen, "BASE", "DATA_SEPARATOR", "DATA_MAX_LENGTH")

    from job.evaluate import evaluate

    scores, _ = evaluate(tagger, held_out)
    print(f"split: {len(held_out)} held-out examples, {split_digest(held_out)}")
    print("\n".join(markup.markdown_table(model_card.score_table({"adapter": scores}))))


def _settings(options: argparse.Namespace, chosen: Settings) -> None:
    from job import settings
    from job.config import environment, recipes, reference

    if options.recipes:
        for name in recipes.recipe_names():
            print(f"{name:<12} {recipes.describe_recipe(name)}")
        return
    if options.env_example or options.markdown:
        print(reference.env_example() if options.env_example else reference.settings_markdown(), end="")
        return
    sources = environment.sources(options.recipe)
    for name, value in chosen.values().items():
        print(f"{name}={settings.to_env(value)}   # {sources.get(name, 'default')}")
    in_files = environment.third_party_variables(options.recipe)
    for name in ("HF_TOKEN", "HF_HOME", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES"):
        if (value := os.environ.get(name)) is not None:
            source = "a file" if in_files.get(name) == value else "environment"
            print(f"{name}={'***' if name == 'HF_TOKEN' else value}   # {source}")
