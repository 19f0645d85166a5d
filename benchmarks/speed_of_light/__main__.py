"""The limits of every kernel on every device, predicted: writes docs/speed_of_light.md.

    python -m benchmarks.speed_of_light [--render] [--rivals FILE.json ...]

Counts in the PTX emulator what has changed since benchmarks/speed_of_light/counts.json was written
(nvcc and g++ are needed; about ten minutes of a core for everything) and writes the page. Other
packages' counts are made by `benchmarks.speed_of_light.rivals` on the software CUDA device, where
those packages are installed, and taken in with --rivals.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from benchmarks.speed_of_light import counts, page

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = ROOT / "benchmarks/speed_of_light/counts.json"
PAGE = ROOT / "docs/speed_of_light.md"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed_of_light", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--render", action="store_true", help="count nothing")
    parser.add_argument(
        "--rivals",
        nargs="+",
        default=[],
        type=pathlib.Path,
        metavar="FILE",
        help="counts by benchmarks.speed_of_light.rivals to take in",
    )
    options = parser.parse_args(argv)
    if options.rivals:
        document = counts.read(FILE)
        for path in options.rivals:
            document["rivals"] |= json.loads(path.read_text())
        counts.write(FILE, document)
    if not options.render:
        from op_harness import available

        if (reason := available("cuda-ptx")) is not None:
            print(f"cannot count: {reason}", file=sys.stderr)
            return 2
        counts.update(FILE)
    PAGE.write_text(page.render(counts.read(FILE)))
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
