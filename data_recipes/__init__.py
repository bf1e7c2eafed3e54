"""What is trained on? Records, mixtures, datasets, and builders that make data."""
