"""The job: its chapters in a straight line."""

from __future__ import annotations

import logging

from job import preflight, report
from job.results import Summary
from job.settings import Settings

log = logging.getLogger(__name__)


def run(settings: Settings) -> Summary:
    """Quantize, freeze, LoRA, train, push, sample; returns how it ended.

    A run that is complete is not done again. Raises JobError for each end that has its own exit code.
    """
    examples, run = preflight.check(settings)
    log.info("run: %s", run.path)
    if run.complete:
        log.info("run: it is complete already, so nothing is done again")
        return report.summary(run)

    # torch and transformers take seconds to import: not before all is checked that needs neither
    from job.data import encode, texts_to_tag
    from job.device import Machine
    from job.evaluate import evaluate, gate, most_common_tags
    from job.freeze import freeze
    from job.lora import add_adapters, count_parameters, save_adapter
    from job.push import push
    from job.quantize import load_model, load_tokenizer
    from job.sample import Tagger, load_tagger
    from job.train import train

    machine = Machine.resolve(settings.run.device, settings.train.precision)
    held_out = examples.held_out[: settings.eval.limit]
    with run.timed("load"):
        tokenizer = load_tokenizer(settings.base)
        encoded = encode(tokenizer, examples.train, settings)
        log.info("data: %d examples to train on, %d held out", len(encoded), len(examples.held_out))
        log.info("quantize: %s as %s on %s", settings.base.model, settings.base.quantize, machine)
        base = load_model(settings.base, machine)
        freeze(base)
        model = add_adapters(base, settings.lora, seed=settings.train.seed)
        log.info("lora: %s", count_parameters(model))
    run.begin(str(machine))

    tagger = Tagger(model, tokenizer, settings, machine)
    with run.timed("evaluate_base"), model.disable_adapter():
        before, _ = evaluate(tagger, held_out)
        log.info("evaluate: before training, %s", before)
    with run.timed("train"):
        trained = train(model, encoded, settings.train, tokenizer=tokenizer, machine=machine, run=run)
    with run.timed("evaluate"):
        after, predictions = evaluate(tagger, held_out)
        log.info("evaluate: after training, %s", after)

    scores = {"most_common_tags": most_common_tags(examples.train, held_out), "base": before, "adapter": after}
    report.save_metrics(run, scores, trained, predictions)
    with run.folder("adapter") as folder:
        save_adapter(model, tokenizer, folder, settings.base)
        report.save_card(folder, settings, scores)
    gate(settings.eval, after)
    with run.timed("push"):
        published = push(run.adapter, settings)

    del model, base, tagger  # room for the base model that is loaded anew
    with run.timed("sample"):
        tagger = load_tagger(settings, published or run.adapter, machine)
        report.save_samples(run, tagger.tag(texts_to_tag(settings.sample)), settings.sample.output)
    run.finish(published, machine.peak_memory())
    return report.summary(run)
