"""What a run says of itself: metrics that are true means, the terminal, checkpoints that can be found again."""
