"""What is timed: each area against the bare base and other libraries, as ratios."""
