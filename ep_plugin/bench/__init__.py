"""`ep-plugin bench`: the layer, its products and its kernels, timed beside their peers."""
