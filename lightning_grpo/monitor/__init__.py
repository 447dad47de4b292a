"""Progress in the terminal, metrics of completions and rewards, checkpoints, and stopping on signals."""
