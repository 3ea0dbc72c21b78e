"""Train any objective: the loop, its gradients, the optimiser, checkpoints and reports."""
