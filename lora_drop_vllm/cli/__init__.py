"""`lora-drop`: runs a command and turns its errors into one line."""

from __future__ import annotations

import os
import select
import sys

from lora_drop_vllm.cli.parser import make_parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `lora-drop`; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser(argv[0] if argv else "").parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except (ValueError, RuntimeError) as error:
        print(f"lora-drop: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlora-drop: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone(sys.stdout.fileno()):
            raise  # another pipe broke
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a file that a check beforehand could not foresee
        where = f"{error.filename}: " if error.filename else ""
        print(f"lora-drop: {where}{error.strerror or error}", file=sys.stderr)
        return 2


def _reader_is_gone(pipe: int) -> bool:
    """True if who read the output, such as `head`, has had enough."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
