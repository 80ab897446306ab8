"""Runs of several claims side by side: several.py a e --size gpu --jobs 7.

Without a letter it takes all: recipes/evidence/experts.py, recipes/evidence/halves.py,
recipes/evidence/gates.py, recipes/evidence/capacity.py, recipes/evidence/balance.py,
recipes/evidence/grown.py, recipes/evidence/router_dtype.py, recipes/evidence/rank_bytes.py,
recipes/evidence/placement.py and recipes/evidence/students.py. Not among them: times, which need a
machine to themselves (recipes/evidence/step_time.py), and settings, which come first
(recipes/evidence/settings.py).
"""

import sys

import balance
import capacity
import experts
import gates
import grown
import halves
import placement
import rank_bytes
import router_dtype
import settings
import step_time
import students
from _sweep import main

TOGETHER = (
    experts,
    halves,
    gates,
    capacity,
    balance,
    grown,
    router_dtype,
    rank_bytes,
    placement,
    students,
)
MODULES = (*TOGETHER[:8], step_time, *TOGETHER[8:], settings)  # in the page's order
LETTERS = tuple(dict.fromkeys(module.CLAIM.letter for module in TOGETHER))

if __name__ == "__main__":
    words = sys.argv[1:]
    letters = []
    while words and words[0] in LETTERS:
        letters.append(words.pop(0))
    if words and not words[0].startswith("-"):
        legal = " ".join(LETTERS)
        print(f"several.py: error: LETTER must be of {legal}; got {words[0]!r}", file=sys.stderr)
        sys.exit(2)
    chosen = [module.CLAIM for module in TOGETHER if module.CLAIM.letter in (letters or LETTERS)]
    sys.exit(main(chosen, "several.py", words))
