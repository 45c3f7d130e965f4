"""How answers are decoded: constraints, marginal probabilities, configuration."""
