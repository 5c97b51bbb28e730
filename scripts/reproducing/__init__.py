"""What scripts.reproduce runs, and how it tells the time beforehand."""
