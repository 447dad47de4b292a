"""The conversion of TRL's configurations."""
