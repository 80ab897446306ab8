"""Runs of several claims side by side: several.py a e --size gpu --jobs 7.

Without a letter it takes all of recipes/evidence/experts.py and recipes/evidence/grown.py.
"""

import sys

import experts
import grown
from _sweep import main

CLAIMS = {module.CLAIM.letter: module.CLAIM for module in (experts, grown)}

if __name__ == "__main__":
    words = sys.argv[1:]
    letters = []
    while words and words[0] in CLAIMS:
        letters.append(words.pop(0))
    sys.exit(main([CLAIMS[x] for x in letters or CLAIMS], "several.py", words))
