"""What a layout would cost, before a cluster is paid for."""
