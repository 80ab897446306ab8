"""What the layer and its products are measured against; one file per peer, each with `build`."""
