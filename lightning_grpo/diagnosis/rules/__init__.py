"""The built-in rules: those that the modules of this package define, by theme."""

from lightning_grpo.diagnosis.rule import Rule
from lightning_grpo.diagnosis.rules import optimization, policy, resources, rewards, sync

RULES: tuple[type[Rule], ...] = tuple(
    kind
    for theme in (sync, optimization, policy, rewards, resources)
    for kind in vars(theme).values()
    if isinstance(kind, type) and issubclass(kind, Rule) and kind.__module__ == theme.__name__
)

# users name a rule as lightning_grpo.diagnosis.rules.DeadGroups
globals().update({kind.__name__: kind for kind in RULES})
