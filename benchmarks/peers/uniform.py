"""Uniform width from scratch: every layer keeps the same share of its channels, no weight.

    SECATEUR_DATA=... python benchmarks/peers/uniform.py 0.5 OUT --steps 686

The control of "rethinking the value of network pruning" (Liu et al., arXiv 1810.05270). Exported
and quantised as in ``by_hand``; trained alike, too, for as many steps as it is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fusion.bench import PARENT, Bench
from fusion.rivals import uniform_scratch
from peers.by_hand import export, fine_tune, quantise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("keep", type=float, help="share of the parent's MACs")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    bench = Bench(PARENT)
    narrow = uniform_scratch.cut(bench, options.keep, seed=0)
    export(bench, fine_tune(bench, narrow, options.steps), options.out)
    quantise(bench, options.out)


if __name__ == "__main__":
    main()
