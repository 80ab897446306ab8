"""What an expert is made of: one file per upcycling mode, each exporting `build(settings)`.

An expert takes its shard of the dense FFN (`ffn.shard`; all of it unless the mode is granular),
the mode may change its weights, and then the gates' sum is compensated (`upcycling.py`).
"""
