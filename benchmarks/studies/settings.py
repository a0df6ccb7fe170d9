"""What the learning-rate study found, and every other study uses: docs/results/learning_rate.md."""

DENSE_RATE = 2e-3
BASE_RATE = 2e-3
EXPONENT = 0.5
