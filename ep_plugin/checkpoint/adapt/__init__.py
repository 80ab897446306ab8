"""A dense model becomes a Mixture-of-Experts; begin with `upcycle.py`."""
