"""fastdiff's benchmarks: `python -m benchmarks --help`, from the root of the repository."""

import sys

from benchmarks.allocator import ensure_steady_allocator

if __name__ == "__main__":
    ensure_steady_allocator()  # before torch is imported: it starts this command again
    from benchmarks.command import main

    sys.exit(main())
