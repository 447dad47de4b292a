"""Group Relative Policy Optimization on PyTorch Lightning."""
