"""What the learning-rate study found, and every other study uses: docs/results/learning_rate.md."""

PLAIN_RATE = 4e-3  # of embeddings, output embeddings and norms
RATE = 5e-4  # of the linear layers, dense; sparse ones get RATE / d^p
EXPONENTS = {"1": 1.0, "1x16": 1.0, "16": 0.5, "32": 0.5, "64": 0.5}  # p, by block
