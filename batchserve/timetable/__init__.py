"""The rows of schedules and of their ticks: statements with their guards, within transactions of the caller."""
