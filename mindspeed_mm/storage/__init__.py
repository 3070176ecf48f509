"""Names of checkpoint files, and reading and writing one of them; no pickled code is ever executed here."""
