"""How fast the adapters are trained, beside what else could train them. No part of the job, and not installed."""
