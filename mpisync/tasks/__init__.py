"""What to train: models, data and losses for the demo, benchmarks and studies. Plain torch, a leaf of the package."""
