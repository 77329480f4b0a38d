"""Says what came out of `make demo`, and how long each stage took.

`python scripts/demo_summary.py DEMO` reads DEMO/eval/metrics.json and DEMO/stages.txt, which the
Makefile writes a line for each stage to: its name and its seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from annexe.terminal import say

SCORES = (
    "grounding/ciou",
    "grounding/t_acc",
    "grounding/n_acc",
    "answer/exact_match_targets",
    "analysis/cider",
    "consistency/contradictions",
)


def main(demo: Path) -> None:
    """Print the scores of the test scenes and the seconds of each stage."""
    metrics = demo / "eval" / "metrics.json"
    if not metrics.is_file():
        sys.exit(f"no '{metrics}'; run make demo")
    scores = json.loads(metrics.read_text())["standard"]
    say("test scenes: " + ", ".join(f"{name} {scores[name]:.3f}" for name in SCORES))

    # A stage that was interrupted and repeated has several lines
    seconds: dict[str, int] = {}
    for line in (demo / "stages.txt").read_text().splitlines():
        name, value = line.split()
        seconds[name] = seconds.get(name, 0) + int(value)
    stages = ", ".join(f"{name} {value} s" for name, value in seconds.items())
    say(f"{stages}; {sum(seconds.values())} s in all")
    say(f"open {demo / 'report.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, metavar="DEMO", help="folder of the demo")
    main(parser.parse_args().demo)
