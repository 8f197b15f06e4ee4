"""From arguments to an exit code: the one place that turns errors into a sentence."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

import typer

from medvae import cli
from medvae.cli_numbers import join_numbers
from medvae.console import debugging, fail
from medvae.errors import MedvaeError

DISK = (errno.ENOSPC, errno.EDQUOT)
RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit code: 0 done, 2 bad input, 3 refused for privacy, 1 a defect of ours."""
    as_json = "--json" in argv
    try:
        code = cli.app(args=join_numbers(argv), prog_name="medvae", standalone_mode=False)
    except MedvaeError as error:
        return fail(type(error).__name__, str(error), error.exit_code, as_json)
    except typer.TyperException as error:
        return fail("UsageError", " ".join(error.format_message().split()), 2, as_json)
    except OSError as error:
        if error.errno in DISK:
            again = ", with --resume for a run that has begun" if "train" in argv else ""
            message = f"the disk is full: free some space and run the command again{again}"
            return fail("InputError", message, 2, as_json)
        if error.errno in RIGHTS:
            return fail(
                "InputError", f"a file or folder cannot be used ({error.strerror}): check its rights", 2, as_json
            )
        return _defect(error, as_json)
    except Exception as error:
        return _defect(error, as_json)
    if code == 130:
        again = "add --resume to go on where it stopped" if "train" in argv else "run the command again"
        return fail("Interrupted", f"interrupted, and nothing half-written counts: {again}", 130, as_json)
    return code if isinstance(code, int) else 0


def _defect(error: Exception, as_json: bool) -> int:
    """A bug: name its type only, because its message may quote a path or a header of a patient."""
    if debugging():
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    message = (
        f"a defect of ours ({type(error).__name__}): set MEDVAE_DEBUG=1 to see the traceback, and please report it"
    )
    return fail("Defect", message, 1, as_json)


def main() -> None:
    """Entry point of the `medvae` command."""
    sys.exit(run(sys.argv[1:]))
