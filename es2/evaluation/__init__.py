"""Behaviour: refusal rules, judge, replies compared, steering, robustness, attacks."""
