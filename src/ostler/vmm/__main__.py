"""`python -m ostler.vmm FOLDER`: the process of one guest. Started by `ostler.control.launch`; see there."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ostler.vmm", description="Run the guest of a runtime folder.")
    parser.add_argument("folder", type=Path)
    for option, text in (
        ("--lock", "descriptor of the folder's held lock"),
        ("--ready", "descriptor to say on that the guest runs"),
        ("--leash", "descriptor whose end of file ends the guest"),
    ):
        parser.add_argument(option, type=int, metavar="FD", help=text)
    given = parser.parse_args()

    from ostler.vmm.served import serve

    return serve(given.folder, lock=given.lock, ready=given.ready, leash=given.leash)


if __name__ == "__main__":
    sys.exit(main())
