"""Boot tests: a restore point is booted where it harms nobody, and what it shows decides whether it would run."""
