"""Stateless random numbers: every sample has its own seed, and every token its own uniform number.

A rollout is therefore the same on any number of ranks and in any order, and no generator state has to be saved.
"""

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64 bits in which each bit avalanches."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def rollout_seeds(seed: int, rollout_number: int, prompt_index: int, sample_index: int) -> int:
    """The seed of one sample, in [0, 2**63).

    Args:
        seed: the run's seed.
        rollout_number: number of earlier rollouts.
        prompt_index: index of the prompt among all prompts of the source.
        sample_index: index among the prompt's generations.
    """
    state = 0
    for part in (seed, rollout_number, prompt_index, sample_index):
        state = _mix(state ^ (part & _MASK))
    return state >> 1


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a turn of the sample with this seed, in [0, 2**63). Turn 0 has the sample's own; turn −1 stands for
    its environment."""
    return seed if turn == 0 else _mix(_mix(seed) ^ (turn & _MASK)) >> 1


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) for token `position` of the sample with this seed (53 random bits)."""
    return (_mix(_mix(seed & _MASK) ^ position) >> 11) / (1 << 53)
