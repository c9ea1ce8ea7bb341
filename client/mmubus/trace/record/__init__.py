"""Making recordings: what the running kernel tells its MMU notifiers while a program runs."""
