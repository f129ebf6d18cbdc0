"""Malformed input of every kind, a table a module, and the one test that all of it is given to."""
