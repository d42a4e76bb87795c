"""Device code of lstm_triton and its launchers. Knows tensors and plans, not modules; importing it needs no triton."""
