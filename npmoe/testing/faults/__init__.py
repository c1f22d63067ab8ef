"""Real mistakes, planted: what the kit must find, each by the check that names it."""
