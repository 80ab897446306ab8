"""(i) A student of fewer layers, with a teacher and without.

All scripts share recipes/evidence/_sweep.py.
"""

import sys

from _model import E8, Variant, top1
from _sweep import main, of_losses
from _verdict import Less

FEWER = f"--num-layers {{fewer}} {top1(8)}"
KEEP = "--keep-layers {kept}"
VARIANTS = (
    E8,
    Variant("student", FEWER),
    Variant("student-taught", FEWER, teacher=E8.name),
    Variant("kept", FEWER, grown_from=E8.name, convert=KEEP),
    Variant("kept-taught", FEWER, grown_from=E8.name, convert=KEEP, teacher=E8.name),
)
LABELS = {
    E8.name: "the teacher",
    "student": "a student, without it",
    "student-taught": "a student, taught",
    "kept": "the teacher's layers, without it",
    "kept-taught": "the teacher's layers, taught",
}
SAYS = "A student that a larger model teaches has a lower loss than the same one alone."
CHECKS = (Less("student-taught", "student"), Less("kept-taught", "kept"))
CLAIM = of_losses("i", "students", "Students", SAYS, VARIANTS, LABELS, CHECKS)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "students.py"))
