"""A user's own router, dispatcher and grouped GEMM: `--ep-router my_moe.router` and so on."""
