"""How any objective is trained: the loop, its gradients, the optimiser, checkpoints and reports."""
