"""Malformed input of every kind: each is answered with one line and exit code 2, and nothing is written or damaged."""
