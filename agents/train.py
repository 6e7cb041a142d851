"""Train an agent on an environment: ``python -m agents.train --env DialogueQA-v0``.

A run is a folder: configuration, metrics, checkpoints, transcripts, learning curve, result, and
an offline Weights & Biases run. The checkpoint that the validation split likes best is what is
reported. Ctrl-C (or SIGTERM) saves and stops; ``--resume FOLDER`` goes on from there.

Many devices share a run: ``torchrun --nproc-per-node 2 -m agents.train …``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from rich.console import Console

from agents.arguments import parse
from agents.launch import fail


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train; a mistake in it is told in one sentence."""
    held = contextlib.ExitStack()
    try:
        try:
            arguments = parse(sys.argv[1:] if argv is None else argv, __doc__)
            # They take seconds to import, and who asks for help need not wait for them.
            from transformers.utils import logging

            from agents import distributed, training

            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            world = distributed.join(arguments.distributed, arguments.device)
            console = Console(quiet=not world.is_main)
            run = training.prepare(arguments, console, held, world)
        except (ValueError, TypeError, OSError, ImportError) as error:
            fail(str(error), error)
        try:
            training.train(run, console, samples=arguments.samples)
        except FloatingPointError as error:
            world.gather(None)  # all processes have it; nobody leaves before the first has closed
            command = training.resume_command(run.folder, world.size)
            way = f"Once its cause is mended, to go on:\n  {command}"
            try:
                fail(f"{error}\n{way}", error)
            finally:
                world.leave()  # after it was told: who tells is agreed on while all are connected
        except OSError as error:
            fail(f"{error}\nTo go on:\n  {training.resume_command(run.folder, world.size)}", error)
        world.leave()
    except KeyboardInterrupt as error:
        fail("Interrupted.", error, code=130)
    finally:
        held.close()


if __name__ == "__main__":
    main()
