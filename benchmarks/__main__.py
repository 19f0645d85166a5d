"""fastdiff's benchmarks: `python -m benchmarks --help`, from the root of the repository."""

import sys

from benchmarks import command, machine

if __name__ == "__main__":
    machine.ensure_steady_allocator()
    sys.exit(command.main())
