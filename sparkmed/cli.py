"""The command line: one verb per stage."""

import argparse
import logging
import os
import sys
import warnings

from sparkmed import config as configuration
from sparkmed.rejection import InputError

VERBS = {
    "catalog": "read the headers of an archive's new and changed files",
    "volumes": "join files to volumes, labels, subjects and splits",
    "patches": "cut the volumes into a Petastorm patch dataset",
    "train": "train on Spark executors with Horovod, measure, register the model",
    "promote": "make the newest model the champion if it passes the gate",
    "rollback": "give the champion alias back to the version before",
    "score": "predict what the champion has not scored yet",
    "screen": "make profiles of wells, quality of plates, curves and hits of what was scored of a screen",
    "watch": "compare new volumes with those that the champion was judged on; count what is refused and what waits",
    "predictions": "print what the champion says about the present volumes as CSV",
    "trace": "print where a prediction comes from: files, model, training data",
    "vacuum": "remove what killed runs left and what was replaced, after a while",
    "report": "write one HTML page about all of it",
    "run": "all stages in order",
    "check": "say what would fail, before it does",
}


STATUSES = """exit status:
  0  done, nothing to worry about
  1  a stage failed, or too much was refused
  2  wrong arguments, or an archive that does not fit the config
  3  done (score, watch, run), but new volumes are unlike those that the champion was judged on
  4  done, but a volume waits for its first score longer than watch.backlog_days
  5  done, but more of the new volumes are in quarantine than when the champion was chosen
of several the largest of 3, 4 and 5 is given, and 1 and 2 before them; the table watch holds the numbers"""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: see :data:`STATUSES`."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _quieten()
    from sparkmed.pipeline import StageFailed  # engines are imported when a verb is run, not to print the help
    from sparkmed.tables import Conflict
    from sparkmed.training.loop import TrainingError

    try:
        return _act(options)
    except InputError as e:
        print(f"sparkmed: {e}", file=sys.stderr)
        return 2
    except (StageFailed, TrainingError) as e:
        print(f"sparkmed: {options.verb} failed: {e}", file=sys.stderr)
        return 1
    except Conflict as e:
        print(
            f"sparkmed: {options.verb} stopped: another run is at work on this lake ({e}); nothing is lost, run it again",
            file=sys.stderr,
        )
        return 1


def _quieten():
    """Engines say only what is wrong: their news would hide ours."""
    for noisy in ("mlflow", "alembic", "py4j", "petastorm"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # py4j tells the root logger of every connection that Horovod's driver closes, with a traceback
    logging.getLogger().addFilter(lambda record: record.module != "java_gateway")
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    # petastorm and horovod speak of the libraries they were written for; workers read the variable
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::DeprecationWarning")
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)


def _act(options) -> int:
    from sparkmed import formats, pipeline
    from sparkmed.pipeline import ledger

    if options.verb == "inspect":
        print(formats.inspect(options.uri))
        return 0
    if options.verb == "demo":
        from sparkmed import demo

        return demo.main(options.folder)
    if options.verb == "deidentify":
        wanted = configuration.deidentification(options.archive, options.out, options.overrides, options.config)
        print(", ".join(f"{k} {v}" for k, v in pipeline.deidentify(wanted).items()))
        return 0
    if getattr(options, "retry_quarantined", False):
        options.overrides.append("score.retry_refused=true")
    config = configuration.load(options.config, options.overrides)
    if options.verb == "predictions":
        print(ledger.export(config, options.out).rstrip("\n"))
        return 0
    if options.verb == "trace":
        print(ledger.as_text(ledger.trace(config, options.key)), end="")
        return 0
    if options.verb == "vacuum":
        found = pipeline.vacuum(config, options.dry_run)
        for leftover in found:
            print(f"{leftover.bytes:>14}  {leftover.what:<24} {leftover.path}")
        done = "would be removed" if options.dry_run else "removed"
        print(f"{len(found)} {done}, {sum(x.bytes for x in found)} bytes, untouched for {config.vacuum.after_days:g} days")
        return 0
    if options.verb == "check":
        problems = pipeline.check(config, deep=True)
        print("\n".join(f"- {p}" for p in problems) or f"{options.config}: nothing known that would fail")
        return 2 if problems else 0
    if options.verb == "run":
        return pipeline.status(pipeline.run(config, print)["score"])
    if options.verb == "rollback":
        print(pipeline.rollback(config)["reason"])
        return 0
    return pipeline.status(pipeline.run_stage(options.verb, config, print))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparkmed",
        description="Medical images from archive to scored cohort on Spark.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, meaning in VERBS.items():
        verb = verbs.add_parser(name, help=meaning, description=meaning)
        verb.add_argument("config", metavar="CONFIG", help="YAML file of the project")
        if name == "trace":
            verb.add_argument("key", metavar="KEY", help="of a row of predictions, or its beginning; a mask or SEG of one")
        verb.add_argument(
            "overrides", nargs="*", metavar="key=value", help="replaces a value, such as archive=/data lake=/lake train.epochs=5"
        )
        if name == "score":
            verb.add_argument("--retry-quarantined", action="store_true", help="try those again that are left out after failures")
        if name == "vacuum":
            verb.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
        if name == "predictions":
            verb.add_argument("--out", metavar="FILE", help="write to a file or URL instead; .csv or .parquet")
    inspect = verbs.add_parser("inspect", help="geometry and headers of a file, a series or a folder")
    inspect.add_argument("uri", metavar="URI")
    clean = verbs.add_parser("deidentify", help="DICOM copies without identity, each proven clean, and a table of what was done")
    clean.add_argument("archive", metavar="ARCHIVE", help="folder or URL of the DICOM files; zip and tar files are read in place")
    clean.add_argument("out", metavar="OUT", help="folder or URL of the copies; the table is OUT.audit")
    clean.add_argument("overrides", nargs="*", metavar="key=value", help="such as deidentify.dates=removed identity.key_file=/key")
    clean.add_argument("--config", metavar="CONFIG", help="YAML file of a project, whose key and settings are taken")
    demo = verbs.add_parser("demo", help="a phantom archive and the whole path on it; nothing else is needed")
    demo.add_argument("folder", nargs="?", default="demo", metavar="DIR", help="where it is written (default ./demo)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
