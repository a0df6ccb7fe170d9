"""What the learning-rate study found, and every other study uses: docs/results/learning_rate.md."""

PLAIN_RATE = 4e-3  # of embeddings, output embeddings and norms
DENSE_RATE = 5e-4
BASE_RATE = 5e-4
EXPONENT = 1.0
