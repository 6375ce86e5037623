"""How weights get near zero: decay, conditioning, sparsity control, data and tasks, the loop."""
