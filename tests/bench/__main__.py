"""`python -m tests.bench [NAME...]`: speed as ratios against peers, each pair measured in one run."""

import argparse
import importlib
import pkgutil
from pathlib import Path

from tests.bench.rows import render

NO_BENCHMARKS = {"__main__", "rows", "torchvision_stand_in", "training_sides"}


def main() -> None:
    """Measure what is named, or everything: each other module here has a function `rows`."""
    found = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])}
    names = sorted(found - NO_BENCHMARKS, reverse=True)
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("names", nargs="*", choices=[*names, []], help="what to measure; default: everything")
    for name in parser.parse_args().names or names:
        print(render(importlib.import_module(f"tests.bench.{name}").rows()), flush=True)


if __name__ == "__main__":
    main()
