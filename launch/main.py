"""Prunes a network as a config file says: main.py --config=FILE[:ARGUMENTS].

Any field can be set on the command line, such as --config.prune.macs=0.3.
"""

import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from jaxprune import job, options, report, summary
from jaxprune.errors import PruneError

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "default: runs/ and the config's name")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "run on several hosts")

CACHE = flags.DEFINE_string(
    "compilation_cache", "~/.cache/jaxprune", "where compiled programs are kept"
)
NAME = str.maketrans({":": "-", ",": "-", "=": "_"})


def fail(error: object, status: int = 1) -> NoReturn:
    """Ends the process with one line on stderr."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(status)


def parse(argv: list[str]) -> list[str]:
    """Parses flags and loads the config file; any fault in either is one line."""
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is None:
            fail("give a config file, such as --config=configs/digits.py")
        list(CONFIG.value)  # A file that could not be loaded raises only when used.
    except (KeyError, AttributeError) as error:
        words = (
            str(error).replace("\\n", ". ").translate(str.maketrans("", "", "\\'\""))
        )
        fail(f"unknown config field: {words}")
    except (flags.Error, PruneError, OSError, TypeError, ValueError) as error:
        fail(error)
    if rest[1:]:
        fail(f"unknown argument {rest[1]!r}; options start with --, see --help")
    return rest


def interruptible(on_progress: Callable[..., None]) -> Callable[..., None]:
    """The callback, which also ends the job where Python has dropped a Ctrl-C.

    A KeyboardInterrupt that is raised in a callback of the garbage collector is printed
    or swallowed there, and the job would run on.
    """
    asked = False

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def progress(*arguments: Any, **options: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        on_progress(*arguments, **options)

    signal.signal(signal.SIGINT, note)
    return progress


def main(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every file it touches.
    # Programs compiled once are found again by the next run.
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(CACHE.value))
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    del argv  # Checked by parse.
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    # runs/vgg16-method_lasso-runlocal for configs/vgg16.py:method=lasso,runlocal
    default = pathlib.Path(name).name.replace(".py", "").translate(NAME)
    workdir = WORKDIR.value or f"runs/{default}"
    console = Console()
    logging.info("config\n%s", CONFIG.value)
    console.print(
        f"{name}, commit {summary.commit()}, {jax.devices()}, workdir {workdir}"
    )
    try:
        asked = options.from_mapping(CONFIG.value)
        with report.progress(console) as bars:
            result = job.run(
                asked,
                workdir=workdir,
                say=console.print,
                on_progress=interruptible(bars),
            )
    except PruneError as error:
        fail(error)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command continues from what {workdir} holds", 130)
    paths = {"slim model": f"{workdir}/slim", "report": f"{workdir}/report.html"}
    console.print(report.table(result, paths=paths))


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
