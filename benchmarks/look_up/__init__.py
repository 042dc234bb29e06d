"""Look-up measured on real prompts: ``python -m look_up``."""
