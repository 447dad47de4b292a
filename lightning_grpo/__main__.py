"""``python -m lightning_grpo`` is the command ``lightning-grpo``."""

from lightning_grpo.cli import main

if __name__ == "__main__":
    main()
