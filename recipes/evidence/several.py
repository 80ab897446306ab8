"""Runs of several claims side by side: several.py a e --size gpu --jobs 7.

Without a letter it takes all: recipes/evidence/experts.py, recipes/evidence/gates.py,
recipes/evidence/capacity.py, recipes/evidence/balance.py, recipes/evidence/grown.py,
recipes/evidence/router_dtype.py and recipes/evidence/placement.py.
"""

import sys

import balance
import capacity
import experts
import gates
import grown
import placement
import router_dtype
from _sweep import main

MODULES = (experts, gates, capacity, balance, grown, router_dtype, placement)
CLAIMS = {module.CLAIM.letter: module.CLAIM for module in MODULES}

if __name__ == "__main__":
    words = sys.argv[1:]
    letters = []
    while words and words[0] in CLAIMS:
        letters.append(words.pop(0))
    sys.exit(main([CLAIMS[x] for x in letters or CLAIMS], "several.py", words))
